"""Gram matrices of factors, and singular values and vectors from them."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from functools import reduce
from typing import NamedTuple

import torch
from torch import Tensor

from lorashrink.engine.delta import Delta
from lorashrink.engine.eigen import eigh
from lorashrink.engine.products import square

# A Gram matrix squares the condition number. Rounding gives it false eigenvalues of up to about 6·eps64·λ_1 at 1280
# rows, more at more rows and in float32 sketches, so below this share of σ_1 nothing is trustworthy, and counts as 0.
SIGMA_FLOOR = 2.0**-23

# Up to this spread of its Cholesky root's diagonal a factor is as good as any; trained ones stay far below.
_GOOD_SPREAD = 2.0**7

# A Cholesky root whose diagonal spans more than this is too near to singular to be inverted.
_MAX_SPREAD = 2.0**20

# Eigenvalues of a singular Gram matrix below this part of the largest are rounding.
_GRAM_CLIP = 2.0**-44

# Squares of norms from singular values and from Gram matrices may differ by this part of themselves, and by this part
# of the terms that cancel in them.
_ROUNDING, _CANCELLATION = 2.0**-34, 2.0**-44

# Numbers converted to float64 at a time, so that on a CPU they are used while still in its cache.
CPU_BLOCK = 1 << 17

# On a CPU stacking pays for factors of at most so many numbers; a larger one fills the machine by itself.
_STACKED = 1 << 15

# Bytes of the factors that a GPU has at once, in their own dtype, float32 and float64.
_DEVICE_BYTES = 1 << 29


class Grams(NamedTuple):
    """The two Gram matrices of one layer, float64 [r, r]."""

    down: Tensor  # down · downᵀ, or down · C · downᵀ with C the mean of x·xᵀ over the layer's inputs
    up: Tensor  # upᵀ · up, or upᵀ · G · up with G the sum of g·gᵀ over the gradients at its outputs

    @property
    def finite(self) -> bool:
        """False if a factor held NaN or infinity: its squares are on the diagonals."""
        return bool(_finite(self.down, self.up).all())

    def squares(self) -> tuple[Tensor, Tensor]:
        """‖up · down‖_F² = tr(G_A·G_B) of stacked Gram matrices, and how far rounding may move it, both [L]."""
        products = self.down * self.up
        squares = products.sum((-2, -1))
        return squares, _ROUNDING * squares.abs() + _CANCELLATION * products.abs().sum((-2, -1))


def _finite(gram_down: Tensor, gram_up: Tensor) -> Tensor:
    # Squares of float32 numbers, and products of these, are far inside the range of float64.
    traces = [gram.diagonal(dim1=-2, dim2=-1).sum(-1) for gram in (gram_down, gram_up)]
    return torch.isfinite(traces[0] + traces[1])


# --- many small problems ------------------------------------------------------------------------


def solve(gram_down: Tensor, gram_up: Tensor, *, clip: float = _GRAM_CLIP) -> tuple[Tensor, Tensor, Tensor]:
    """Spectra of L layers from their Gram matrices, both [L, r, r] float64, on any device.

    Returns sigma [L, r], left and right [L, r, r] in float64. A layer with NaN or infinity gets NaN.
    """
    finite = _finite(gram_down, gram_up)
    if not finite.all():  # one NaN would make the batched decompositions fail for all layers
        identity = torch.eye(gram_down.shape[-1], dtype=gram_down.dtype, device=gram_down.device)
        gram_down, gram_up = (torch.where(finite[:, None, None], gram, identity) for gram in (gram_down, gram_up))
    units = units_of(gram_down)
    gram_down, gram_up = gram_down * (units.mT * units), gram_up / (units.mT * units)
    roots = Roots.of(gram_down, gram_up, clip)
    values, vectors = eigh(roots.root.mT @ roots.partner @ roots.root)
    # Rounding may leave an eigenvalue of 0 slightly negative.
    sigma, vectors = values.flip(-1).clamp(min=0).sqrt(), vectors.flip(-1)
    sigma = torch.where(sigma > SIGMA_FLOOR * sigma[:, :1], sigma, 0)
    half = sigma.sqrt()
    left = roots.root @ vectors * torch.where(half > 0, 1 / half, 0)[:, None, :]
    right = roots.solve(vectors * half[:, None, :]).mT
    if roots.swapped.any():
        left, right = torch.where(roots.swapped, right.mT, left), torch.where(roots.swapped, left.mT, right)
    return torch.where(finite[:, None], sigma, math.nan), left / units.mT, right * units


def units_of(gram: Tensor) -> Tensor:
    """[L, 1, r] powers of two that bring every row of a factor to a length of about 1; a row of zeros keeps its own.

    The other factor is divided by them. Nothing is rounded, and a large number in one factor that a small one in the
    other makes up for is not taken for a sign of dependent rows.
    """
    exponents = torch.frexp(gram.diagonal(dim1=-2, dim2=-1)).exponent.to(torch.int64)
    halves = exponents.div(2, rounding_mode="floor").clamp(-500, 500)
    return ((1023 - halves) << 52).view(torch.float64)[:, None, :]  # the bits of 2^-halves


class Roots(NamedTuple):
    """Roots of one Gram matrix of each layer: root · rootᵀ is that of `down`, or where `swapped`, that of `up`."""

    root: Tensor  # [L, r, r], lower triangular, or where `singular`, eigenvectors times roots of eigenvalues
    partner: Tensor  # [L, r, r], the Gram matrix of the other factor
    swapped: Tensor  # [L, 1, 1]
    singular: Tensor  # [L]

    @classmethod
    def of(cls, gram_down: Tensor, gram_up: Tensor, clip: float) -> Roots:
        """The better conditioned one of the two roots; where `up` has it, the transposed problem is solved."""
        root, spread = _cholesky(gram_down)
        swapped = torch.zeros_like(spread, dtype=torch.bool)[:, None, None]
        partner = gram_up
        if (spread > _GOOD_SPREAD).any():
            root_up, spread_up = _cholesky(gram_up)
            swapped = ((spread > _GOOD_SPREAD) & (spread_up < spread))[:, None, None]
            root, partner = torch.where(swapped, root_up, root), torch.where(swapped, gram_down, gram_up)
            spread = torch.where(swapped[:, 0, 0], spread_up, spread)
        singular = spread > _MAX_SPREAD
        if singular.any():
            swapped = swapped & ~singular[:, None, None]
            partner = torch.where(singular[:, None, None], gram_up, partner)
            values, vectors = eigh(gram_down[singular])
            positive = values > clip * values[:, -1:]
            root[singular] = vectors * torch.where(positive, values, 0).sqrt()[:, None, :]
        return cls(root, partner, swapped, singular)

    def solve(self, vectors: Tensor) -> Tensor:
        """root⁻ᵀ · vectors. The columns of singular roots are orthogonal; those of length 0 are left out."""
        root, singular = self.root, self.singular
        solution: Tensor
        if not singular.any():
            solution = torch.linalg.solve_triangular(root.mT, vectors, upper=True)
            return solution
        solution = torch.empty_like(vectors)
        solution[~singular] = torch.linalg.solve_triangular(root[~singular].mT, vectors[~singular], upper=True)
        squares = (root[singular] ** 2).sum(-2)  # lengths of the columns, squared
        solution[singular] = root[singular] * torch.where(squares > 0, 1 / squares, 0)[:, None, :] @ vectors[singular]
        return solution


def _cholesky(gram: Tensor) -> tuple[Tensor, Tensor]:
    """(lower root, how near its rows are to dependent ones: the ratio of the largest to the smallest part of a row
    that is new beside the rows above it; inf where there is no root)."""
    root, failed = torch.linalg.cholesky_ex(gram)
    diagonal = root.diagonal(dim1=-2, dim2=-1) / gram.diagonal(dim1=-2, dim2=-1).sqrt()
    spread = diagonal.amax(-1) / diagonal.amin(-1)
    return root, torch.where((failed == 0) & (spread > 0), spread, math.inf)


# --- Gram matrices ------------------------------------------------------------------------------


def grams(deltas: Sequence[Delta], device: torch.device, dtype: torch.dtype = torch.float64) -> Grams:
    """The Gram matrices of layers of equal rank, both stacked to [L, r, r], computed in `dtype`, without the scale."""
    return Grams(
        _stacked_grams([delta.down for delta in deltas], device, dtype, columns=False),
        _stacked_grams([delta.up for delta in deltas], device, dtype, columns=True),
    )


def product_squares(deltas: Sequence[Delta], device: torch.device, dtype: torch.dtype) -> list[float]:
    """‖up · down‖_F² of layers of equal rank, computed in `dtype`, without the scale; NaN if numbers overflow."""
    own = grams(deltas, device, dtype)
    return own.down.mul_(own.up).sum((-2, -1), dtype=torch.float64).tolist()


def _stacked_grams(factors: Sequence[Tensor], device: torch.device, dtype: torch.dtype, *, columns: bool) -> Tensor:
    """[L, r, r] of factors [r, n], or [n, r] if `columns`; equal shapes go through one batched product."""
    rank = factors[0].shape[1 if columns else 0]
    result = torch.empty(len(factors), rank, rank, dtype=dtype, device=device)
    groups: dict[tuple[object, ...], list[int]] = defaultdict(list)
    for index, factor in enumerate(factors):
        if device.type == "cpu" and factor.numel() > _STACKED:
            result[index] = factor_gram(factor, columns=columns, dtype=dtype)
        else:
            groups[factor.shape, factor.dtype].append(index)
    for indices in groups.values():
        first = factors[indices[0]]
        most = max(1, _DEVICE_BYTES // max(1, first.numel() * (first.element_size() + 4 + 8)))
        for start in range(0, len(indices), most):
            part = indices[start : start + most]
            result[part] = factor_gram(stacked([factors[i] for i in part], device), columns=columns, dtype=dtype)
    return result


def stacked(tensors: Sequence[Tensor], device: torch.device) -> Tensor:
    """Tensors of one shape and dtype on the CPU as one tensor on the device."""
    if device.type == "cuda":
        # From pinned memory the copy runs beside the computation.
        pinned = torch.empty((len(tensors), *tensors[0].shape), dtype=tensors[0].dtype, pin_memory=True)
        torch.stack(list(tensors), out=pinned)
        return pinned.to(device, non_blocking=True)
    return tensors[0][None] if len(tensors) == 1 else torch.stack(list(tensors))


def on_cpu(*tensors: Tensor) -> list[Tensor]:
    """Copies of tensors on the CPU, which the device makes at once."""
    if tensors[0].device.type != "cuda":
        return [tensor.cpu() for tensor in tensors]
    copies = [torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True) for tensor in tensors]
    for copy, tensor in zip(copies, tensors, strict=True):
        copy.copy_(tensor, non_blocking=True)
    torch.cuda.current_stream(tensors[0].device).synchronize()
    return copies


def factor_gram(factors: Tensor, *, columns: bool, dtype: torch.dtype = torch.float64) -> Tensor:
    """[..., r, r] in `dtype` of factors [..., r, n], or [..., n, r] if `columns`."""
    rank, width = (factors.mT if columns else factors).shape[-2:]
    block = width
    if factors.device.type == "cpu":
        # Blocks that are shorter than the rank would be less work than adding their squares.
        block = max(64, rank, CPU_BLOCK * width // max(1, factors.numel()))
    parts = torch.split(factors, block, -2 if columns else -1) if width > block else [factors]
    wide = (widened(part, dtype) for part in parts)  # one at a time
    return reduce(Tensor.add_, (square(part.mT if columns else part) for part in wide))


def widened(tensor: Tensor, dtype: torch.dtype = torch.float64) -> Tensor:
    """The same numbers in a wider dtype: half precision by float32, which is one instruction where float64 is not."""
    return (tensor.float() if tensor.element_size() <= 2 else tensor).to(dtype)
