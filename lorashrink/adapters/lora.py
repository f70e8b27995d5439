"""LoRA and LoCon: ΔW = scale · up · down, for linear layers and convolutions, with or without a Tucker core.

Sources: LoRA (https://arxiv.org/abs/2106.09685); LoCon and its Tucker form (LyCORIS,
https://arxiv.org/abs/2309.14859).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

from lorashrink.adapters.family import Family, Infos

if TYPE_CHECKING:
    from torch import Tensor

    from lorashrink.delta import Delta


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
    if 0 in (*up, *down):
        return f"the factors {list(up)} and {list(down)} are empty"
    return None


def _shape(infos: Infos) -> tuple[int, ...]:
    kernel = infos["mid"].shape[2:] if "mid" in infos else infos["down"].shape[2:]
    return (infos["up"].shape[0], infos["down"].shape[1], *kernel)


def _rank(infos: Infos) -> int:
    return infos["down"].shape[0]


def _delta(tensors: Mapping[str, Tensor], scale: float, shape: tuple[int, ...]) -> Delta:
    import torch

    from lorashrink.delta import Delta

    up, down = tensors["up"].flatten(1), tensors["down"].flatten(1)
    if "mid" in tensors:
        # double, because products of half precision numbers would be rounded once more
        down = torch.einsum("abk,bi->aik", tensors["mid"].double().flatten(2), down.double()).flatten(1)
    return Delta(up, down, scale, shape)


def _written(infos: Infos, rank: int) -> Mapping[str, tuple[int, ...]]:
    out, *fan_in = _shape(infos)
    shapes = {
        "up": (out, rank, *infos["up"].shape[2:]),
        "down": (rank, *fan_in),
    }
    if "alpha" in infos:
        shapes["alpha"] = infos["alpha"].shape
    return shapes


def _family(up: str, down: str, mid: str | None = None, *, name: str = "lora") -> Family:
    suffixes = {"up": up, "down": down}
    if mid:
        suffixes["mid"] = mid
    return Family(name, suffixes, frozenset({"up", "down"}), _check, _shape, _rank, _delta, _written)


FAMILIES = (
    _family(r"\.lora_up\.weight", r"\.lora_down\.weight", r"\.lora_mid\.weight"),  # kohya, LyCORIS
    _family(r"\.lora_B(?:\.[^.]+)?\.weight", r"\.lora_A(?:\.[^.]+)?\.weight"),  # PEFT, diffusers
    _family(r"\.lora\.up\.weight", r"\.lora\.down\.weight"),  # diffusers, 2023
    _family(r"_lora\.up\.weight", r"_lora\.down\.weight"),  # diffusers attention processors
    _family(r"\.lora_linear_layer\.up\.weight", r"\.lora_linear_layer\.down\.weight"),  # the same, text encoder
)
