"""LoRA and LoCon: ΔW = scale · up · down, for linear layers and convolutions, with or without a Tucker core.

Sources: LoRA (https://arxiv.org/abs/2106.09685); LoCon and its Tucker form (LyCORIS,
https://arxiv.org/abs/2309.14859).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

from lorashrink.adapters.family import Family, Infos, Shape, Stored

if TYPE_CHECKING:
    from torch import Tensor

    from lorashrink.engine.delta import Delta


def _check(infos: Infos) -> str | None:
    up, down = infos["up"].shape, infos["down"].shape
    if len(up) < 2 or len(down) < 2:
        return f"the factors {list(up)} and {list(down)} are no matrices"
    if up[1] != down[0]:
        return f"up is {list(up)}, down is {list(down)}; their ranks differ"
    if math.prod(up[2:]) != 1:
        return f"up is {list(up)}; its kernel should be 1×1"
    if "mid" in infos:
        mid = infos["mid"].shape
        if mid[:2] != (up[1], down[0]) or math.prod(down[2:]) != 1:
            return f"up is {list(up)}, mid is {list(mid)}, down is {list(down)}; they do not chain"
    if "bias" in infos and infos["bias"].shape != up[:1]:
        return f"up is {list(up)}, its bias is {list(infos['bias'].shape)}"
    if 0 in (*up, *down):
        return f"the factors {list(up)} and {list(down)} are empty"
    return None


def _shape(infos: Infos) -> Shape:
    kernel = infos["mid"].shape[2:] if "mid" in infos else infos["down"].shape[2:]
    return (infos["up"].shape[0], infos["down"].shape[1], *kernel)


def _rank(infos: Infos) -> int:
    return infos["down"].shape[0]


def fold(core: Tensor, down: Tensor) -> Tensor:
    """[r, in·kh·kw] float64 of a Tucker core [r, r, kh, kw] and the factor [r, in] behind it."""
    import torch

    # double, because products of half precision numbers would be rounded once more
    return torch.einsum("abk,bi->aik", core.double().flatten(2), down.double()).flatten(1)


def _delta(stored: Stored) -> Delta:
    from lorashrink.engine.delta import Delta

    tensors = stored.tensors
    up, down = tensors["up"].flatten(1), tensors["down"].flatten(1)
    if "mid" in tensors:
        down = fold(tensors["mid"], down)
    return Delta(up, down, stored.scale, stored.shape)


def _written(infos: Infos, rank: int) -> Mapping[str, Shape]:
    out, *fan_in = _shape(infos)
    shapes = {
        "up": (out, rank, *infos["up"].shape[2:]),
        "down": (rank, *fan_in),
    }
    if "alpha" in infos:
        shapes["alpha"] = infos["alpha"].shape
    return shapes


def _family(up: str, down: str, **more: str) -> Family:
    return Family(
        name="lora",
        suffixes={"up": up, "down": down, **more},
        required=(frozenset({"up", "down"}),),
        check=_check,
        shape=_shape,
        rank=_rank,
        width=_rank,
        delta=_delta,
        written=_written,
    )


KOHYA = _family(r"\.lora_up\.weight", r"\.lora_down\.weight", mid=r"\.lora_mid\.weight")  # and LyCORIS
PEFT = _family(
    r"\.lora_B(?:\.[^.]+)?\.weight", r"\.lora_A(?:\.[^.]+)?\.weight", bias=r"\.lora_B(?:\.[^.]+)?\.bias"
)  # and diffusers; the bias is that of PEFT's `lora_bias` and of control LoRAs
FAMILIES = (
    KOHYA,
    PEFT,
    _family(r"\.lora\.up\.weight", r"\.lora\.down\.weight"),  # diffusers, 2023
    _family(r"_lora\.up\.weight", r"_lora\.down\.weight"),  # diffusers attention processors, X-Labs single blocks
    _family(r"\.(?<=_lora[12]\.)up\.weight", r"\.(?<=_lora[12]\.)down\.weight"),  # X-Labs double blocks
    _family(r"\.lora_linear_layer\.up\.weight", r"\.lora_linear_layer\.down\.weight"),  # diffusers, text encoder
    _family(r"\.lora_B", r"\.lora_A"),  # Mochi
)
