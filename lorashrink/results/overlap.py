"""The result of `overlap`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lorashrink.bases.views import BaseInfo
from lorashrink.results.shown import Shown
from lorashrink.results.shrinking import Failure

Table = tuple[tuple[float | None, ...], ...]  # N×N, in the order of the adapters


@dataclass(frozen=True, slots=True)
class StackMember:
    """One adapter, and its weight in the sum."""

    path: str
    weight: float
    bytes: int
    family: str | None
    algo: str
    naming: str
    dtype: str
    layers: int
    ranks: tuple[int, ...]  # lowest and highest; () without layers
    fro: float  # ‖ΔW‖_F over all layers, without the weight


@dataclass(frozen=True, slots=True)
class LayerSum:
    """Σ w_i·ΔW_i on one weight of the base. Quotients by zero, and what needs a base that is not there, are None."""

    fro: float
    spectral: float  # σ_1
    second: float  # σ_2
    fro_amplification: float | None  # fro / the largest |w_i|·‖ΔW_i‖_F
    amplification: float | None  # spectral / the largest |w_i|·σ_1 of ΔW_i
    fro_ratio: float | None  # to the base weight's
    spectral_ratio: float | None
    shares: tuple[float, ...]  # of each adapter in σ_1; they add up to 1, and some may be below 0


@dataclass(frozen=True, slots=True)
class LayerOverlap:
    """One weight of the base, and what the adapters add to it. `sum` is None where a number cannot be had."""

    name: str
    block: str
    shape: tuple[int, ...]
    adapters: tuple[int, ...]  # numbers of the adapters that change it, from 0
    ranks: tuple[int, ...]  # ranks of these adapters; several layers of one adapter together
    fro: tuple[float, ...]  # ‖ΔW_i‖_F, for every adapter
    spectral: tuple[float, ...]
    cosine: Table
    subspace: Table  # mean of left and right
    left: Table
    right: Table
    base_fro: float | None
    base_spectral: float | None
    sum: LayerSum | None
    flags: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class BlockOverlap:
    """The layers of one block together; `left_out` layers have no numbers and do not count."""

    block: str
    layers: int
    left_out: int
    fro: tuple[float, ...]  # of every adapter
    cosine: Table
    subspace: Table
    left: Table
    right: Table
    sum_fro: float
    fro_ratio: float | None  # of the sum, over the layers whose base weight is known


@dataclass(frozen=True, slots=True)
class Pair:
    """Two adapters, numbered from 0. `kind` is "same", "opposite", "against", "apart" or "some"."""

    a: int
    b: int
    cosine: float | None
    subspace: float | None
    chance: float | None  # the overlap of random subspaces of these dimensions
    kind: str


@dataclass(frozen=True, slots=True)
class Stack:
    """The sum as a whole. A strength is σ_1 of a layer, with a base as part of the base weight's σ_1."""

    fro: float
    fro_ratio: float | None
    measure: str  # what strengths are: "spectral_ratio" or "spectral"
    strongest: float | None  # of all layers of the sum
    strongest_layer: str | None
    alone: float | None  # of all layers of all adapters, with their weights
    alone_layer: str | None
    alone_adapter: int | None
    limit: float | None  # the requested limit, or `alone`
    factor: float | None  # brings the strongest layer to the limit; above 1 more strength fits
    weights: tuple[float, ...]  # times the factor, if that is below 1
    amplified: int  # layers stronger than in any adapter alone
    spikes: int  # layers whose σ_1 is far above σ_2


@dataclass(frozen=True, slots=True)
class Advice:
    """One sentence of advice."""

    kind: str
    adapters: tuple[int, ...]  # adapters that it concerns; () for all
    text: str


@dataclass(frozen=True, slots=True, repr=False)
class Overlap(Shown):
    """How several adapters relate to each other; tables are N×N, None where an adapter adds nothing."""

    table = "layers"

    version: str
    base: BaseInfo | None
    adapters: tuple[StackMember, ...]
    cosine: Table
    subspace: Table
    left: Table
    right: Table
    sum: Stack
    pairs: tuple[Pair, ...]
    advice: tuple[Advice, ...]
    blocks: tuple[BlockOverlap, ...]
    layers: tuple[LayerOverlap, ...]
    failed: tuple[Failure, ...]


def short_names(paths: Sequence[str]) -> list[str]:
    """File names without their endings, with as many folders before them as it takes to tell them apart."""
    parts = [Path(path).with_suffix("").parts if Path(path).suffix else Path(path).parts for path in paths]
    for count in range(1, max(map(len, parts), default=1) + 1):
        names = ["/".join(path_parts[-count:]) for path_parts in parts]
        if len(set(names)) == len(names):
            return names
    return list(paths)
