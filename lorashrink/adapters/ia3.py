"""IA³: one number per row or column multiplies the base weight.

LyCORIS: W' = W·(1 + w), w [d] or, for a convolution, [1, d, 1, 1]; `on_input` tells columns from rows. PEFT: W' = W·l,
l [out, 1] for rows, [1, in] for columns. Source: https://arxiv.org/abs/2205.05638.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from lorashrink.adapters.family import Family, Infos, Needs, Shape, Stored, unscaled
from lorashrink.errors import ShapeError

if TYPE_CHECKING:
    from torch import Tensor

    from lorashrink.engine.delta import Dense


def check(infos: Infos) -> str | None:
    """LyCORIS': a vector, or one number per channel of a convolution, and one switch."""
    weight, switch = infos["weight"].shape, infos["on_input"].shape
    if math.prod(switch) != 1:
        return f"on_input {list(switch)} is not one number"
    if (len(weight) == 1 and weight[0]) or _is_kernel(weight):
        return None
    return _no_vector("weight", weight)


def check_peft(infos: Infos) -> str | None:
    """PEFT's: a row, a column, or one number per channel of a convolution."""
    vector = infos["vector"].shape
    if (len(vector) == 2 and 1 in vector and 0 not in vector) or _is_kernel(vector):
        return None
    return _no_vector("ia3_l", vector)


def _is_kernel(shape: Shape) -> bool:
    """Whether this is [1, d, 1, ...], as of a convolution."""
    return len(shape) > 2 and shape[1] > 0 and math.prod(shape) == shape[1]


def _no_vector(name: str, shape: Shape) -> str:
    return f"{name} {list(shape)} is no list of factors for rows or columns"


def delta(stored: Stored) -> Dense:
    """ΔW = W·w. Raises ShapeError if the base weight has another side."""
    rows = not bool(stored.tensors["on_input"].item())
    return _scaled(stored, stored.tensors["weight"].float().flatten(), rows)


def delta_peft(stored: Stored) -> Dense:
    """ΔW = W·(l − 1). Raises ShapeError if the base weight has another side, or the side is not clear."""
    vector = stored.tensors["vector"]
    out, inner, *_ = stored.shape
    if vector.ndim == 2:
        rows = vector.shape[1] == 1 and (vector.shape[0] > 1 or out == 1)
    # for a convolution both kinds have the same shape; only with this setting there are any for columns
    elif out == inner and stored.config.get("feedforward_modules"):
        raise ShapeError(f"{out} factors do not tell whether they are for the rows or the columns of a convolution.")
    else:
        rows = out == vector.shape[1]
    return _scaled(stored, vector.float().flatten() - 1, rows)


def _scaled(stored: Stored, factors: Tensor, rows: bool) -> Dense:
    from lorashrink.engine.delta import Dense

    weight, side = stored.base_weight, stored.shape[0 if rows else 1]
    if len(factors) != side:
        raise ShapeError(f"{len(factors)} factors do not fit a weight with {side} {'rows' if rows else 'columns'}.")
    if rows:
        return Dense(weight * factors[:, None], 1.0, stored.shape)
    return Dense((weight.reshape(len(weight), side, -1) * factors[:, None]).flatten(1), 1.0, stored.shape)


FAMILIES = (
    Family(
        name="ia3",
        suffixes={"weight": r"\.weight", "on_input": r"\.on_input"},
        required=(frozenset({"weight", "on_input"}),),
        check=check,
        shape=lambda infos: (),
        rank=lambda infos: math.prod(infos["weight"].shape),
        delta=delta,
        own_scale=unscaled,
        marks=frozenset({"on_input"}),
        needs=Needs.MULTIPLICATION,
    ),
    Family(
        name="ia3",
        suffixes={"vector": r"\.ia3_l(?:\.[^.]+)?"},
        required=(frozenset({"vector"}),),
        check=check_peft,
        shape=lambda infos: (),
        rank=lambda infos: math.prod(infos["vector"].shape),
        delta=delta_peft,
        own_scale=unscaled,
        needs=Needs.MULTIPLICATION,
    ),
)
