"""The row of the adapter table: what one family of layers looks like in a file, and what it adds."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lorashrink.files import TensorInfo

if TYPE_CHECKING:
    from torch import Tensor

    from lorashrink.delta import Delta

# Roles that any family may have beside its own. DoRA's magnitude multiplies the direction of W + ΔW
# (https://arxiv.org/abs/2402.09353); it stays what it is when ΔW shrinks.
SHARED = {
    "alpha": r"\.alpha",
    "magnitude": r"\.dora_scale|\.lora_magnitude_vector(?:\.[^.]+)*",
}

# role ("up", "down", ...) -> what the header says of the tensor that plays it
Infos = Mapping[str, TensorInfo]


@dataclass(frozen=True, slots=True)
class Family:
    """One way to write a layer.

    `suffixes` maps each role to a regular expression for the end of its tensor's name; `required`
    are the roles that make the family. Roles of `SHARED` may come on top.
    """

    name: str
    suffixes: Mapping[str, str]
    required: frozenset[str]
    check: Callable[[Infos], str | None]  # what is wrong with the shapes, if anything
    shape: Callable[[Infos], tuple[int, ...]]  # of the base weight
    rank: Callable[[Infos], int]
    delta: Callable[[Mapping[str, Tensor], float, tuple[int, ...]], Delta]
    # role -> shape when the layer is written with another rank; roles left out are folded away
    written: Callable[[Infos, int], Mapping[str, tuple[int, ...]]]
