"""The result of `resize`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from lorashrink.bases.views import BaseInfo


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
    """A tensor that was copied as it is."""

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
    """A layer whose ΔW was larger than a recipe's limits, as it would be without them and as it is written."""

    name: str
    spectral_before: float
    spectral_after: float
    fro_before: float
    fro_after: float


@dataclass(frozen=True, slots=True)
class FileResult:
    """One written file (or, with a dry run, one that would be)."""

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
    # Bytes with the layers that are no LoRA left as they are ("same") or all written as LoRA ("lora"); {} without such
    forms: Mapping[str, int] = field(default_factory=dict)
    skipped: bool = False  # an equal file was already there
    base: str | None = None  # its own one, where adapters have several
    sources: tuple[WeightedSource, ...] = ()  # what `source` is a weighted sum of, if it is one
    capped: tuple[Capped, ...] = ()
    kept_energy: float | None = None  # see `energy`; None where it follows from the error, as it does without limits

    def brief(self) -> FileResult:
        """The same without what grows with the number of layers."""
        return replace(self, layers=(), verbatim=(), removed=(), warnings=(), quantiles={}, forms={}, capped=())

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
    error: str


@dataclass(frozen=True, slots=True)
class Space:
    """Room on the disk that outputs go to."""

    needed: int  # bytes
    free: int


@dataclass(frozen=True, slots=True)
class StackBudget:
    """Adapters that were shrunk together by one recipe."""

    recipe: str
    adapters: int  # that are written, or were there
    budget: int  # bytes, for all of them
    bytes: int  # of all of them
    threshold: float | None  # lowest kept score of all of them, None if everything was kept


@dataclass(frozen=True, slots=True)
class Report:
    """The outcome of a run over one or many adapters."""

    version: str
    base: BaseInfo | None
    results: tuple[FileResult, ...]
    failed: tuple[Failure, ...]
    bases: tuple[BaseInfo, ...] = ()  # in place of `base`, with a table of them
    space: Space | None = None  # of a dry run
    stacks: tuple[StackBudget, ...] = ()  # one for each recipe, of adapters under one budget


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


@dataclass(frozen=True, slots=True)
class ConversionReport:
    """The outcome of a conversion of one or many adapters."""

    version: str
    base: BaseInfo | None
    results: tuple[Converted, ...]
    failed: tuple[Failure, ...]
