"""LoRA and LoCon: ΔW = scale · up · down, for linear layers and convolutions, with or without a Tucker core.

Sources: LoRA (https://arxiv.org/abs/2106.09685); LoCon and its Tucker form (LyCORIS,
https://arxiv.org/abs/2309.14859).
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from lorashrink.adapters.factors import fold
from lorashrink.adapters.family import Carried, Family, Infos, Shape, Stored
from lorashrink.files.store import TensorInfo

if TYPE_CHECKING:
    from lorashrink.adapters.layer import Layer
    from lorashrink.engine.delta import Delta


def check(infos: Infos) -> str | None:
    """up [out, r, 1, 1] and down [r, in, kh, kw], or [r, in, 1, 1] behind a core mid [r, r, kh, kw]; a bias [out]."""
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
    return f"the factors {list(up)} and {list(down)} are empty" if 0 in (*up, *down) else None


def in_blocks(infos: Infos, config: Mapping[str, Any]) -> str | None:
    """Why a layer as PEFT stores it is no ΔW = up · down: one of its factors is stored as a row of blocks.

    This is so in block-diagonal LoRA, and in grouped convolutions, where up is [out, r/groups, 1, 1]. Source: `lora_B`
    of peft/tuners/lora/layer.py has the groups of the convolution that it belongs to.
    """
    if config.get("use_bdlora"):
        return "block-diagonal LoRA (use_bdlora), one of whose factors is stored as a row of blocks"
    if not infos.keys() >= {"up", "down"}:
        return None
    up, down = infos["up"].shape, infos["down"].shape
    if min(len(up), len(down)) < 3 or not up[1] or up[1] >= down[0] or down[0] % up[1]:
        return None
    groups = down[0] // up[1]
    return None if up[0] % groups else f"LoRA of a convolution in {groups} groups, whose up · down is no one matrix"


def weight_shape(infos: Infos) -> Shape:
    """Shape of the base weight, [out, in, kh, kw]."""
    kernel = infos["mid" if "mid" in infos else "down"].shape[2:]
    return (infos["up"].shape[0], infos["down"].shape[1], *kernel)


def delta(stored: Stored) -> Delta:
    """ΔW of rank r, with a core multiplied into down."""
    from lorashrink.engine.delta import Delta

    tensors = stored.tensors
    up, down = tensors["up"].flatten(1), tensors["down"].flatten(1)
    if "mid" in tensors:
        down = fold(tensors["mid"], down)
    return Delta(up, down, stored.scale, stored.shape)


def written(infos: Infos, rank: int) -> Mapping[str, Shape]:
    """Shapes of the tensors of another rank; a core is multiplied into down."""
    out, *fan_in = weight_shape(infos)
    shapes = {"up": (out, rank, *infos["up"].shape[2:]), "down": (rank, *fan_in)}
    return shapes | ({"alpha": infos["alpha"].shape} if "alpha" in infos else {})


def spelled(up: str, down: str, *, carried: Carried = lambda infos, config: None, **more: str) -> Family:
    """LoRA whose tensors' names end so; `carried` is that of `Family`."""
    return Family(
        name="lora",
        suffixes={"up": up, "down": down, **more},
        required=(frozenset({"up", "down"}),),
        check=check,
        shape=weight_shape,
        rank=lambda infos: infos["down"].shape[0],
        delta=delta,
        carried=carried,
        written=written,
    )


KOHYA = spelled(r"\.lora_up\.weight", r"\.lora_down\.weight", mid=r"\.lora_mid\.weight")  # and LyCORIS
PEFT = spelled(
    r"\.lora_B(?:\.[^.]+)?\.weight",
    r"\.lora_A(?:\.[^.]+)?\.weight",
    bias=r"\.lora_B(?:\.[^.]+)?\.bias",
    carried=in_blocks,
)  # and diffusers; the bias is that of PEFT's `lora_bias` and of control LoRAs
FAMILIES = (
    KOHYA,
    PEFT,
    spelled(r"\.lora\.up\.weight", r"\.lora\.down\.weight"),  # diffusers, 2023
    spelled(r"_lora\.up\.weight", r"_lora\.down\.weight"),  # diffusers attention processors, X-Labs single blocks
    spelled(r"\.(?<=_lora[12]\.)up\.weight", r"\.(?<=_lora[12]\.)down\.weight"),  # X-Labs double blocks
    spelled(r"\.lora_linear_layer\.up\.weight", r"\.lora_linear_layer\.down\.weight"),  # diffusers, text encoder
    spelled(r"\.lora_B", r"\.lora_A"),  # Mochi
)


def lora_form(layer: Layer) -> tuple[str, Family, Mapping[str, str], Infos]:
    """(name, family, role -> key, role -> info with rank 1) of this layer as LoRA, in the spelling of its name.

    Names with dots are diffusers', ComfyUI's and PEFT's, whose factors have no alpha; flattened ones are kohya's.
    """
    out, *fan_in = layer.shape
    name = re.sub("^oft_unet_", "lora_unet_", layer.name)  # a prefix that no loader of LoRA knows
    infos = {
        "up": TensorInfo("F16", (out, 1, *[1] * (len(fan_in) - 1)), 0),
        "down": TensorInfo("F16", (1, *fan_in), 0),
    }
    if "." in name:
        return name, PEFT, {"up": f"{name}.lora_B.weight", "down": f"{name}.lora_A.weight"}, infos
    keys = {"up": f"{name}.lora_up.weight", "down": f"{name}.lora_down.weight", "alpha": f"{name}.alpha"}
    return name, KOHYA, keys, {**infos, "alpha": TensorInfo("F32", (), 4)}
