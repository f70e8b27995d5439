"""The result of `resize`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from lorashrink.bases.views import BaseInfo
from lorashrink.errors import UsageError, hint_of
from lorashrink.linking.loaders import Loads
from lorashrink.results.shown import NOT_PLAIN, Shown

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True)
class LayerResult:
    """What became of one layer."""

    name: str
    shape: tuple[int, ...]
    algo: str
    rank_before: int
    rank_after: int  # 0 = removed
    energy: float  # Σσ² kept / Σσ²
    rle_lora: float  # ‖lost‖_F / ‖ΔW‖_F
    rle_ckpt: float | None  # ‖lost‖_F / ‖W‖_F, None without a base weight


@dataclass(frozen=True, slots=True)
class Verbatim:
    """A tensor that was copied, bit for bit."""

    key: str
    reason: str


@dataclass(frozen=True, slots=True)
class Removed:
    """A layer, or one tensor of it, that is not in the output."""

    name: str
    reason: str


@dataclass(frozen=True, slots=True)
class WeightedSource:
    """One of the adapters in a weighted sum."""

    path: str
    weight: float


@dataclass(frozen=True, slots=True)
class Capped:
    """A layer whose ΔW exceeds a recipe's limits: its norms without the limits and as it is written."""

    name: str
    spectral_before: float
    spectral_after: float
    fro_before: float
    fro_after: float


@dataclass(frozen=True, slots=True, repr=False)
class FileResult(Shown):
    """One written file (or, with a dry run, one that would be), or one adapter in memory."""

    table = "layers"

    source: str
    output: str
    recipe: str
    threshold: float | None
    bytes_before: int
    bytes_after: int
    relative_error: float  # sqrt(Σ‖lost‖² / Σ‖ΔW‖²)
    seconds: float
    layers: tuple[LayerResult, ...] = ()
    verbatim: tuple[Verbatim, ...] = ()
    removed: tuple[Removed, ...] = ()
    warnings: tuple[str, ...] = ()
    quantiles: Mapping[str, float] = field(default_factory=dict)  # of the score, on request
    # Bytes if layers that are no LoRA stay as they are ("same") or are all written as LoRA ("lora"); {} without such
    forms: Mapping[str, int] = field(default_factory=dict)
    skipped: bool = False  # an equal file existed already
    base: str | None = None  # base of this adapter, if the adapters of the run have several
    sources: tuple[WeightedSource, ...] = ()  # what `source` is a weighted sum of, if it is one
    capped: tuple[Capped, ...] = ()
    kept_energy: float | None = None  # see `energy`; None where it follows from the error, as it does without limits
    loads: Loads = field(default_factory=Loads)  # of the output
    # Of an adapter in memory, which is not written: the tensors, the header's metadata, and PEFT's settings
    state_dict: Mapping[str, Tensor] | None = field(default=None, compare=False, metadata=NOT_PLAIN)
    metadata: Mapping[str, str] = field(default_factory=dict, compare=False, metadata=NOT_PLAIN)
    settings: Mapping[str, Mapping[str, Any]] = field(default_factory=dict, compare=False, metadata=NOT_PLAIN)
    # With statistics: PSNR in dB to the pictures of the original adapter, and the loss that it is predicted from
    predicted_db: float | None = None
    distortion: float | None = None
    dtype: str = ""  # of the factors: "fp8", "fp16", ...; "mixed" if there are several

    def brief(self) -> FileResult:
        """The same result without the fields that grow with the number of layers."""
        lists: dict[str, Any] = dict.fromkeys(("layers", "verbatim", "removed", "warnings", "capped"), ())
        return replace(self, **lists, quantiles={}, forms={}, loads=Loads())

    @property
    def energy(self) -> float:
        """Share of ΣΣσ² that was kept."""
        return 1 - self.relative_error**2 if self.kept_energy is None else self.kept_energy

    @property
    def norm_ratio(self) -> float:
        """Share of the Frobenius norm that was kept: the square root of the energy."""
        return math.sqrt(max(0.0, self.energy))


@dataclass(frozen=True, slots=True)
class Failure:
    """An input that could not be shrunk."""

    source: str
    error: str  # what is wrong and what to do
    input: str = field(init=False)  # the same as source
    hint: str | None = field(init=False)  # the part of the error that says what to do

    def __post_init__(self) -> None:
        object.__setattr__(self, "input", self.source)
        object.__setattr__(self, "hint", hint_of(self.error.removeprefix(f"{self.source}: ")))


@dataclass(frozen=True, slots=True)
class Space:
    """Bytes on the disk that outputs go to."""

    needed: int  # bytes
    free: int


@dataclass(frozen=True, slots=True)
class StackBudget:
    """Adapters that were shrunk together by one recipe."""

    recipe: str
    adapters: int  # adapters that are written, or existed already
    budget: int  # bytes for all adapters together
    bytes: int  # bytes of all adapters together
    threshold: float | None  # lowest kept score in any adapter, None if everything was kept


@dataclass(frozen=True, slots=True, repr=False)
class Report(Shown):
    """The outcome of a run over one or many adapters."""

    table = "results"

    version: str
    base: BaseInfo | None
    results: tuple[FileResult, ...]
    failed: tuple[Failure, ...]
    bases: tuple[BaseInfo, ...] = ()  # used instead of `base` if a table gives several
    space: Space | None = None  # only with a dry run
    stacks: tuple[StackBudget, ...] = ()  # one for each recipe if the adapters share a budget

    @property
    def state_dict(self) -> Mapping[str, Tensor]:
        """The tensors of the one result of an adapter in memory. Raises UsageError if there is none such."""
        states = [result.state_dict for result in self.results if result.state_dict is not None]
        if len(states) != 1:
            raise UsageError(f"state_dict: {len(states)} results are in memory; take it from one of `results`.")
        return states[0]


@dataclass(frozen=True, slots=True)
class Converted:
    """One adapter that was written in another naming, container or dtype."""

    source: str
    output: str
    naming: str | None  # None: the input's
    dtype: str
    bytes_before: int
    bytes_after: int
    layers: int
    exact: bool  # every tensor of the output has the bits of the input's, perhaps some of its rows
    kept: tuple[Verbatim, ...]  # tensors under their old names
    warnings: tuple[str, ...] = ()
    loads: Loads = field(default_factory=Loads)  # of the output


@dataclass(frozen=True, slots=True, repr=False)
class ConversionReport(Shown):
    """The outcome of a conversion of one or many adapters."""

    table = "results"

    version: str
    base: BaseInfo | None
    results: tuple[Converted, ...]
    failed: tuple[Failure, ...]
