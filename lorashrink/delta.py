"""What one adapter layer adds to one weight of the base: as two factors, as a matrix, or as a Kronecker product."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
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


@dataclass(frozen=True, eq=False, slots=True)
class Dense:
    """ΔW = scale · matrix, reshaped to `shape`, of a layer that is not of low rank.

    matrix [out, in·kh·kw], any float dtype.
    """

    matrix: Tensor
    scale: float
    shape: tuple[int, ...]

    @property
    def rank(self) -> int:
        """The shorter side of the matrix."""
        return min(self.matrix.shape)

    def dense(self) -> Tensor:
        """ΔW itself, float32, in `shape`."""
        return (self.scale * self.matrix.double()).float().reshape(self.shape)


@dataclass(frozen=True, eq=False, slots=True)
class Kronecker:
    """ΔW = first ⊗ second, both as matrices, reshaped to `shape`.

    first [n1, m1], second [n2, m2·kh·kw]; shape [n1·n2, m1·m2, kh, kw, ...].
    """

    first: Dense
    second: Delta | Dense
    shape: tuple[int, ...]

    @property
    def rank(self) -> int:
        """The product of the factors' ranks."""
        return self.first.rank * self.second.rank

    def dense(self) -> Tensor:
        """ΔW itself, float32, in `shape`."""
        matrices = [part.dense().flatten(1).double() for part in (self.first, self.second)]
        return torch.kron(*matrices).float().reshape(self.shape)


AnyDelta = Delta | Dense | Kronecker


def factored(delta: AnyDelta) -> Delta:
    """ΔW as two factors, whatever its form; of a matrix the factor on its shorter side is the identity."""
    if isinstance(delta, Delta):
        return delta
    dense = delta if isinstance(delta, Dense) else Dense(delta.dense().flatten(1), 1.0, delta.shape)
    matrix = dense.matrix if dense.matrix.element_size() > 2 else dense.matrix.float()
    eye = torch.eye(dense.rank, dtype=matrix.dtype)
    wide = matrix.shape[0] <= matrix.shape[1]
    return Delta(eye if wide else matrix, matrix if wide else eye, dense.scale, dense.shape)


def fan_in(shape: tuple[int, ...]) -> int:
    """in·kh·kw of a weight of this shape: the length of one row of its matrix."""
    return math.prod(shape[1:])
