"""AdaLoRA: ΔW = scale · B · diag(E) · A, with A [r, in·kh·kw], B [out, r] and E [r, 1].

Source: https://arxiv.org/abs/2303.10512, as PEFT stores it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from lorashrink.adapters.family import Family, Infos, Stored

if TYPE_CHECKING:
    from lorashrink.engine.delta import Delta


def check(infos: Infos) -> str | None:
    """Two matrices and a diagonal of one rank."""
    up, down, diagonal = (infos[role].shape for role in ("up", "down", "diagonal"))
    if len(up) != 2 or len(down) != 2:
        return f"the factors {list(up)} and {list(down)} are no matrices"
    if up[1] != down[0]:
        return f"lora_B is {list(up)}, lora_A is {list(down)}; their ranks differ"
    if diagonal not in ((down[0], 1), (down[0],)):
        return f"lora_E is {list(diagonal)} for the rank {down[0]}"
    return f"the factors {list(up)} and {list(down)} are empty" if 0 in (*up, *down) else None


def delta(stored: Stored) -> Delta:
    """ΔW of rank r, with the diagonal multiplied into B."""
    from lorashrink.engine.delta import Delta

    tensors = stored.tensors
    up = tensors["up"].float() * tensors["diagonal"].float().flatten()
    return Delta(up, tensors["down"], stored.scale, stored.shape)


FAMILIES = (
    Family(
        name="adalora",
        suffixes={"up": r"\.lora_B", "down": r"\.lora_A", "diagonal": r"\.lora_E"},
        required=(frozenset({"up", "down", "diagonal"}),),
        check=check,
        shape=lambda infos: (infos["up"].shape[0], infos["down"].shape[1]),
        rank=lambda infos: infos["down"].shape[0],
        delta=delta,
        marks=frozenset({"diagonal"}),
        flat=lambda infos: True,  # the kernel of a convolution is flattened into lora_A
    ),
)
