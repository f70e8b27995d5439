"""Frobenius and spectral norms of dense weight matrices."""

from __future__ import annotations

import math

import torch
from torch import Tensor

_FRO_BLOCK = 1 << 20  # numbers squared at a time in float64

_KRYLOV_BLOCK = 8  # vectors
_KRYLOV_STEPS = 16  # blocks before a restart
_KRYLOV_RESTARTS = 20
_KRYLOV_EXHAUSTED = 1e-5  # a new block shorter than this part of its image is float32 rounding
_KRYLOV_TOLERANCE = 1e-8  # relative growth of σ_1 in two steps

_DENSE_SIDE = 256  # up to this shorter side the Gram matrix itself is decomposed


def frobenius(weight: Tensor) -> float:
    """‖W‖_F of a tensor of any shape and float dtype, summed in float64."""
    flat = weight.reshape(-1)
    total = 0.0
    for block in torch.split(flat, _FRO_BLOCK):
        wide = block.double()
        total += float(wide @ wide)
    return math.sqrt(total)


def spectral(weight: Tensor) -> float:
    """σ_1 of a matrix [n, m], to about 1e-6 relative.

    Block Krylov iteration with full orthogonalisation and restarts (Golub & Van Loan, Matrix Computations,
    10.3.6); small matrices through the eigenvalues of their Gram matrix.
    """
    weight = weight.float()
    if min(weight.shape) <= _DENSE_SIDE:
        wide = (weight if weight.shape[0] <= weight.shape[1] else weight.mT).double()
        return math.sqrt(max(0.0, float(torch.linalg.eigvalsh(wide @ wide.mT)[-1])))
    start = torch.randn(weight.shape[1], _KRYLOV_BLOCK, generator=torch.Generator().manual_seed(0))
    sigma = 0.0
    for _ in range(_KRYLOV_RESTARTS):
        sigma, start, converged = _krylov(weight, start)
        if converged:
            break
    return sigma


def _krylov(weight: Tensor, start: Tensor) -> tuple[float, Tensor, bool]:
    """(σ_1, right vectors [m, b] to go on from, whether σ_1 stood still for two steps) from one Krylov space."""
    block = torch.linalg.qr(start).Q
    basis, images = block, weight @ block
    history = [float(torch.linalg.matrix_norm(images.double(), 2))]
    for _ in range(_KRYLOV_STEPS):
        image = weight.mT @ images[:, -_KRYLOV_BLOCK:]
        block = image - basis @ (basis.mT @ image)
        if float(block.norm()) <= _KRYLOV_EXHAUSTED * float(image.norm()):
            return history[-1], block, True  # nothing new: the space is invariant
        block = torch.linalg.qr(block - basis @ (basis.mT @ block)).Q  # once more, for float32
        basis = torch.cat([basis, block], 1)
        images = torch.cat([images, weight @ block], 1)
        values, vectors = torch.linalg.eigh(images.mT.double() @ images.double())
        history.append(math.sqrt(max(0.0, float(values[-1]))))
        if history[-1] <= history[max(0, len(history) - 3)] * (1 + _KRYLOV_TOLERANCE):
            return history[-1], block, True
    return history[-1], basis @ vectors[:, -_KRYLOV_BLOCK:].float(), False
