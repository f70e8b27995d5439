"""The result of `compare`."""

from __future__ import annotations

from dataclasses import dataclass

from lorashrink.bases.views import BaseInfo
from lorashrink.results.shown import Shown


@dataclass(frozen=True, slots=True)
class Side:
    """One of the two adapters."""

    path: str
    bytes: int
    family: str | None
    algo: str
    naming: str
    dtype: str
    layers: int
    ranks: tuple[int, ...]  # lowest and highest; () without layers


@dataclass(frozen=True, slots=True)
class LayerDifference:
    """One weight of the base, and what both adapters add to it.

    Several layers of one side belong together where it splits what the other fuses. Numbers are None where they mean
    nothing (a quotient by zero) or cannot be had (NaN, or a layer that needs a base); then `flags` tells.
    """

    name: str
    names_a: tuple[str, ...]
    names_b: tuple[str, ...]
    block: str
    shape: tuple[int, ...]
    algo_a: str | None
    algo_b: str | None
    rank_a: int | None  # the highest, of several layers
    rank_b: int | None
    dtype_a: str | None
    dtype_b: str | None
    fro_a: float | None = None  # ‖A‖_F
    fro_b: float | None = None
    difference: float | None = None  # ‖A − B‖_F
    cosine: float | None = None  # <A, B> / (‖A‖·‖B‖)
    relative_difference: float | None = None  # ‖A − B‖ / ‖A‖
    energy_kept: float | None = None  # 1 − relative_difference²
    flags: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class BlockDifference:
    """Layers together, as one long vector; `left_out` layers have no numbers and do not count."""

    block: str
    layers: int
    left_out: int
    fro_a: float | None = None
    fro_b: float | None = None
    difference: float | None = None
    cosine: float | None = None
    relative_difference: float | None = None
    energy_kept: float | None = None


@dataclass(frozen=True, slots=True)
class OtherDifference:
    """A tensor outside of all ΔW that the second side lacks, or has with other numbers."""

    a: str | None  # key
    b: str | None
    reason: str  # why it belongs to no ΔW
    relative_difference: float | None  # None where only one side has it, or it is zero, or the shapes differ


@dataclass(frozen=True, slots=True)
class MetadataDifference:
    """An entry of the header, or of PEFT's settings, that is not the same on both sides."""

    key: str
    a: str | None
    b: str | None


@dataclass(frozen=True, slots=True, repr=False)
class Comparison(Shown):
    """B against A. Layers that only one side has count in blocks and total, with a zero on the other side."""

    table = "layers"

    version: str
    base: BaseInfo | None
    a: Side
    b: Side
    total: BlockDifference
    blocks: tuple[BlockDifference, ...]
    layers: tuple[LayerDifference, ...]
    only_a: tuple[LayerDifference, ...]
    only_b: tuple[LayerDifference, ...]
    others: tuple[OtherDifference, ...]
    others_equal: int  # equal tensors outside of all ΔW
    metadata: tuple[MetadataDifference, ...]
