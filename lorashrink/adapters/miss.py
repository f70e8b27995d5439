"""MiSS: ΔW[o, i] = B[i mod r, o], a matrix B [r, out] that repeats along the inputs.

So ΔW = Bᵀ · [I I ...], of rank r. With `init_weights` "mini" B is [r, mini_r] and repeats along the outputs too. With
"bat" it is [out / r, r, r] and multiplies the base weight. Source: https://arxiv.org/abs/2409.15371, as PEFT stores it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from lorashrink.adapters.family import Family, Infos, Needs, Stored, unscaled
from lorashrink.errors import ShapeError

if TYPE_CHECKING:
    from lorashrink.engine.delta import Delta


def check(infos: Infos) -> str | None:
    """Why the block is no matrix, None if it is one."""
    block = infos["block"].shape
    return None if len(block) == 2 and 0 not in block else f"miss_block {list(block)} is no matrix"


def carried(infos: Infos, config: Mapping[str, Any]) -> str | None:
    """Why the layer is copied: "bat" has blocks of three dimensions, and an unknown variant may multiply, too."""
    if len(infos["block"].shape) == 3:
        return "MiSS by `bat`, which multiplies the base weight"
    if config.get("init_weights") not in (None, True, False, "mini"):
        return "MiSS whose init_weights is not true, false or mini; then it may multiply the base weight"
    return None


def delta(stored: Stored) -> Delta:
    """ΔW of rank r. Raises ShapeError if the base weight has other rows, or too few columns."""
    import torch

    from lorashrink.engine.delta import Delta

    block = stored.tensors["block"].float()
    rank, rows = block.shape
    out, columns = stored.shape if len(stored.shape) == 2 else (0, 0)
    times = out // rows if stored.config.get("init_weights") == "mini" else 1
    if times * rows != out or not rank <= columns:
        raise ShapeError(f"A block of {rank} by {rows} does not fit a weight of {list(stored.shape)}.")
    down = torch.eye(rank).repeat(1, -(-columns // rank))[:, :columns]
    return Delta(block.T.repeat(times, 1), down, stored.scale, stored.shape)


FAMILIES = (
    Family(
        name="miss",
        suffixes={"block": r"\.miss_block(?:\.[^.]+)?"},
        required=(frozenset({"block"}),),
        check=check,
        shape=lambda infos: (),  # a block of "mini" does not tell the rows either
        rank=lambda infos: infos["block"].shape[0],
        delta=delta,
        own_scale=unscaled,
        carried=carried,
        needs=Needs.SHAPE,
        needs_settings=lambda config, shape: config.get("init_weights") == "mini",
    ),
)
