"""GLoRA: ΔW = scale · (b1·b2 + W·a1·a2), where the second part is made of the base weight W.

a1 [in, r], a2 [r, in], b1 [out, r], b2 [r, in, kh, kw], or b2 [r, in, 1, 1] behind a Tucker core bm [r, r, kh, kw].
The products with a1 and a2 act on the input channels of a convolution. Older LyCORIS called the same matrices
a2, a1, b2 and b1; the shapes tell. Sources: https://arxiv.org/abs/2306.07967; LyCORIS
(https://arxiv.org/abs/2309.14859).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, NamedTuple

from lorashrink.adapters.family import Family, Infos, Needs, Shape, Stored
from lorashrink.adapters.lora import fold

if TYPE_CHECKING:
    from torch import Tensor

    from lorashrink.engine.delta import Delta


class _Factors(NamedTuple):
    """The roles in the order in which they are multiplied."""

    a_up: str  # [in, r]
    a_down: str  # [r, in]
    b_up: str  # [out, r]
    b_down: str  # [r, in, kh, kw]


_NEW = _Factors("a1", "a2", "b1", "b2")
_OLD = _Factors("a2", "a1", "b2", "b1")


def _fits(shapes: Mapping[str, Shape], order: _Factors) -> bool:
    a_up, a_down, b_up, b_down = (shapes[role] for role in order)
    return (
        a_up[:2] == a_down[1::-1]
        and b_up[1] == b_down[0] == a_up[1]
        and b_down[1] == a_up[0]
        and all(math.prod(shape[2:]) == 1 for shape in (a_up, a_down, b_up))
    )


def _order(shapes: Mapping[str, Shape]) -> _Factors | None:
    """The order that the shapes allow; None if they allow none, or both."""
    fitting = [order for order in (_NEW, _OLD) if _fits(shapes, order)]
    if len(fitting) == 2:
        # of a square layer: the shorter side is the rank, for a longer one would save nothing
        fitting = [order for order in fitting if shapes[order.a_up][1] < shapes[order.a_up][0]]
    return fitting[0] if len(fitting) == 1 else None


def _shapes(tensors: Infos | Mapping[str, Tensor]) -> dict[str, Shape]:
    return {role: tuple(tensors[role].shape) for role in _NEW}


def _check(infos: Infos) -> str | None:
    shapes = _shapes(infos)
    told = ", ".join(f"{role} {list(shape)}" for role, shape in shapes.items())
    if min(map(len, shapes.values())) < 2:
        return f"of {told} not all are matrices"
    if any(0 in shape for shape in shapes.values()):
        return f"of {told} some are empty"
    order = _order(shapes)
    if order is None and _fits(shapes, _NEW):
        return f"the shapes {told} do not tell which of the factors come first"
    if order is None:
        return f"{told} do not chain"
    return _core_problem(infos, order) if "bm" in infos else None


def _core_problem(infos: Infos, order: _Factors) -> str | None:
    core, down = infos["bm"].shape, infos[order.b_down].shape
    if len(core) < 3 or core[:2] != (down[0], down[0]) or math.prod(down[2:]) != 1:
        return f"bm is {list(core)}, {order.b_down} is {list(down)}; they do not chain"
    return f"bm {list(core)} is empty" if 0 in core else None


def _known_order(tensors: Infos | Mapping[str, Tensor]) -> _Factors:
    order = _order(_shapes(tensors))
    assert order is not None, "ruled out by the check"
    return order


def _shape(infos: Infos) -> Shape:
    order = _known_order(infos)
    inner = infos[order.b_down].shape
    kernel = infos["bm"].shape[2:] if "bm" in infos else inner[2:]
    return (infos[order.b_up].shape[0], inner[1], *kernel)


def _rank(infos: Infos) -> int:
    return infos[_known_order(infos).b_down].shape[0]


def _width(infos: Infos) -> int:
    return _rank(infos) * (1 + math.prod(_shape(infos)[2:]))


def _scale(infos: Infos, alpha: float | None, config_scale: float) -> float:
    return config_scale if alpha is None else alpha / _rank(infos)


def _delta(stored: Stored) -> Delta:
    """Of rank r + r·kh·kw: each position of the kernel has its own columns of W·a1."""
    import torch

    from lorashrink.engine.delta import Delta

    weight = stored.weight
    assert weight is not None, "Family.needs asks for it"
    a_up, a_down, b_up, b_down = (stored.tensors[role] for role in _known_order(stored.tensors))
    a_up, a_down, b_up = (factor.flatten(1).float() for factor in (a_up, a_down, b_up))
    b_down = fold(stored.tensors["bm"], b_down.flatten(1)) if "bm" in stored.tensors else b_down.flatten(1)
    positions = weight.shape[1] // a_up.shape[0]
    moved = torch.einsum("nik,ir->nrk", weight.reshape(len(weight), -1, positions), a_up).flatten(1)
    spread = torch.kron(a_down, torch.eye(positions))
    return Delta(torch.cat([b_up, moved], dim=1), torch.cat([b_down.float(), spread]), stored.scale, stored.shape)


FAMILIES = (
    Family(
        name="glora",
        suffixes={role: rf"\.{role}\.weight" for role in ("a1", "a2", "b1", "b2", "bm")},
        required=(frozenset({"a1", "a2", "b1", "b2"}),),
        check=_check,
        shape=_shape,
        rank=_rank,
        width=_width,
        delta=_delta,
        scale=_scale,
        marks=frozenset({"a1", "a2"}),
        needs=Needs.ADDITION,
    ),
)
