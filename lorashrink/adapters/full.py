"""Full differences: ΔW as it is, in the shape of the base weight and without a scale (LyCORIS "full", extractions)."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from lorashrink.adapters.family import Family, Infos, Shape, Stored

if TYPE_CHECKING:
    from lorashrink.engine.delta import Dense


def is_vector(infos: Infos) -> bool:
    """Whether the difference is that of a bias, a normalisation or another weight that is no matrix."""
    return len(infos["diff"].shape) < 2


def _check(infos: Infos) -> str | None:
    shape = infos["diff"].shape
    if is_vector(infos):
        return f"its difference {list(shape)} is no matrix"
    return f"its difference {list(shape)} is empty" if 0 in shape else None


def _shape(infos: Infos) -> Shape:
    return infos["diff"].shape


def _rank(infos: Infos) -> int:
    out, *rest = infos["diff"].shape
    return min(out, math.prod(rest))


def _delta(stored: Stored) -> Dense:
    from lorashrink.engine.delta import Dense

    return Dense(stored.tensors["diff"].flatten(1), stored.scale, stored.shape)


FAMILIES = (
    Family(
        name="full",
        suffixes={"diff": r"\.diff"},
        required=(frozenset({"diff"}),),
        check=_check,
        shape=_shape,
        rank=_rank,
        width=_rank,
        delta=_delta,
        scale=lambda infos, alpha, config_scale: 1.0,
        carried=lambda infos: "a difference of a vector" if is_vector(infos) else None,
    ),
)
