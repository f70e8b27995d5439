"""Full differences: ΔW as it is, in the shape of the base weight and without a scale (LyCORIS "full", extractions)."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from lorashrink.adapters.family import Family, Infos, Stored, unscaled

if TYPE_CHECKING:
    from lorashrink.engine.delta import Dense


def is_vector(infos: Infos) -> bool:
    """Whether the difference is that of a bias, a normalisation or another weight that is no matrix."""
    return len(infos["diff"].shape) < 2


def check(infos: Infos) -> str | None:
    """A matrix, or the kernel of a convolution."""
    shape = infos["diff"].shape
    if is_vector(infos):
        return f"its difference {list(shape)} is no matrix"
    return f"its difference {list(shape)} is empty" if 0 in shape else None


def delta(stored: Stored) -> Dense:
    """ΔW as a matrix [out, in·kh·kw]."""
    from lorashrink.engine.delta import Dense

    return Dense(stored.tensors["diff"].flatten(1), stored.scale, stored.shape)


FAMILIES = (
    Family(
        name="full",
        suffixes={"diff": r"\.diff"},
        required=(frozenset({"diff"}),),
        check=check,
        shape=lambda infos: infos["diff"].shape,
        rank=lambda infos: min(infos["diff"].shape[0], math.prod(infos["diff"].shape[1:])),
        delta=delta,
        own_scale=unscaled,
        carried=lambda infos, config: "a difference of a vector" if is_vector(infos) else None,
    ),
)
