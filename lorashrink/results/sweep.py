"""The result of `sweep`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from lorashrink.pictures.prompts import Prompt
from lorashrink.results.shown import Shown


@dataclass(frozen=True, slots=True)
class Pictures:
    """Pictures against those that the original adapter draws: means over the pictures, and standard deviations."""

    psnr: float  # dB; `likeness.MOST_PSNR` for equal ones
    psnr_deviation: float
    ssim: float
    ssim_deviation: float
    ms_ssim: float
    ms_ssim_deviation: float
    files: tuple[str, ...]  # prompt by prompt, each with every seed
    values: Mapping[str, tuple[float, ...]]  # each measure's numbers, as many as there are files
    worst: int  # index of the picture with the lowest PSNR
    worst_psnr: float  # dB, of that picture
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
    files: tuple[str, ...]  # with the original adapter
    none: Pictures  # of the model without an adapter
    floor: Pictures | None  # with the original adapter in `other_dtype`; None if that gives NaN
    other_dtype: str = "float16"

    @property
    def labels(self) -> tuple[str, ...]:
        """The prompt and seed of each picture, in the order of their files."""
        return tuple(
            f"{prompt.prompt} (seed {(prompt.seed or 0) + seed})" for prompt in self.prompts for seed in self.seeds
        )


@dataclass(frozen=True, slots=True)
class Texts:
    """How far a language model's answers are from those with the original adapter, passage by passage."""

    distance: float  # mean over the passages, see `Read.measure`; 0 for equal answers
    worst: int  # index of the passage with the largest distance
    worst_distance: float
    values: tuple[float, ...]  # of each passage
    perplexity: float | None  # of the text; None for models without next words


@dataclass(frozen=True, slots=True)
class Read:
    """The text that a language model read, and the two ends of the scale."""

    model: str
    file: str
    measure: str  # "divergence", in nats per token, or "cosine distance" of embeddings
    passages: int
    tokens: int
    perplexity: float | None  # with the original adapter
    none: Texts  # of the model without an adapter


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
    calibrated: bool = False  # it keeps what matters for outputs, so that `relative_error` says little about it
    predicted_db: float | None = None  # of calibrated recipes: PSNR to the pictures of the original adapter
    best: bool = False  # no point is both smaller and closer
    pictures: Pictures | None = None
    texts: Texts | None = None


@dataclass(frozen=True, slots=True)
class Suggestion:
    """The recommended point, and why."""

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
    read: Read | None = None

    @property
    def suggested(self) -> Point | None:
        """The point of the suggestion."""
        recipe = self.suggestion.recipe if self.suggestion else None
        return next((point for point in self.points if point.recipe == recipe), None)
