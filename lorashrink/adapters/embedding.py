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


def _check(infos: Infos) -> str | None:
    a, b = infos["A"].shape, infos["B"].shape
    if len(a) != 2 or len(b) != 2:
        return f"the factors {list(a)} and {list(b)} are no matrices"
    if a[0] != b[1]:
        return f"A is {list(a)}, B is {list(b)}; their ranks differ"
    return f"the factors {list(a)} and {list(b)} are empty" if 0 in (*a, *b) else None


def _shape(infos: Infos) -> Shape:
    return (infos["A"].shape[1], infos["B"].shape[0])


def _rank(infos: Infos) -> int:
    return infos["A"].shape[0]


def _scale(infos: Infos, alpha: float | None, config_scale: float) -> float:
    return config_scale if alpha is None else alpha / _rank(infos)


def _delta(stored: Stored) -> Delta:
    from lorashrink.engine.delta import Delta

    return Delta(stored.tensors["A"].mT, stored.tensors["B"].mT, stored.scale, stored.shape)


def _written(infos: Infos, rank: int) -> Mapping[str, Shape]:
    vocab, dim = _shape(infos)
    shapes: dict[str, Shape] = {"A": (rank, vocab), "B": (dim, rank)}
    if "alpha" in infos:
        shapes["alpha"] = infos["alpha"].shape
    return shapes


def _pack(up: Tensor, down: Tensor) -> Mapping[str, Tensor]:
    return {"A": up.mT.contiguous(), "B": down.mT.contiguous()}


FAMILIES = (
    Family(
        name="embedding",
        suffixes={"A": r"\.lora_embedding_A(?:\.[^.]+)*", "B": r"\.lora_embedding_B(?:\.[^.]+)*"},
        required=(frozenset({"A", "B"}),),
        check=_check,
        shape=_shape,
        rank=_rank,
        width=_rank,
        delta=_delta,
        scale=_scale,
        written=_written,
        pack=_pack,
    ),
)
