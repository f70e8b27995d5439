"""The result of `inspect`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from lorashrink.linking.loaders import Loads
from lorashrink.results.shown import Shown
from lorashrink.results.shrinking import Failure


@dataclass(frozen=True, slots=True)
class LayerRow:
    """One layer. Values that were not requested, or are not known, are None."""

    name: str
    block: str
    kind: str
    shape: tuple[int, ...]
    algo: str
    rank: int
    dtype: str
    bytes: int = 0  # of its tensors
    base_keys: tuple[str, ...] = ()
    alpha: float | None = None
    scale: float | None = None
    fro: float | None = None
    spectral: float | None = None
    stable_rank: float | None = None  # ‖ΔW‖_F² / σ_1²
    effective_rank: float | None = None  # exp of the entropy of σ²/Σσ²
    rank_for_energy: Mapping[str, int] = field(default_factory=dict)
    base_fro: float | None = None
    base_spectral: float | None = None
    fro_ratio: float | None = None
    spectral_ratio: float | None = None
    flags: tuple[str, ...] = ()
    singular_values: tuple[float, ...] | None = None


@dataclass(frozen=True, slots=True)
class BlockRow:
    """The layers of one block together."""

    block: str
    layers: int
    parameters: int
    bytes: int
    fro: float | None
    fro_ratio: float | None


@dataclass(frozen=True, slots=True)
class Finding:
    """Something about a file that its owner should know."""

    flag: str
    layers: int  # number of layers concerned, 0 for the file as a whole
    text: str


@dataclass(frozen=True, slots=True)
class Recommendation:
    """What `resize` would make of a file by one recipe."""

    recipe: str
    bytes: int
    relative_error: float  # sqrt(Σ‖lost‖² / Σ‖ΔW‖²)
    energy: float


@dataclass(frozen=True, slots=True, repr=False)
class AdapterTable(Shown):
    """One adapter file."""

    table = "layers"

    path: str
    bytes: int
    family: str | None
    algo: str
    naming: str
    dtype: str
    fro: float | None  # of all layers together
    fro_ratio: float | None
    metadata: Mapping[str, str]
    notes: Mapping[str, str]  # what the metadata tells, plain label -> text
    health: tuple[Finding, ...]
    layers: tuple[LayerRow, ...]
    blocks: tuple[BlockRow, ...]
    others: Mapping[str, str]  # keys outside the layers, with the reason
    recommendations: tuple[Recommendation, ...] | None = None  # None: not requested
    loads: Loads = field(default_factory=Loads)


@dataclass(frozen=True, slots=True, repr=False)
class Inspection(Shown):
    """The outcome for one or many files."""

    table = "files"

    files: tuple[AdapterTable, ...]
    failed: tuple[Failure, ...] = ()
