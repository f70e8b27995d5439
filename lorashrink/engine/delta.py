"""The change ΔW that an adapter makes to one weight: two factors, a matrix, a Kronecker product, or that of experts.

The forms have the same properties and methods.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor

# Takes (low, high) and returns these rows of ΔW, float64 [high - low, in·kh·kw].
RowReader = Callable[[int, int], Tensor]


@dataclass(frozen=True, eq=False, slots=True)
class _Factors:
    """What two factors and those of experts have in common."""

    up: Tensor
    down: Tensor
    scale: float
    shape: tuple[int, ...]

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """The stored tensors."""
        return self.up, self.down

    @property
    def precision(self) -> torch.dtype:
        """The dtype to compute in: float64 if the layer is stored so, else float32."""
        return _precision(self.up)

    def dense(self) -> Tensor:
        """ΔW itself, float32, in `shape`. For looking at and for tests; the engine never needs it."""
        return (self.scale * (self.up.double() @ self.down.double())).float().reshape(self.shape)

    def times(self, weight: float) -> Self:
        """weight · ΔW."""
        return replace(self, scale=self.scale * weight)

    def equals(self, delta: AnyDelta) -> bool:
        """Whether both have the same form and the same bits."""
        return isinstance(delta, type(self)) and self.scale == delta.scale and _same_bits(self.tensors, delta.tensors)


@dataclass(frozen=True, eq=False, slots=True)
class Delta(_Factors):
    """ΔW = scale · up · down, reshaped to `shape`.

    up [out, r], down [r, in·kh·kw], any float dtype; shape [out, in] or [out, in, kh, kw, ...].
    """

    @property
    def rank(self) -> int:
        """Number of columns of `up`; the mathematical rank may be lower."""
        return self.up.shape[1]

    def factored(self, dtype: torch.dtype = torch.float32) -> Delta:
        """ΔW as two factors: itself. `dtype` matters for Kronecker products alone."""
        return self

    def rows(self, low: int, high: int) -> Delta:
        """Rows `low` to `high` of ΔW, in the same form, as a matrix."""
        return Delta(self.up[low:high], self.down, self.scale, (high - low, fan_in(self.shape)))

    def row_reader(self, device: torch.device) -> RowReader:
        """A function that computes rows of ΔW on the device, float64."""
        up, down = self.up.to(device).double() * self.scale, self.down.to(device).double()
        return lambda low, high: up[low:high] @ down


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

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """The stored tensor."""
        return (self.matrix,)

    @property
    def precision(self) -> torch.dtype:
        """The dtype to compute in: float64 if the layer is stored so, else float32."""
        return _precision(self.matrix)

    def dense(self) -> Tensor:
        """ΔW itself, float32, in `shape`."""
        return (self.scale * self.matrix.double()).float().reshape(self.shape)

    def factored(self, dtype: torch.dtype = torch.float32) -> Delta:
        """The matrix and, on its shorter side, the identity. `dtype` matters for Kronecker products alone."""
        matrix = self.matrix if self.matrix.element_size() > 2 else self.matrix.float()
        identity = torch.eye(self.rank, dtype=matrix.dtype)
        tall = matrix.shape[0] > matrix.shape[1]
        return Delta(matrix if tall else identity, identity if tall else matrix, self.scale, self.shape)

    def times(self, weight: float) -> Dense:
        """weight · ΔW."""
        return replace(self, scale=self.scale * weight)

    def rows(self, low: int, high: int) -> Dense:
        """Rows `low` to `high` of ΔW, as a matrix."""
        return Dense(self.matrix[low:high], self.scale, (high - low, fan_in(self.shape)))

    def row_reader(self, device: torch.device) -> RowReader:
        """A function that converts rows of ΔW on the device, float64."""
        return lambda low, high: self.matrix[low:high].to(device).double() * self.scale

    def equals(self, delta: AnyDelta) -> bool:
        """Whether both have the same form and the same bits."""
        return isinstance(delta, Dense) and self.scale == delta.scale and _same_bits(self.tensors, delta.tensors)


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

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """The stored tensors of both factors."""
        return *self.first.tensors, *self.second.tensors

    @property
    def precision(self) -> torch.dtype:
        """The dtype to compute in: float64 if the second, larger factor is stored so, else float32."""
        return self.second.precision

    def dense(self) -> Tensor:
        """ΔW itself, float32, in `shape`."""
        return self.rows(0, self.shape[0]).dense().reshape(self.shape)

    def factored(self, dtype: torch.dtype = torch.float32) -> Delta:
        """(up_1 ⊗ up_2)·(down_1 ⊗ down_2), multiplied in `dtype`; its rank is the product of the factors' ranks."""
        first, second = self.first.factored(), self.second.factored()
        up = torch.kron(first.up.to(dtype), second.up.to(dtype))
        down = torch.kron(first.down.to(dtype), second.down.to(dtype))
        return Delta(up, down, first.scale * second.scale, self.shape)

    def times(self, weight: float) -> Kronecker:
        """weight · ΔW."""
        return replace(self, first=self.first.times(weight))

    def rows(self, low: int, high: int) -> Dense:
        """Rows `low` to `high` of ΔW, as a matrix, float64."""
        first, second = (factor.dense().flatten(1).double() for factor in (self.first, self.second))
        return Dense(_kronecker_rows(first, second, low, high), 1.0, (high - low, fan_in(self.shape)))

    def row_reader(self, device: torch.device) -> RowReader:
        """A function that computes rows of ΔW on the device, float64."""
        first, second = self.matrices(device)
        return lambda low, high: _kronecker_rows(first, second, low, high)

    def matrices(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Both factors as float64 matrices; they are small."""
        first, second = (factor.row_reader(device)(0, factor.shape[0]) for factor in (self.first, self.second))
        return first, second

    def equals(self, delta: AnyDelta) -> bool:
        """Whether both have the same form and the same bits."""
        return isinstance(delta, Kronecker) and self.first.equals(delta.first) and self.second.equals(delta.second)


@dataclass(frozen=True, eq=False, slots=True)
class Experts(_Factors):
    """The ΔW of several weights of one shape, one below another: scale · up[e] · down[e] for each expert e.

    up [e, out, r], down [e, r, in], any float dtype; shape [e·out, in].
    """

    @property
    def rank(self) -> int:
        """That of each expert."""
        return self.up.shape[2]

    @property
    def parts(self) -> list[Delta]:
        """The ΔW of each expert."""
        shape = (self.up.shape[1], self.down.shape[2])
        return [Delta(up, down, self.scale, shape) for up, down in zip(self.up, self.down, strict=True)]

    def factored(self, dtype: torch.dtype = torch.float32) -> Delta:
        """Factors of e times the rank, with zeros between experts. `dtype` matters for Kronecker products alone."""
        count, out, rank = self.up.shape
        up = self.up.new_zeros(count, out, count, rank)
        for expert in range(count):
            up[expert, :, expert] = self.up[expert]
        return Delta(up.reshape(count * out, count * rank), self.down.flatten(0, 1), self.scale, self.shape)

    def rows(self, low: int, high: int) -> Dense:
        """Rows `low` to `high` of ΔW, as a matrix, float64."""
        return Dense(self.row_reader(torch.device("cpu"))(low, high), 1.0, (high - low, fan_in(self.shape)))

    def row_reader(self, device: torch.device) -> RowReader:
        """A function that computes rows of ΔW on the device, float64."""
        up, down = self.up.to(device).double() * self.scale, self.down.to(device).double()
        out = up.shape[1]

        def read(low: int, high: int) -> Tensor:
            experts = range(low // out, -(-high // out))
            return torch.cat([up[e, max(0, low - e * out) : high - e * out] @ down[e] for e in experts])

        return read


AnyDelta = Delta | Dense | Kronecker | Experts


def fan_in(shape: tuple[int, ...]) -> int:
    """in·kh·kw of a weight of this shape: the length of one row of its matrix."""
    return math.prod(shape[1:])


def _precision(stored: Tensor) -> torch.dtype:
    return torch.float64 if stored.dtype == torch.float64 else torch.float32


def _kronecker_rows(first: Tensor, second: Tensor, low: int, high: int) -> Tensor:
    rows = torch.arange(low, high, device=first.device)
    first, second = first[rows // len(second)], second[rows % len(second)]
    return (first[:, :, None] * second[:, None, :]).flatten(1)


def _same_bits(first: tuple[Tensor, ...], second: tuple[Tensor, ...]) -> bool:
    """Bit by bit, which is several times as fast as torch.equal for half precision."""
    for a, b in zip(first, second, strict=True):
        if (a.dtype, a.shape) != (b.dtype, b.shape):
            return False
        bits_a, bits_b = (tensor.contiguous().flatten().view(torch.uint8).numpy() for tensor in (a, b))
        if not (bits_a == bits_b).all():
            return False
    return True
