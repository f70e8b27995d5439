"""IA³: one number per row or column multiplies the base weight.

LyCORIS: W' = W·(1 + w), w [d] or, for a convolution, [1, d, 1, 1]; `on_input` tells columns from rows. PEFT: W' = W·l,
l [out, 1] for rows, [1, in] for columns. Source: https://arxiv.org/abs/2205.05638.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from lorashrink.adapters.family import Family, Infos, Needs, Shape, Stored
from lorashrink.errors import ShapeError

if TYPE_CHECKING:
    from torch import Tensor

    from lorashrink.engine.delta import Dense


def _check(infos: Infos) -> str | None:
    weight, switch = infos["weight"].shape, infos["on_input"].shape
    if math.prod(switch) != 1:
        return f"on_input {list(switch)} is not one number"
    if (len(weight) == 1 and weight[0]) or _is_kernel(weight):
        return None
    return _no_vector("weight", weight)


def _check_peft(infos: Infos) -> str | None:
    vector = infos["vector"].shape
    if len(vector) == 2 and 1 in vector and 0 not in vector:
        return None
    return None if _is_kernel(vector) else _no_vector("ia3_l", vector)


def _is_kernel(shape: Shape) -> bool:
    """Whether this is [1, d, 1, ...], as of a convolution."""
    return len(shape) > 2 and shape[1] > 0 and math.prod(shape) == shape[1]


def _no_vector(name: str, shape: Shape) -> str:
    return f"{name} {list(shape)} is no list of factors for rows or columns"


def _delta(stored: Stored) -> Dense:
    rows = not bool(stored.tensors["on_input"].item())
    return _scaled(stored, stored.tensors["weight"].float().flatten(), rows)


def _delta_peft(stored: Stored) -> Dense:
    vector = stored.tensors["vector"]
    return _scaled(stored, vector.float().flatten() - 1, _of_rows(stored, tuple(vector.shape)))


def _of_rows(stored: Stored, vector: Shape) -> bool:
    out, inner, *_ = stored.shape
    if len(vector) == 2:
        return vector[1] == 1 and (vector[0] > 1 or out == 1)
    # for a convolution both kinds have the same shape; only with this setting there are any for columns
    if out == inner and stored.config.get("feedforward_modules"):
        raise ShapeError(f"{out} factors do not tell whether they are for the rows or the columns of a convolution.")
    return out == vector[1]


def _scaled(stored: Stored, factors: Tensor, rows: bool) -> Dense:
    from lorashrink.engine.delta import Dense

    weight = stored.weight
    assert weight is not None, "Family.needs asks for it"
    side = stored.shape[0 if rows else 1]
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
        check=_check,
        shape=lambda infos: (),
        rank=lambda infos: math.prod(infos["weight"].shape),
        width=lambda infos: math.prod(infos["weight"].shape),
        delta=_delta,
        scale=lambda infos, alpha, config_scale: 1.0,
        marks=frozenset({"on_input"}),
        needs=Needs.MULTIPLICATION,
    ),
    Family(
        name="ia3",
        suffixes={"vector": r"\.ia3_l(?:\.[^.]+)?"},
        required=(frozenset({"vector"}),),
        check=_check_peft,
        shape=lambda infos: (),
        rank=lambda infos: math.prod(infos["vector"].shape),
        width=lambda infos: math.prod(infos["vector"].shape),
        delta=_delta_peft,
        scale=lambda infos, alpha, config_scale: 1.0,
        needs=Needs.MULTIPLICATION,
    ),
)
