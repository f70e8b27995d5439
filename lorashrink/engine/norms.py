"""Frobenius and spectral norms of dense weight matrices."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from lorashrink.engine.eigen import eigh, eigvalsh
from lorashrink.engine.gram import widened
from lorashrink.engine.products import square

# Numbers squared at a time in float64: still in a core's cache when they are summed.
_FRO_BLOCK = 1 << 16

# Up to this shorter side all eigenvalues of W·Wᵀ are computed, in float64.
_DENSE_SIDE = 256

# Up to this shorter side forming W·Wᵀ costs less than the passes over W that it saves.
_SQUARE_SIDE = 4096

# Squares of numbers in this range, and sums of them, stay in the range of float32 with all their digits.
_SAFE_PEAKS = (1e-11, 1e14)

_KRYLOV_BLOCK = 8  # vectors
_KRYLOV_SPACE = 8  # blocks before a restart
_KRYLOV_RESTARTS = 40
_KRYLOV_CHECK = 4  # blocks between two looks at σ_1
# Growth of σ_1² that is still to come, relative. The estimate is too low where many σ are nearly equal.
_KRYLOV_TOLERANCE = 3e-8
_SLOWEST = 0.9  # what is still to come is told from two growths; they are taken to shrink at least so fast
_EXHAUSTED = 1e-5  # a new direction shorter than this part of what it was made of is float32 rounding


def frobenius(weight: Tensor) -> float:
    """‖W‖_F of a tensor of any shape and float dtype, summed in float64."""
    total = 0.0
    for block in torch.split(weight.reshape(-1), _FRO_BLOCK):
        wide = widened(block)
        total += float(wide @ wide)
    return math.sqrt(total)


def spectral(weight: Tensor) -> float:
    """σ_1 of a matrix [n, m] of any float dtype, to better than 1e-6 relative; NaN if it holds NaN or infinity."""
    return float(spectral_norms(weight[None])[0])


def spectral_norms(weights: Tensor) -> Tensor:
    """σ_1 [L] in float64 of matrices [L, n, m] of any float dtype, on their device, to better than 1e-6 relative.

    Small matrices through all eigenvalues of W·Wᵀ, larger ones by block Krylov iteration with full orthogonalisation
    and restarts (Golub & Van Loan, Matrix Computations, 10.3.6). NaN for a matrix that holds NaN or infinity.
    """
    wide = weights.float()
    flat = wide.flatten(1)
    peaks = torch.maximum(-flat.amin(1), flat.amax(1))  # on a CPU ten times as fast as a norm or aminmax of a dimension
    if wide.shape[1] > wide.shape[2]:
        wide = wide.mT
    units = torch.ones_like(peaks)
    finite = torch.isfinite(peaks)
    safe = finite & ((peaks == 0) | (peaks > _SAFE_PEAKS[0]) & (peaks < _SAFE_PEAKS[1]))
    if not safe.all():
        units = torch.where(safe | ~finite, units, peaks)
        wide = torch.where(finite[:, None, None], wide / units[:, None, None], 0)
    if wide.shape[1] <= _DENSE_SIDE:
        wide = wide.double()
        sigma: Tensor = eigvalsh(square(wide))[:, -1].clamp(min=0).sqrt()
    else:
        sigma = krylov_norms(wide)
    return torch.where(finite, sigma * units, math.nan)


# --- block Krylov iteration ---------------------------------------------------------------------


def krylov_norms(wide: Tensor) -> Tensor:
    """σ_1 [L] of float32 matrices [L, n, m], n ≤ m, whose squares float32 can hold."""
    count, side = wide.shape[:2]
    times_square = _square_of(wide)
    size = _KRYLOV_BLOCK * _KRYLOV_SPACE
    space = wide.new_zeros(count, size, side)  # rows are orthonormal or 0
    projected = torch.zeros(count, size, size, dtype=torch.float64, device=wide.device)  # lower triangle
    block = torch.randn(_KRYLOV_BLOCK, side, generator=torch.Generator().manual_seed(0)).to(wide.device)
    block = block.expand(count, -1, -1)
    tops: list[Tensor] = []  # σ_1² at each look
    for step in range(_KRYLOV_RESTARTS * _KRYLOV_SPACE):
        start = step % _KRYLOV_SPACE * _KRYLOV_BLOCK
        stop = start + _KRYLOV_BLOCK
        block = new_directions(block, space[:, :start])
        space[:, start:stop] = block
        image = times_square(block)
        projected[:, start:stop, :stop] = image @ space[:, :stop].mT
        block = image
        if (step + 1) % _KRYLOV_CHECK == 0:
            values, vectors = eigh(projected[:, :stop, :stop])
            tops.append(values[:, -1])
            if len(tops) > 2 and (still_to_come(*tops[-3:]) <= _KRYLOV_TOLERANCE * tops[-1]).all():
                break
            if stop == size:
                block = vectors[:, :, -_KRYLOV_BLOCK:].mT.float() @ space
    best = vectors[:, :, -1:].mT.float() @ space[:, :stop]
    # ‖x·W‖ / ‖x‖ has no rounding of W·Wᵀ
    length, image_length = (rows.double().norm(dim=(1, 2)) for rows in (best, best @ wide))
    return torch.where(length > 0, image_length / length, 0)


def _square_of(wide: Tensor) -> Callable[[Tensor], Tensor]:
    """The function x -> x·W·Wᵀ of rows x [L, b, n]."""
    side = wide.shape[1]
    if side > _SQUARE_SIDE:
        return lambda rows: rows @ wide @ wide.mT
    squares = square(wide)
    return lambda rows: rows @ squares


def new_directions(block: Tensor, space: Tensor) -> Tensor:
    """Orthonormal rows [L, b, n] for what `block` adds to the space [L, k, n]; 0 for a row that adds nothing."""
    size = block.norm(dim=(1, 2), keepdim=True)
    for _ in range(2):  # twice is enough for full precision
        block = block - block @ space.mT @ space
        block = torch.where(block.norm(dim=2, keepdim=True) > _EXHAUSTED * size, block, 0)
        exact = block.double()
        values, vectors = eigh(square(exact))
        new = values > _EXHAUSTED**2 * values[:, -1:]
        block = ((vectors * torch.where(new, 1 / values.sqrt(), 0)[:, None, :]).mT @ exact).float()
        size = torch.ones_like(size)
    return block


def still_to_come(first: Tensor, second: Tensor, third: Tensor) -> Tensor:
    """What three values in a row will grow by, if their growth goes on as a geometric series."""
    before, growth = second - first, third - second
    ratio = torch.where(before > 0, growth / before, 0).clamp(0, _SLOWEST)
    return growth * ratio / (1 - ratio)
