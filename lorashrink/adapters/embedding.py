"""LoRA of an embedding as PEFT stores it: ΔW = scale · (B·A)ᵀ of the table [vocab, dim].

A [r, vocab], B [dim, r]. Source: LoRA (https://arxiv.org/abs/2106.09685).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from lorashrink.adapters.family import Family, Infos, Shape, Stored

if TYPE_CHECKING:
    from torch import Tensor

    from lorashrink.engine.delta import Delta


def check(infos: Infos) -> str | None:
    """Two matrices of one rank."""
    a, b = infos["A"].shape, infos["B"].shape
    if len(a) != 2 or len(b) != 2:
        return f"the factors {list(a)} and {list(b)} are no matrices"
    if a[0] != b[1]:
        return f"A is {list(a)}, B is {list(b)}; their ranks differ"
    return f"the factors {list(a)} and {list(b)} are empty" if 0 in (*a, *b) else None


def delta(stored: Stored) -> Delta:
    """ΔW of the table, so that both factors are transposed."""
    from lorashrink.engine.delta import Delta

    return Delta(stored.tensors["A"].mT, stored.tensors["B"].mT, stored.scale, stored.shape)


def written(infos: Infos, rank: int) -> Mapping[str, Shape]:
    """Shapes of the tensors of another rank."""
    shapes: dict[str, Shape] = {"A": (rank, infos["A"].shape[1]), "B": (infos["B"].shape[0], rank)}
    return shapes | ({"alpha": infos["alpha"].shape} if "alpha" in infos else {})


def pack(up: Tensor, down: Tensor) -> Mapping[str, Tensor]:
    """A [r, vocab] and B [dim, r] of ΔW's factors up [vocab, r] and down [r, dim]."""
    return {"A": up.mT.contiguous(), "B": down.mT.contiguous()}


FAMILIES = (
    Family(
        name="embedding",
        suffixes={"A": r"\.lora_embedding_A(?:\.[^.]+)*", "B": r"\.lora_embedding_B(?:\.[^.]+)*"},
        required=(frozenset({"A", "B"}),),
        check=check,
        shape=lambda infos: (infos["A"].shape[1], infos["B"].shape[0]),
        rank=lambda infos: infos["A"].shape[0],
        delta=delta,
        written=written,
        pack=pack,
    ),
)
