"""LoKr: ΔW = scale · w1 ⊗ w2, a Kronecker product, each factor whole or of low rank.

w1 [n1, m1] = w1_a [n1, r] · w1_b [r, m1]; w2 [n2, m2, kh, kw], or w2_a [n2, r] · w2_b [r, m2·kh·kw], or with a
Tucker core t2 [r, r, kh, kw] and w2_a [r, n2], w2_b [r, m2]. Sources: KronA (https://arxiv.org/abs/2212.10650);
LyCORIS (https://arxiv.org/abs/2309.14859).
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from lorashrink.adapters.factors import Factors
from lorashrink.adapters.family import Family, Infos, Shape, Stored

if TYPE_CHECKING:
    from lorashrink.engine.delta import Delta, Dense, Kronecker

SUFFIXES = {role: rf"\.lokr_{role}" for role in ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t2")}
FIRST, SECOND = Factors("w1_a", "w1_b"), Factors("w2_a", "w2_b", "t2")


def check(infos: Infos) -> str | None:
    """w1 a matrix and w2 a matrix or kernel, each whole or in factors that fit."""
    for name in ("w1", "w2"):
        if name in infos and {f"{name}_a", f"{name}_b"} & infos.keys():
            return f"{name} is there whole and in factors"
    if "t2" in infos and "w2" in infos:
        return "it has a Tucker core though w2 is whole"
    if empty := [role for role in SUFFIXES if role in infos and 0 in infos[role].shape]:
        return f"{empty[0]} {list(infos[empty[0]].shape)} is empty"
    if "w1" in infos and len(infos["w1"].shape) != 2:
        return f"w1 {list(infos['w1'].shape)} is no matrix"
    if "w1" not in infos and (problem := FIRST.problem(infos, kernel=False)):
        return problem
    if "w2" in infos:
        return None if len(infos["w2"].shape) >= 2 else f"w2 {list(infos['w2'].shape)} is no matrix"
    return SECOND.problem(infos)


def sides(infos: Infos) -> tuple[Shape, Shape]:
    """Shapes of w1 [n1, m1] and w2 [n2, m2, kh, kw]; w2 is [n2, m2·kh·kw] where its factors are stored flat."""
    w1 = infos["w1"].shape if "w1" in infos else FIRST.shape(infos)
    w2 = infos["w2"].shape if "w2" in infos else SECOND.shape(infos)
    return w1, w2


def weight_shape(infos: Infos) -> Shape:
    """Shape of the base weight."""
    (n1, m1), (n2, m2, *kernel) = sides(infos)
    return (n1 * n2, m1 * m2, *kernel)


def factor_rank(infos: Infos) -> int | None:
    """The rank of the factors, None if w1 and w2 are whole."""
    return next((infos[role].shape[0] for role in ("w2_b", "w1_b") if role in infos), None)


def delta_rank(infos: Infos) -> int:
    """Rank of w1 times rank of w2."""
    w1, (n2, *rest) = sides(infos)
    return min(w1) * (infos["w2_b"].shape[0] if "w2_b" in infos else min(n2, math.prod(rest)))


def scale(infos: Infos, alpha: float | None, config_scale: float) -> float:
    """alpha / r; 1 where both factors are whole, beside which LyCORIS stores alphas that mean nothing."""
    rank = factor_rank(infos)
    if alpha is None:
        return config_scale
    return 1.0 if rank is None else alpha / rank


def delta(stored: Stored) -> Kronecker:
    """ΔW as a Kronecker product of a dense w1 and of w2 as it is stored."""
    from lorashrink.engine.delta import Delta, Dense, Kronecker

    tensors = stored.tensors
    w1 = tensors["w1"] if "w1" in tensors else tensors["w1_a"].float() @ tensors["w1_b"].float()
    w2: Delta | Dense
    if "w2" in tensors:
        matrix = tensors["w2"].flatten(1)
        w2 = Dense(matrix, 1.0, tuple(matrix.shape))
    else:
        up, down = SECOND.read(tensors)
        w2 = Delta(up, down, 1.0, (up.shape[0], down.shape[1]))
    return Kronecker(Dense(w1, stored.scale, tuple(w1.shape)), w2, stored.shape)


FAMILIES = (
    Family(
        name="lokr",
        suffixes=SUFFIXES,
        required=tuple(
            frozenset(first + second) for first in (("w1",), ("w1_a", "w1_b")) for second in (("w2",), ("w2_a", "w2_b"))
        ),
        check=check,
        shape=weight_shape,
        rank=lambda infos: factor_rank(infos) or delta_rank(infos),
        delta=delta,
        delta_rank=delta_rank,
        own_scale=scale,
        # a w2 in two factors has its kernel flattened into the second one
        flat=lambda infos: "w2_b" in infos and len(sides(infos)[1]) == 2,
    ),
)
