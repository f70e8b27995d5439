"""Experts of a mixture whose weights are one parameter: LoRA by PEFT's `target_parameters`.

A [e·r, in] holds the rows of one expert after another. B [out, r·e] holds the first column of every expert, then the
second, and so on. ΔW of an expert is scale · B_e · A_e, or its transpose where the model stores weights so, which makes
no difference here. The rank r is in the settings alone. It is the same for all experts; a module with several
parameters has one rank for all of them here, because names do not tell which factors belong to which parameter.
Source: `ParamWrapper` in peft/tuners/lora/layer.py.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import TYPE_CHECKING

from lorashrink.adapters.family import Family, Infos, Stored
from lorashrink.adapters.lora import PEFT

if TYPE_CHECKING:
    from torch import Tensor

    from lorashrink.engine.delta import Experts


@cache
def of_experts(count: int) -> Family:
    """The family of layers of so many experts."""

    def check(infos: Infos) -> str | None:
        up, down = infos["up"].shape, infos["down"].shape
        if len(up) != 2 or len(down) != 2 or up[1] != down[0] or 0 in (*up, *down):
            return f"up is {list(up)}, down is {list(down)}; they are no factors of {count} experts"
        return None

    def delta(stored: Stored) -> Experts:
        from lorashrink.engine.delta import Experts

        up, down = stored.tensors["up"], stored.tensors["down"]
        up = up.reshape(len(up), -1, count).permute(2, 0, 1)  # [e, out, r]
        down = down.reshape(count, -1, down.shape[1])  # [e, r, in]
        return Experts(up, down, stored.scale, stored.shape)

    def pack(up: Tensor, down: Tensor) -> dict[str, Tensor]:
        return {"up": up.reshape(len(up), count, -1).transpose(1, 2).flatten(1), "down": down}

    return replace(
        PEFT,
        name="experts",
        suffixes={role: suffix for role, suffix in PEFT.suffixes.items() if role != "bias"},
        check=check,
        shape=lambda infos: (count * infos["up"].shape[0], infos["down"].shape[1]),
        rank=lambda infos: infos["down"].shape[0] // count,
        delta=delta,
        carried=lambda infos, config: None,
        experts=count,
        written=lambda infos, rank: {
            "up": (infos["up"].shape[0], rank * count),
            "down": (rank * count, infos["down"].shape[1]),
        },
        pack=pack,
    )
