"""The result of `evidence`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from statistics import fmean

from lorashrink.results.automatic import FailedInput
from lorashrink.results.shown import Shown


@dataclass(frozen=True, slots=True)
class Studied:
    """One adapter of the study."""

    name: str
    sha256: str
    algo: str
    bytes: int  # of its file
    payload: int  # bytes of its tensors
    full_size: int  # bytes of its dimensions in fp16, as LoRA
    pictures: int  # prompts that call it, times seeds
    words: str  # where the prompts come from
    prompts_sha256: str
    prompts: tuple[str, ...] | None  # None: not asked for
    none_db: float  # mean PSNR of the model without the adapter


@dataclass(frozen=True, slots=True)
class Measured:
    """One file, and how its pictures compare with those of the original adapter."""

    adapter: str
    curve: str  # method and dtype, such as "calib,bytes fp8"
    recipe: str
    payload: int  # bytes of its tensors; of a packed file all but its metadata
    bytes: int  # of the file
    relative_error: float  # of the weights
    predicted_db: float | None  # mean PSNR; None where nothing predicts it
    psnr: tuple[float, ...]  # dB, of each picture
    ssim: tuple[float, ...]
    ms_ssim: tuple[float, ...]
    draw: int = 0  # 0: a point of the curve; from 1 on: files of nearly one size, at the quality of `Reached`
    plain: bool = False  # drawn from prompts without the words that call the adapter
    judged: Mapping[str, tuple[float, ...]] = field(default_factory=dict)  # by a judge that was given, of each picture

    @property
    def mean_db(self) -> float:
        """Mean PSNR."""
        return fmean(self.psnr)

    @property
    def worst_db(self) -> float:
        """PSNR of the worst picture."""
        return min(self.psnr)


@dataclass(frozen=True, slots=True)
class Reached:
    """How many bytes a curve takes for a quality."""

    adapter: str
    curve: str
    quality: float  # dB, mean PSNR
    payload: float | None  # bytes; None: the curve does not reach it
    bytes: float | None
    worst_db: float | None  # PSNR of the worst picture at this size
    draws: int  # files of nearly one size that were averaged; 0: interpolated between points of the curve


@dataclass(frozen=True, slots=True)
class Difference:
    """Bjøntegaard differences of a curve to another one, with 95 % intervals over the prompts."""

    adapter: str  # "": the mean of all adapters
    curve: str
    against: str
    decibels: float | None  # mean PSNR at equal payloads; None: the curves share no sizes
    decibels_low: float | None
    decibels_high: float | None
    rate: float | None  # payload at equal quality, as a share of the other curve's; None: they share no qualities
    rate_low: float | None
    rate_high: float | None


@dataclass(frozen=True, slots=True)
class Reckoned:
    """What the study is reckoned to take on a GPU; it was not measured."""

    gigabytes: int  # memory of the GPU
    like: str  # a GPU of this size
    enough: bool  # whether the model is reckoned to fit
    seconds: float  # of one picture
    hours: float  # of the study


@dataclass(frozen=True, slots=True)
class Workload:
    """The work of the study."""

    adapters: int
    curves: int  # of each adapter
    files: int  # about, of all curves
    drawings: int  # about
    memory: int  # bytes, reckoned
    reckoned: tuple[Reckoned, ...]  # () for models that nothing is known about


@dataclass(frozen=True, slots=True, repr=False)
class Evidence(Shown):
    """Curves of quality over size for some adapters and methods."""

    table = "results"

    model: str  # its name
    kind: str
    model_key: str  # a hash of the model's files
    device: str
    dtype: str  # that the model works in
    calibration: str | None  # the table's fingerprint
    against: str  # the curve that others are compared with
    quality: float  # dB, at which sizes are compared
    workload: Workload
    adapters: tuple[Studied, ...]
    results: tuple[Measured, ...]
    reached: tuple[Reached, ...]
    differences: tuple[Difference, ...]
    failed: tuple[FailedInput, ...]
    notes: tuple[str, ...] = ()
    page: str | None = None  # files that were written; None with a plan
    markdown: str | None = None
    data: str | None = None  # the JSON to send in

    @property
    def curves(self) -> tuple[str, ...]:
        """The curves that were measured, in their order."""
        return tuple(dict.fromkeys(point.curve for point in self.results))

    def points(self, adapter: str, curve: str) -> list[Measured]:
        """The points of a curve, smallest first."""
        points = [
            point
            for point in self.results
            if point.adapter == adapter and point.curve == curve and not (point.draw or point.plain)
        ]
        return sorted(points, key=lambda point: point.payload)
