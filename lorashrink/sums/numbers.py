"""The numbers of a sum: factors side by side, dense sums, and what DoRA adds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from lorashrink.adapters.family import Shape
from lorashrink.engine.delta import Delta, Dense, Experts, fan_in
from lorashrink.linking.renaming import magnitude_per_output
from lorashrink.linking.rows import RowRun, covers

if TYPE_CHECKING:
    from torch import Tensor

    from lorashrink.adapters import Layer
    from lorashrink.engine.delta import AnyDelta

# A sum that is smaller than this part of its terms is their rounding.
_CANCELLED = 2.0**-20

_PROBES = 4  # random inputs that both sides of that comparison are applied to

_BLOCK = 1 << 20  # numbers of a ΔW that are formed at a time


def dora_delta(layer: Layer) -> Dense:
    """ΔW of DoRA, m·(W + ΔW)/‖W + ΔW‖ − W: W in float64, because the difference is small.

    The norms are those of rows, or where the magnitude has a number per input those of all that this input is
    multiplied with (LyCORIS without `wd_on_out`). The layer has its base weight.
    """
    import torch

    assert layer.weight is not None
    weight = layer.weight().double()
    changed = weight + layer.delta.dense().flatten(1)
    by_input = changed.reshape(len(changed), layer.shape[1], -1)  # [out, in, kh·kw]
    per_output = magnitude_per_output(layer)
    norms = by_input.norm(dim=(1, 2) if per_output else (0, 2), keepdim=True)
    magnitude = layer.store.read(layer.keys["magnitude"]).double().reshape((-1, 1, 1) if per_output else (1, -1, 1))
    shares = torch.where(norms > 0, magnitude / norms, 0)
    return Dense(((by_input * shares).flatten(1) - weight).float(), 1.0, layer.shape)


def of_experts(deltas: Sequence[Experts], shape: Shape) -> Experts:
    """The sum of each expert as one product of factors, whose rank is the sum of all ranks."""
    import torch

    up = torch.cat([_precise(delta.up) * delta.scale for delta in deltas], dim=2)
    return Experts(up, torch.cat([_precise(delta.down) for delta in deltas], dim=1), 1.0, shape)


def side_by_side(deltas: Sequence[Delta], runs: Sequence[Sequence[RowRun]], shape: Shape) -> Delta:
    """One product of factors: each `up` in its own columns and, times its scale, in the rows that it changes.

    Where several have the same `down`, as parts of a fused weight often do, their columns are added. A sum that is
    nothing but rounding, as far as some random inputs tell, becomes zero.
    """
    import torch

    ups, downs = [], [_precise(delta.down) for delta in deltas]
    for delta, delta_runs in zip(deltas, runs, strict=True):
        up = _precise(delta.up) * delta.scale
        if not covers(delta_runs, shape[0]):
            own, up = up, up.new_zeros(shape[0], up.shape[1])
            for at, start, size in delta_runs:
                up[at : at + size] = own[start : start + size]
        ups.append(up[: shape[0]])
    if len(ups) > 1:
        probes = torch.randn(fan_in(shape), _PROBES, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        images = [up.double() @ (down.double() @ probes) for up, down in zip(ups, downs, strict=True)]
        if _cancelled(torch.stack(images).sum(0), sum(float(image.norm()) for image in images)):
            return Delta(torch.zeros(shape[0], 1), torch.zeros(1, fan_in(shape)), 1.0, shape)
    unique: list[tuple[Tensor, Tensor]] = []
    for up, down in zip(ups, downs, strict=True):
        same = (
            i for i, (_, earlier) in enumerate(unique) if earlier.dtype == down.dtype and torch.equal(earlier, down)
        )
        twin = next(same, None)
        if twin is None:
            unique.append((up, down))
        else:
            unique[twin] = (unique[twin][0] + up, down)
    factors = [balanced(up, down) for up, down in unique]
    dtype = max((factor.dtype for pair in factors for factor in pair), key=lambda dtype: dtype.itemsize)
    up = torch.cat([up.to(dtype) for up, _ in factors], 1)
    return Delta(up, torch.cat([down.to(dtype) for _, down in factors]), 1.0, shape)


def _precise(factor: Tensor) -> Tensor:
    """In float32, which holds products of half precision numbers and weights; float64 stays."""
    import torch

    return factor if factor.dtype == torch.float64 else factor.float()


def balanced(up: Tensor, down: Tensor) -> tuple[Tensor, Tensor]:
    """Both sides about equally long, by a power of two, so that no digit is lost.

    Side by side, a factor that is small only because its partner is large would look like rounding.
    """
    lengths = float(up.double().norm()), float(down.double().norm())
    if not all(0 < length < math.inf for length in lengths):
        return up, down
    shift = 2.0 ** round((math.log2(lengths[1]) - math.log2(lengths[0])) / 2)
    return up * shift, down / shift


def summed_matrix(deltas: Sequence[AnyDelta], runs: Sequence[Sequence[RowRun]], shape: Shape) -> Dense:
    """The sum as a matrix, float32; each term is formed in float64, some rows at a time."""
    import torch

    total = torch.zeros(shape[0], fan_in(shape))
    lengths, step = 0.0, max(1, _BLOCK // fan_in(shape))
    for delta, delta_runs in zip(deltas, runs, strict=True):
        square = 0.0
        for at, start, size in delta_runs:
            for low in range(0, size, step):
                high = min(low + step, size)
                rows = delta.rows(start + low, start + high).dense()
                total[at + low : at + high] += rows
                square += float(rows.double().square().sum())
        lengths += math.sqrt(square)
    if len(deltas) > 1 and _cancelled(total, lengths):
        total.zero_()
    return Dense(total, 1.0, shape)


def _cancelled(total: Tensor, lengths: float) -> bool:
    """Whether a sum of terms of these lengths is nothing but their rounding; not where a number overflowed."""
    return float(total.double().norm()) <= _CANCELLED * lengths < math.inf
