"""The change ΔW that an adapter makes to one weight, in factors, as a Kronecker product or as a matrix."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

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


# --- numbers ------------------------------------------------------------------------------------


def delta_tensors(delta: AnyDelta) -> list[Tensor]:
    if isinstance(delta, Kronecker):
        return [*delta_tensors(delta.first), *delta_tensors(delta.second)]
    return [delta.up, delta.down] if isinstance(delta, Delta) else [delta.matrix]


def scaled(delta: AnyDelta, weight: float) -> AnyDelta:
    if isinstance(delta, Kronecker):
        return replace(delta, first=replace(delta.first, scale=delta.first.scale * weight))
    return replace(delta, scale=delta.scale * weight)


def low_rank_factors(delta: AnyDelta) -> Delta:
    """Of a Kronecker product those of its factors multiplied, whose rank is the product of theirs."""
    import torch

    if not isinstance(delta, Kronecker):
        return factored(delta)
    first, second = factored(delta.first), factored(delta.second)
    up, down = (torch.kron(a.float(), b.float()) for a, b in ((first.up, second.up), (first.down, second.down)))
    return Delta(up, down, first.scale * second.scale, delta.shape)


def delta_rows(delta: Delta | Dense, low: int, high: int) -> Delta | Dense:
    """Rows of ΔW."""
    shape = (high - low, fan_in(delta.shape))
    if isinstance(delta, Delta):
        return Delta(delta.up[low:high], delta.down, delta.scale, shape)
    return Dense(delta.matrix[low:high], delta.scale, shape)


def block_reader(delta: AnyDelta, device: torch.device) -> Callable[[int, int], Tensor]:
    """A function that gives rows of ΔW, float64."""
    if isinstance(delta, Delta):
        up, down = delta.up.to(device).double() * delta.scale, delta.down.to(device).double()
        return lambda low, high: up[low:high] @ down
    if isinstance(delta, Dense):
        matrix, scale = delta.matrix, delta.scale
        return lambda low, high: matrix[low:high].to(device).double() * scale
    first, second = block_matrix(delta.first, device), block_matrix(delta.second, device)

    def read(low: int, high: int) -> Tensor:
        rows = torch.arange(low, high, device=device)
        left, right = first[rows // len(second)], second[rows % len(second)]
        return (left[:, :, None] * right[:, None, :]).flatten(1)

    return read


def block_matrix(delta: Delta | Dense, device: torch.device) -> Tensor:
    """All of ΔW, float64; for the small factors of a Kronecker product."""
    rows = (delta.up if isinstance(delta, Delta) else delta.matrix).shape[0]
    return block_reader(delta, device)(0, rows)
