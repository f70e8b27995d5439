"""`Delta`: what one adapter layer adds to one weight of the base, in factored form."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, eq=False, slots=True)
class Delta:
    """ΔW = scale · up · down, reshaped to `shape`.

    up [out, r], down [r, in·kh·kw], any float dtype; shape [out, in] or [out, in, kh, kw, ...].
    """

    up: Tensor
    down: Tensor
    scale: float
    shape: tuple[int, ...]

    @property
    def rank(self) -> int:
        """Number of columns of `up`; the mathematical rank may be lower."""
        return self.up.shape[1]

    def dense(self) -> Tensor:
        """ΔW itself, float32, in `shape`. For looking at and for tests; the engine never needs it."""
        return (self.scale * (self.up.double() @ self.down.double())).float().reshape(self.shape)


def fan_in(shape: tuple[int, ...]) -> int:
    """in·kh·kw of a weight of this shape: the length of one row of its matrix."""
    return math.prod(shape[1:])
