"""LoRA as mlx-lm and torchtune name it: `lora_a` and `lora_b`.

- mlx-lm: lora_a [in, r], lora_b [r, out] without `.weight`, and ΔW = scale · (lora_a·lora_b)ᵀ. The scale stands in the
  `adapter_config.json` beside the file.
- torchtune: lora_a.weight [r, in], lora_b.weight [out, r]. The file has no scale; ΔW is taken at scale 1.

Both are written in PEFT's spelling, with the scale inside of the factors.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from lorashrink.adapters import lora
from lorashrink.adapters.family import Family, Infos, Stored

if TYPE_CHECKING:
    from lorashrink.engine.delta import Delta


def check(infos: Infos) -> str | None:
    """Two matrices of one rank."""
    a, b = infos["a"].shape, infos["b"].shape
    if len(a) != 2 or len(b) != 2 or 0 in (*a, *b):
        return f"lora_a {list(a)} and lora_b {list(b)} are no matrices"
    return None if a[1] == b[0] else f"lora_a is {list(a)}, lora_b is {list(b)}; their ranks differ"


def delta(stored: Stored) -> Delta:
    """ΔW of rank r, both factors transposed."""
    from lorashrink.engine.delta import Delta

    return Delta(stored.tensors["b"].mT, stored.tensors["a"].mT, stored.scale, stored.shape)


MLX = Family(
    name="mlx",
    suffixes={"a": r"\.lora_a", "b": r"\.lora_b"},
    required=(frozenset({"a", "b"}),),
    check=check,
    shape=lambda infos: (infos["b"].shape[1], infos["a"].shape[0]),
    rank=lambda infos: infos["a"].shape[1],
    delta=delta,
    carried=lambda infos, config: "experts of mlx-lm" if len(infos["a"].shape) == len(infos["b"].shape) == 3 else None,
    becomes_lora=True,
)
TORCHTUNE = replace(
    lora.spelled(r"\.lora_b\.weight", r"\.lora_a\.weight"), name="torchtune", written=None, becomes_lora=True
)
FAMILIES = (MLX, TORCHTUNE)
