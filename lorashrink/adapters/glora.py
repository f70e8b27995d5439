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

from lorashrink.adapters.factors import fold
from lorashrink.adapters.family import Family, Infos, Needs, Shape, Stored

if TYPE_CHECKING:
    from torch import Tensor

    from lorashrink.engine.delta import Delta


class Order(NamedTuple):
    """The roles in the order in which they are multiplied."""

    a_up: str  # [in, r]
    a_down: str  # [r, in]
    b_up: str  # [out, r]
    b_down: str  # [r, in, kh, kw]


NEW = Order("a1", "a2", "b1", "b2")
OLD = Order("a2", "a1", "b2", "b1")


def _fits(shapes: Mapping[str, Shape], order: Order) -> bool:
    a_up, a_down, b_up, b_down = (shapes[role] for role in order)
    return (
        a_up[:2] == a_down[1::-1]
        and b_up[1] == b_down[0] == a_up[1]
        and b_down[1] == a_up[0]
        and all(math.prod(shape[2:]) == 1 for shape in (a_up, a_down, b_up))
    )


def _order(shapes: Mapping[str, Shape]) -> Order | None:
    """The order that the shapes allow; None if they allow none, or both."""
    fitting = [order for order in (NEW, OLD) if _fits(shapes, order)]
    if len(fitting) == 2:
        # of a square layer: the shorter side is the rank, for a longer one would save nothing
        fitting = [order for order in fitting if shapes[order.a_up][1] < shapes[order.a_up][0]]
    return fitting[0] if len(fitting) == 1 else None


def _shapes(tensors: Infos | Mapping[str, Tensor]) -> dict[str, Shape]:
    return {role: tuple(tensors[role].shape) for role in NEW}


def order_of(tensors: Infos | Mapping[str, Tensor]) -> Order:
    """The order of a layer that has passed the check."""
    order = _order(_shapes(tensors))
    assert order is not None, "ruled out by the check"
    return order


def check(infos: Infos) -> str | None:
    """Four matrices that chain in one of the two orders, and a core that fits the second pair."""
    shapes = _shapes(infos)
    listed = ", ".join(f"{role} {list(shape)}" for role, shape in shapes.items())
    if min(map(len, shapes.values())) < 2:
        return f"of {listed} not all are matrices"
    if any(0 in shape for shape in shapes.values()):
        return f"of {listed} some are empty"
    order = _order(shapes)
    if order is None and _fits(shapes, NEW):
        return f"the shapes {listed} do not tell which of the factors come first"
    if order is None:
        return f"{listed} do not chain"
    if "bm" not in infos:
        return None
    core, down = infos["bm"].shape, shapes[order.b_down]
    if len(core) < 3 or core[:2] != (down[0], down[0]) or math.prod(down[2:]) != 1:
        return f"bm is {list(core)}, {order.b_down} is {list(down)}; they do not chain"
    return f"bm {list(core)} is empty" if 0 in core else None


def weight_shape(infos: Infos) -> Shape:
    """Shape of the base weight, [out, in, kh, kw]."""
    order = order_of(infos)
    down = infos[order.b_down].shape
    kernel = infos["bm"].shape[2:] if "bm" in infos else down[2:]
    return (infos[order.b_up].shape[0], down[1], *kernel)


def rank(infos: Infos) -> int:
    """Rank of each of the two products."""
    return infos[order_of(infos).b_down].shape[0]


def delta(stored: Stored) -> Delta:
    """ΔW of rank r + r·kh·kw: each position of the kernel has its own columns of W·a1."""
    import torch

    from lorashrink.engine.delta import Delta

    weight = stored.base_weight
    a_up, a_down, b_up, b_down = (stored.tensors[role].flatten(1) for role in order_of(stored.tensors))
    a_up, a_down, b_up = a_up.float(), a_down.float(), b_up.float()
    b_down = fold(stored.tensors["bm"], b_down) if "bm" in stored.tensors else b_down
    positions = weight.shape[1] // a_up.shape[0]
    moved = torch.einsum("nik,ir->nrk", weight.reshape(len(weight), -1, positions), a_up).flatten(1)
    spread = torch.kron(a_down, torch.eye(positions))
    return Delta(torch.cat([b_up, moved], dim=1), torch.cat([b_down.float(), spread]), stored.scale, stored.shape)


FAMILIES = (
    Family(
        name="glora",
        suffixes={role: rf"\.{role}\.weight" for role in ("a1", "a2", "b1", "b2", "bm")},
        required=(frozenset({"a1", "a2", "b1", "b2"}),),
        check=check,
        shape=weight_shape,
        rank=rank,
        delta=delta,
        delta_rank=lambda infos: rank(infos) * (1 + math.prod(weight_shape(infos)[2:])),
        marks=frozenset({"a1", "a2"}),
        needs=Needs.ADDITION,
    ),
)
