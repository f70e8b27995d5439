"""LoKr: ΔW = scale · w1 ⊗ w2, a Kronecker product, each factor whole or of low rank.

w1 [n1, m1] = w1_a [n1, r] · w1_b [r, m1]; w2 [n2, m2, kh, kw], or w2_a [n2, r] · w2_b [r, m2·kh·kw], or with a
Tucker core t2 [r, r, kh, kw] and w2_a [r, n2], w2_b [r, m2]. Sources: KronA (https://arxiv.org/abs/2212.10650);
LyCORIS (https://arxiv.org/abs/2309.14859).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

from lorashrink.adapters.family import Family, Infos, Shape, Stored
from lorashrink.adapters.lora import fold

if TYPE_CHECKING:
    from torch import Tensor

    from lorashrink.engine.delta import Delta, Dense, Kronecker


def _check(infos: Infos) -> str | None:
    for part in ("w1", "w2"):
        if part in infos and {f"{part}_a", f"{part}_b"} & infos.keys():
            return f"{part} is there whole and in factors"
    if "t2" in infos and "w2" in infos:
        return "it has a Tucker core though w2 is whole"
    if empty := [role for role in _own(infos) if 0 in infos[role].shape]:
        return f"{empty[0]} {list(infos[empty[0]].shape)} is empty"
    return _first_problem(infos) or _second_problem(infos)


def _own(infos: Infos) -> list[str]:
    return [role for role in _SUFFIXES if role in infos]


def _first_problem(infos: Infos) -> str | None:
    if "w1" in infos:
        w1 = infos["w1"].shape
        return None if len(w1) == 2 else f"w1 {list(w1)} is no matrix"
    a, b = infos["w1_a"].shape, infos["w1_b"].shape
    if len(a) != 2 or len(b) != 2:
        return f"w1_a {list(a)} and w1_b {list(b)} are no matrices"
    return None if a[1] == b[0] else f"w1_a is {list(a)}, w1_b is {list(b)}; their ranks differ"


def _second_problem(infos: Infos) -> str | None:
    if "w2" in infos:
        w2 = infos["w2"].shape
        return None if len(w2) >= 2 else f"w2 {list(w2)} is no matrix"
    a, b = infos["w2_a"].shape, infos["w2_b"].shape
    if len(a) != 2 or len(b) < 2:
        return f"w2_a {list(a)} and w2_b {list(b)} are no matrices"
    if "t2" in infos:
        core = infos["t2"].shape
        if len(core) < 3 or len(b) != 2 or core[:2] != (a[0], b[0]):
            return f"w2_a is {list(a)}, t2 is {list(core)}, w2_b is {list(b)}; they do not chain"
        return None
    return None if a[1] == b[0] else f"w2_a is {list(a)}, w2_b is {list(b)}; their ranks differ"


def _first_shape(infos: Infos) -> tuple[int, int]:
    if "w1" in infos:
        n1, m1 = infos["w1"].shape
        return n1, m1
    return infos["w1_a"].shape[0], infos["w1_b"].shape[1]


def _second_shape(infos: Infos) -> Shape:
    if "w2" in infos:
        return infos["w2"].shape
    a, b = infos["w2_a"].shape, infos["w2_b"].shape
    return (a[1], b[1], *infos["t2"].shape[2:]) if "t2" in infos else (a[0], *b[1:])


def _shape(infos: Infos) -> Shape:
    n1, m1 = _first_shape(infos)
    n2, m2, *kernel = _second_shape(infos)
    return (n1 * n2, m1 * m2, *kernel)


def _stored_rank(infos: Infos) -> int | None:
    for role in ("w2_b", "w1_b"):
        if role in infos:
            return infos[role].shape[0]
    return None


def _rank(infos: Infos) -> int:
    return _stored_rank(infos) or _width(infos)


def _width(infos: Infos) -> int:
    n2, *rest = _second_shape(infos)
    second = infos["w2_b"].shape[0] if "w2_b" in infos else min(n2, math.prod(rest))
    return min(_first_shape(infos)) * second


def _scale(infos: Infos, alpha: float | None, config_scale: float) -> float:
    """alpha / r; 1 where both factors are whole, beside which LyCORIS stores alphas that mean nothing."""
    if alpha is None:
        return config_scale
    rank = _stored_rank(infos)
    return 1.0 if rank is None else alpha / rank


def _second(tensors: Mapping[str, Tensor]) -> Delta | Dense:
    from lorashrink.engine.delta import Delta, Dense

    if "w2" in tensors:
        matrix = tensors["w2"].flatten(1)
        return Dense(matrix, 1.0, tuple(matrix.shape))
    up, down = tensors["w2_a"], tensors["w2_b"].flatten(1)
    if "t2" in tensors:
        # with a core both factors are stored with the rank first
        up, down = up.mT, fold(tensors["t2"], down)
    return Delta(up, down, 1.0, (up.shape[0], down.shape[1]))


def _delta(stored: Stored) -> Kronecker:
    from lorashrink.engine.delta import Dense, Kronecker

    tensors = stored.tensors
    w1 = tensors["w1"] if "w1" in tensors else tensors["w1_a"].float() @ tensors["w1_b"].float()
    return Kronecker(Dense(w1, stored.scale, tuple(w1.shape)), _second(tensors), stored.shape)


_SUFFIXES = {role: rf"\.lokr_{role}" for role in ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t2")}

FAMILIES = (
    Family(
        name="lokr",
        suffixes=_SUFFIXES,
        required=tuple(
            frozenset(first + second) for first in (("w1",), ("w1_a", "w1_b")) for second in (("w2",), ("w2_a", "w2_b"))
        ),
        check=_check,
        shape=_shape,
        rank=_rank,
        width=_width,
        delta=_delta,
        scale=_scale,
        # a w2 in two factors has its kernel flattened into the second one
        flat=lambda infos: "w2_b" in infos and len(_second_shape(infos)) == 2,
    ),
)
