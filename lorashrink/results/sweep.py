"""The result of `sweep`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from lorashrink.pictures.prompts import Prompt
from lorashrink.results.shown import Shown


@dataclass(frozen=True, slots=True)
class Pictures:
    """Pictures against those that the whole adapter draws: means over the pictures, and standard deviations."""

    psnr: float  # dB; `likeness.MOST_PSNR` for equal ones
    psnr_deviation: float
    ssim: float
    ssim_deviation: float
    ms_ssim: float
    ms_ssim_deviation: float
    files: tuple[str, ...]  # prompt by prompt, each with every seed
    values: Mapping[str, tuple[float, ...]]  # each measure's numbers, as many as there are files
    clip: float | None = None  # None without a CLIP model
    clip_deviation: float | None = None


@dataclass(frozen=True, slots=True)
class Drawn:
    """The settings of the pictures, and the two ends of the scale."""

    model: str
    device: str
    dtype: str
    prompts: tuple[Prompt, ...]
    seeds: tuple[int, ...]  # added to the prompts' own
    files: tuple[str, ...]  # with the whole adapter
    none: Pictures  # of the model without an adapter
    floor: Pictures | None  # with the whole adapter in `other_dtype`; None if that gives NaN
    other_dtype: str = "float16"


@dataclass(frozen=True, slots=True)
class Point:
    """What one recipe would make of the adapter."""

    recipe: str
    curve: str  # the recipe without its selection's number: points of one curve belong together
    bytes: int
    relative_error: float  # sqrt(Σ‖lost‖² / Σ‖ΔW‖²)
    energy: float
    mean_rank: float  # over all layers, removed ones count as 0
    layers: int  # layers that remain
    best: bool = False  # no point is both smaller and closer
    pictures: Pictures | None = None


@dataclass(frozen=True, slots=True)
class Suggestion:
    """The point to begin with, and why."""

    recipe: str
    bytes: int
    relative_error: float
    reason: str


@dataclass(frozen=True, slots=True, repr=False)
class Sweep(Shown):
    """Size against error for one adapter; points by size, smallest first."""

    table = "points"

    source: str
    bytes: int
    points: tuple[Point, ...]
    suggestion: Suggestion | None
    drawn: Drawn | None = None

    @property
    def suggested(self) -> Point | None:
        """The point of the suggestion."""
        recipe = self.suggestion.recipe if self.suggestion else None
        return next((point for point in self.points if point.recipe == recipe), None)
