"""LoHa: ΔW = scale · (A1·B1) ∘ (A2·B2), the elementwise product of two low-rank matrices.

Sources: FedPara (https://arxiv.org/abs/2108.06098); LyCORIS (https://arxiv.org/abs/2309.14859).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

from lorashrink.adapters.family import Family, Infos, Shape, Stored
from lorashrink.adapters.lora import fold

if TYPE_CHECKING:
    from torch import Tensor

    from lorashrink.engine.delta import Delta, Dense


def _check(infos: Infos) -> str | None:
    if ("t1" in infos) != ("t2" in infos):
        return "one half has a Tucker core and the other has none"
    for half in "12":
        if problem := _half_problem(infos, half):
            return problem
    if _half_shape(infos, "1") != _half_shape(infos, "2"):
        return f"its halves make {list(_half_shape(infos, '1'))} and {list(_half_shape(infos, '2'))}"
    if infos["w1_b"].shape[0] != infos["w2_b"].shape[0]:
        return f"its halves have the ranks {infos['w1_b'].shape[0]} and {infos['w2_b'].shape[0]}"
    return None


def _half_problem(infos: Infos, half: str) -> str | None:
    a, b = infos[f"w{half}_a"].shape, infos[f"w{half}_b"].shape
    if len(a) != 2 or len(b) < 2:
        return f"w{half}_a {list(a)} and w{half}_b {list(b)} are no matrices"
    if f"t{half}" in infos:
        core = infos[f"t{half}"].shape
        if len(core) < 3 or len(b) != 2 or core[:2] != (a[0], b[0]):
            return f"w{half}_a is {list(a)}, t{half} is {list(core)}, w{half}_b is {list(b)}; they do not chain"
        if 0 in core:
            return f"t{half} {list(core)} is empty"
    elif a[1] != b[0]:
        return f"w{half}_a is {list(a)}, w{half}_b is {list(b)}; their ranks differ"
    return f"w{half}_a {list(a)} or w{half}_b {list(b)} is empty" if 0 in (*a, *b) else None


def _half_shape(infos: Infos, half: str) -> Shape:
    a, b = infos[f"w{half}_a"].shape, infos[f"w{half}_b"].shape
    if f"t{half}" in infos:
        return (a[1], b[1], *infos[f"t{half}"].shape[2:])
    return (a[0], *b[1:])


def _shape(infos: Infos) -> Shape:
    return _half_shape(infos, "1")


def _rank(infos: Infos) -> int:
    return infos["w1_b"].shape[0]


def _width(infos: Infos) -> int:
    out, *rest = _shape(infos)
    return min(_rank(infos) ** 2, out, math.prod(rest))


def _scale(infos: Infos, alpha: float | None, config_scale: float) -> float:
    return config_scale if alpha is None else alpha / _rank(infos)


def _half(tensors: Mapping[str, Tensor], half: str) -> tuple[Tensor, Tensor]:
    """up [out, r] and down [r, in·kh·kw], float32: products of half precision numbers are exact in it."""
    a, b = tensors[f"w{half}_a"], tensors[f"w{half}_b"]
    if f"t{half}" in tensors:
        # with a core both factors are stored with the rank first
        return a.mT.float(), fold(tensors[f"t{half}"], b).float()
    return a.float(), b.flatten(1).float()


def _delta(stored: Stored) -> Delta | Dense:
    """Of rank r² through Khatri-Rao products: row by row of the ups, column by column of the downs."""
    import torch

    from lorashrink.engine.delta import Delta, Dense

    (up1, down1), (up2, down2) = _half(stored.tensors, "1"), _half(stored.tensors, "2")
    rank = down1.shape[0] * down2.shape[0]
    if rank >= min(up1.shape[0], down1.shape[1]):
        return Dense((up1 @ down1).mul_(up2 @ down2), stored.scale, stored.shape)
    up = torch.einsum("na,nb->nab", up1, up2).flatten(1)
    down = torch.einsum("am,bm->abm", down1, down2).flatten(0, 1)
    return Delta(up, down, stored.scale, stored.shape)


FAMILIES = (
    Family(
        name="loha",
        suffixes={role: rf"\.hada_{role}" for role in ("w1_a", "w1_b", "w2_a", "w2_b", "t1", "t2")},
        required=(frozenset({"w1_a", "w1_b", "w2_a", "w2_b"}),),
        check=_check,
        shape=_shape,
        rank=_rank,
        width=_width,
        delta=_delta,
        scale=_scale,
        # without a core the kernel is flattened into b
        flat=lambda infos: "t1" not in infos and len(infos["w1_b"].shape) == 2,
    ),
)
