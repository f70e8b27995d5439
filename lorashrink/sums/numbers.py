"""The numbers of a sum: factors side by side, cancellation, and dense sums."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from lorashrink.adapters.family import Shape
from lorashrink.engine.delta import Delta, Dense, fan_in
from lorashrink.linking.rows import RowRun

if TYPE_CHECKING:
    from torch import Tensor

    from lorashrink.engine.delta import AnyDelta

# What is left of a sum that is smaller than this part of its terms is their rounding.
_CANCELLED = 2.0**-20

_PROBES = 4  # random inputs that both sides of that comparison are applied to

_BLOCK = 1 << 20  # numbers of a ΔW that are formed at a time


def _precise(factor: Tensor) -> Tensor:
    """In float32, which holds products of half precision numbers and weights; float64 stays."""
    import torch

    return factor if factor.dtype == torch.float64 else factor.float()


def side_by_side(deltas: Sequence[Delta], runs: Sequence[Sequence[RowRun]], shape: Shape) -> Delta:
    """One product of factors: each `up` in its own columns and, times its scale, in the rows that it changes.

    Where several have the same `down`, as parts of a fused weight often do, their columns are added.
    """
    import torch

    ups = [_placed(_precise(delta.up) * delta.scale, each, shape[0]) for delta, each in zip(deltas, runs, strict=True)]
    downs = [_precise(delta.down) for delta in deltas]
    if _cancel(ups, downs):
        return Delta(torch.zeros(shape[0], 1), torch.zeros(1, fan_in(shape)), 1.0, shape)
    unique: list[tuple[Tensor, Tensor]] = []
    for up, down in zip(ups, downs, strict=True):
        twin = next((place for place, (_, other) in enumerate(unique) if _same(other, down)), None)
        if twin is None:
            unique.append((up, down))
        else:
            unique[twin] = (unique[twin][0] + up, down)
    even = [_balanced(up, down) for up, down in unique]
    dtype = max((each.dtype for pair in even for each in pair), key=lambda dtype: dtype.itemsize)
    up = torch.cat([pair[0].to(dtype) for pair in even], 1)
    return Delta(up, torch.cat([pair[1].to(dtype) for pair in even]), 1.0, shape)


def _placed(up: Tensor, runs: Sequence[RowRun], rows: int) -> Tensor:
    """[rows, r] with the rows of `up` where they belong, and zeros elsewhere."""
    if tuple(runs) == (RowRun(0, 0, rows),):
        return up[:rows]
    placed = up.new_zeros(rows, up.shape[1])
    for at, start, size in runs:
        placed[at : at + size] = up[start : start + size]
    return placed


def _same(one: Tensor, other: Tensor) -> bool:
    import torch

    return one.shape == other.shape and one.dtype == other.dtype and torch.equal(one, other)


def _cancel(ups: Sequence[Tensor], downs: Sequence[Tensor]) -> bool:
    """Whether nothing but rounding is left of the sum, as far as some random inputs tell."""
    import torch

    if len(ups) < 2:
        return False
    probes = torch.randn(downs[0].shape[1], _PROBES, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    images = [up.double() @ (down.double() @ probes) for up, down in zip(ups, downs, strict=True)]
    return float(torch.stack(images).sum(0).norm()) <= _CANCELLED * sum(float(image.norm()) for image in images)


def _balanced(up: Tensor, down: Tensor) -> tuple[Tensor, Tensor]:
    """Both sides about equally long, by a power of two, so that no digit is lost.

    Side by side, a factor that is small only because its partner is large would look like rounding.
    """
    lengths = float(up.double().norm()), float(down.double().norm())
    if not all(lengths):
        return up, down
    shift = 2.0 ** round((math.log2(lengths[1]) - math.log2(lengths[0])) / 2)
    return up * shift, down / shift


def summed_matrix(deltas: Sequence[AnyDelta], runs: Sequence[Sequence[RowRun]], shape: Shape) -> Dense:
    """The sum as a matrix, float32; each term is formed in float64, some rows at a time."""
    import torch

    total = torch.zeros(shape[0], fan_in(shape))
    lengths = 0.0
    for delta, each in zip(deltas, runs, strict=True):
        square = 0.0
        for at, rows in _blocks(delta, each):
            total[at : at + len(rows)] += rows
            square += float(rows.double().square().sum())
        lengths += math.sqrt(square)
    if len(deltas) > 1 and float(total.double().norm()) <= _CANCELLED * lengths:
        total.zero_()
    return Dense(total, 1.0, shape)


def _blocks(delta: AnyDelta, runs: Sequence[RowRun]) -> Iterator[tuple[int, Tensor]]:
    """(first row in the sum, rows of ΔW, float32), no more than some at a time."""
    width = fan_in(delta.shape)
    step = max(1, _BLOCK // width)
    for at, start, size in runs:
        for low in range(start, start + size, step):
            high = min(low + step, start + size)
            yield at + low - start, delta.rows(low, high).dense()
