"""LyCORIS' pairs of factors: a · b, or a Tucker core between both."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, NamedTuple

from lorashrink.adapters.family import Infos, Shape

if TYPE_CHECKING:
    from torch import Tensor


class Factors(NamedTuple):
    """The roles of the tensors that make one matrix, or the kernel of a convolution.

    a [n, r] · b [r, m, kh, kw]; with a core [r, r, kh, kw] both have the rank first, a [r, n] and b [r, m].
    """

    a: str
    b: str
    core: str = ""  # "" if the family has none here

    def problem(self, infos: Infos, *, kernel: bool = True) -> str | None:
        """What does not fit, if anything; `kernel` allows b to have more than two dimensions."""
        a, b = infos[self.a].shape, infos[self.b].shape
        if len(a) != 2 or len(b) < 2 or (len(b) > 2 and not kernel):
            return f"{self.a} {list(a)} and {self.b} {list(b)} are no matrices"
        if self.core not in infos:
            return None if a[1] == b[0] else f"{self.a} is {list(a)}, {self.b} is {list(b)}; their ranks differ"
        core = infos[self.core].shape
        if len(core) < 3 or len(b) != 2 or core[:2] != (a[0], b[0]):
            return f"{self.a} is {list(a)}, {self.core} is {list(core)}, {self.b} is {list(b)}; they do not chain"
        return None

    def shape(self, infos: Infos) -> Shape:
        """Shape of the product: [n, m, kh, kw], or [n, m·kh·kw] where b is stored flat."""
        a, b = infos[self.a].shape, infos[self.b].shape
        return (a[1], b[1], *infos[self.core].shape[2:]) if self.core in infos else (a[0], *b[1:])

    def read(self, tensors: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """up [n, r] and down [r, m·kh·kw] as stored, with the core multiplied into down."""
        up, down = tensors[self.a], tensors[self.b].flatten(1)
        return (up.mT, fold(tensors[self.core], down)) if self.core in tensors else (up, down)


def fold(core: Tensor, down: Tensor) -> Tensor:
    """Multiply a Tucker core [r, r, kh, kw] with the factor [r, in] behind it: [r, in·kh·kw] float64."""
    import torch

    # double, because products of half precision numbers would be rounded once more
    return torch.einsum("abk,bi->aik", core.double().flatten(2), down.double()).flatten(1)
