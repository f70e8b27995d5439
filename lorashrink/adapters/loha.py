"""LoHa: ΔW = scale · (A1·B1) ∘ (A2·B2), the elementwise product of two low-rank matrices.

Sources: FedPara (https://arxiv.org/abs/2108.06098); LyCORIS (https://arxiv.org/abs/2309.14859).
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from lorashrink.adapters.factors import Factors
from lorashrink.adapters.family import Family, Infos, Stored

if TYPE_CHECKING:
    from lorashrink.engine.delta import Delta, Dense

HALVES = FIRST, SECOND = Factors("w1_a", "w1_b", "t1"), Factors("w2_a", "w2_b", "t2")


def check(infos: Infos) -> str | None:
    """Two halves of one shape and rank, both with a core or none."""
    if ("t1" in infos) != ("t2" in infos):
        return "one half has a Tucker core and the other has none"
    for half in HALVES:
        if problem := half.problem(infos):
            return problem
        if half.core in infos and 0 in infos[half.core].shape:
            return f"{half.core} {list(infos[half.core].shape)} is empty"
        a, b = infos[half.a].shape, infos[half.b].shape
        if 0 in (*a, *b):
            return f"{half.a} {list(a)} or {half.b} {list(b)} is empty"
    if FIRST.shape(infos) != SECOND.shape(infos):
        return f"its halves make {list(FIRST.shape(infos))} and {list(SECOND.shape(infos))}"
    if rank(infos) != infos["w2_b"].shape[0]:
        return f"its halves have the ranks {rank(infos)} and {infos['w2_b'].shape[0]}"
    return None


def rank(infos: Infos) -> int:
    """Rank of each half."""
    return infos["w1_b"].shape[0]


def delta_rank(infos: Infos) -> int:
    """Rank of the product: r², or that of the whole matrix if it is smaller."""
    out, *fan_in = FIRST.shape(infos)
    return min(rank(infos) ** 2, out, math.prod(fan_in))


def delta(stored: Stored) -> Delta | Dense:
    """ΔW of rank r² through Khatri-Rao products: row by row of the ups, column by column of the downs."""
    import torch

    from lorashrink.engine.delta import Delta, Dense

    # float32, in which products of half precision numbers are exact
    (up1, down1), (up2, down2) = ([factor.float() for factor in half.read(stored.tensors)] for half in HALVES)
    if len(down1) * len(down2) >= min(up1.shape[0], down1.shape[1]):
        return Dense((up1 @ down1).mul_(up2 @ down2), stored.scale, stored.shape)
    up = torch.einsum("na,nb->nab", up1, up2).flatten(1)
    down = torch.einsum("am,bm->abm", down1, down2).flatten(0, 1)
    return Delta(up, down, stored.scale, stored.shape)


FAMILIES = (
    Family(
        name="loha",
        suffixes={role: rf"\.hada_{role}" for role in ("w1_a", "w1_b", "w2_a", "w2_b", "t1", "t2")},
        required=(frozenset({"w1_a", "w1_b", "w2_a", "w2_b"}),),
        check=check,
        shape=FIRST.shape,
        rank=rank,
        delta=delta,
        delta_rank=delta_rank,
        # without a core the kernel is flattened into b
        flat=lambda infos: "t1" not in infos and len(infos["w1_b"].shape) == 2,
    ),
)
