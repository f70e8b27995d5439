"""Inner products and distances of two changes ΔW."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lorashrink.engine.accelerators import computed
from lorashrink.engine.delta import AnyDelta, Delta, Kronecker, fan_in
from lorashrink.engine.gram import grams
from lorashrink.linking.pairing import Piece, Unit, stacked_up, wide

# Sums of squares that cancel to less than this part of what was added have lost more than 9 of their 16 digits.
_CANCELLED = 2.0**-20

_BLOCK = 1 << 20  # numbers of a ΔW that is no product of factors, at a time

FIRST, SECOND = 0, 1


class InnerProducts(NamedTuple):
    """‖A‖², ‖B‖², <A, B> and ‖A − B‖² of one weight."""

    a: float
    b: float
    product: float
    difference: float

    @property
    def finite(self) -> bool:
        return all(map(math.isfinite, self))


def inner_products(unit: Unit, device: torch.device) -> InnerProducts | None:
    """None if a layer needs a base weight that is not there."""
    if not unit.bound:
        return None
    deltas = [layer.delta for _, layer in unit.members]
    sides = [side for side, _ in unit.members]

    def products(_: object, device: torch.device) -> list[InnerProducts]:
        if sides == [FIRST, SECOND] and len(unit.pieces) == 1:
            a, b = deltas
            if a.equals(b):
                square = _sums_over([a], [FIRST], [Piece(unit.rows, (0,))], device).a
                return [InnerProducts(square, square, square, 0.0)]
            if isinstance(a, Kronecker) and isinstance(b, Kronecker):
                factors = [*a.matrices(device), *b.matrices(device)]
                if factors[0].shape == factors[2].shape and factors[1].shape == factors[3].shape:
                    return [sums_of_kronecker(*factors)]
        return [_sums_over(deltas, sides, unit.pieces, device)]

    return computed(products, [unit], device)[0]


def _sums_over(
    deltas: Sequence[AnyDelta], sides: Sequence[int], pieces: Sequence[Piece], device: torch.device
) -> InnerProducts:
    factored = [delta for delta in deltas if isinstance(delta, Delta)]
    small = min(sum(piece.size for piece in pieces), fan_in(deltas[0].shape))
    if len(factored) == len(deltas) and sum(delta.rank for delta in factored) <= small:
        return sums_of_factors(factored, sides, pieces, device)
    return sums_of_rows(deltas, sides, pieces, device)


def sums_of_factors(
    deltas: Sequence[Delta], sides: Sequence[int], pieces: Sequence[Piece], device: torch.device
) -> InnerProducts:
    """From Gram matrices of the factors side by side, and from their R factors where sums cancel."""
    up, down = stacked_up(deltas, pieces), torch.cat([wide(delta.down) for delta in deltas])
    ranks = torch.tensor([delta.rank for delta in deltas])
    # B with a minus, so that the sum over everything is ‖A − B‖²
    signed = [delta.scale if side == FIRST else -delta.scale for delta, side in zip(deltas, sides, strict=True)]
    scales = torch.tensor(signed, dtype=torch.float64).repeat_interleave(ranks).to(device)
    of_a = torch.tensor([side == FIRST for side in sides]).repeat_interleave(ranks).to(device)
    gram = grams([Delta(up, down, 1.0, (up.shape[0], down.shape[1]))], device)
    terms = gram.up[0] * gram.down[0] * scales[:, None] * scales
    blocks = terms[of_a][:, of_a], terms[~of_a][:, ~of_a], terms
    product = -float(terms[of_a][:, ~of_a].sum())
    a, b, difference = (float(block.sum()) for block in blocks)
    if math.isfinite(difference) and any(block.sum() < _CANCELLED * block.abs().sum() for block in blocks):
        small_up, small_down = (
            torch.linalg.qr(factor.to(device, torch.float64), mode="r").R for factor in (up, down.mT)
        )
        small_up = small_up * scales
        core_a, core_b = (small_up[:, side] @ small_down[:, side].mT for side in (of_a, ~of_a))
        a, b, difference = (_square(core) for core in (core_a, core_b, small_up @ small_down.mT))
        product = -float((core_a * core_b).sum())
    return InnerProducts(a, b, product, difference)


def sums_of_kronecker(first_a: Tensor, second_a: Tensor, first_b: Tensor, second_b: Tensor) -> InnerProducts:
    """Inner products of A = first_a ⊗ second_a and B = first_b ⊗ second_b, whose factors have the same shapes.

    With B = (c·first_b) ⊗ (second_b / c) so that first_a − c·first_b is orthogonal to first_b, A − B is the sum of
    (first_a − c·first_b) ⊗ second_a and c·first_b ⊗ (second_a − second_b / c), which are orthogonal, too.
    """
    a, b = _square(first_a) * _square(second_a), _square(first_b) * _square(second_b)
    overlap = float((first_a * first_b).sum())
    product = overlap * float((second_a * second_b).sum())
    if not overlap:
        return InnerProducts(a, b, product, a + b)
    share = overlap / _square(first_b)
    near = share * first_b
    difference = _square(first_a - near) * _square(second_a) + _square(near) * _square(second_a - second_b / share)
    return InnerProducts(a, b, product, difference)


def _square(matrix: Tensor) -> float:
    return float(matrix.square().sum())


def sums_of_rows(
    deltas: Sequence[AnyDelta], sides: Sequence[int], pieces: Sequence[Piece], device: torch.device
) -> InnerProducts:
    """From ΔW itself, some rows at a time."""
    readers = [delta.row_reader(device) for delta in deltas]
    width = fan_in(deltas[0].shape)
    step = max(1, _BLOCK // width)
    total = torch.zeros(4, dtype=torch.float64, device=device)
    for size, starts in pieces:
        for low in range(0, size, step):
            high = min(low + step, size)
            rows = torch.zeros(2, high - low, width, dtype=torch.float64, device=device)
            for read, side, start in zip(readers, sides, starts, strict=True):
                if start is not None:
                    rows[side] += read(start + low, start + high)
            a, b = rows.flatten(1)
            apart = a - b
            total += torch.stack([a @ a, b @ b, a @ b, apart @ apart])
    return InnerProducts(*total.tolist())
