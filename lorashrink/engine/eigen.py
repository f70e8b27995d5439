"""Eigenvalues of symmetric matrices, with results of GPUs checked: their batched solvers have been wrong before."""

from __future__ import annotations

import logging
from collections.abc import Callable

import torch
from torch import Tensor

from lorashrink.engine.accelerators import out_of_memory

log = logging.getLogger(__name__)

# Below torch 2.12 CUDA solves float64 matrices of more than 32 rows one after another. A CPU does that faster, as long
# as a matrix is too small to fill a GPU.
_BATCHED = tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 12)
_BATCHED_ROWS, _LARGE_ROWS = 32, 512

# ‖K·V - V·Λ‖ / ‖K‖ and ‖VᵀV - 1‖ / √r of a right result are a thousandth of this.
_TOLERANCE = 1e-10


def solver_device(device: torch.device, rank: int) -> torch.device:
    """Where many r×r float64 problems are solved: the device, or the CPU if the device is slow at them."""
    slow = device.type == "cuda" and _BATCHED_ROWS < rank <= _LARGE_ROWS and not _BATCHED
    return torch.device("cpu") if slow else device


def eigh(matrices: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues [..., r], smallest first, and eigenvectors [..., r, r] of float64 matrices [..., r, r].

    The CPU solves what the device is slow at, and one by one what it gets wrong. Raises LinAlgError if that fails, too.
    """
    values, vectors = _checked(torch.linalg.eigh, _stacked(matrices), wrong_vectors)
    return values.reshape(matrices.shape[:-1]), vectors.reshape(matrices.shape)


def eigvalsh(matrices: Tensor) -> Tensor:
    """The eigenvalues alone."""
    (values,) = _checked(lambda part: (torch.linalg.eigvalsh(part),), _stacked(matrices), wrong_values)
    return values.reshape(matrices.shape[:-1])


def _stacked(matrices: Tensor) -> Tensor:
    return matrices[None] if matrices.dim() == 2 else matrices.flatten(0, -3)


def _checked(
    solve: Callable[[Tensor], tuple[Tensor, ...]], stacked: Tensor, wrong: Callable[..., Tensor]
) -> tuple[Tensor, ...]:
    """What `solve` makes of matrices [L, r, r], where `wrong` finds no fault in it."""
    device = solver_device(stacked.device, stacked.shape[-1])
    if device != stacked.device:
        return tuple(result.to(stacked.device) for result in _checked(solve, stacked.to(device), wrong))
    try:
        results = tuple(solve(stacked))
    except RuntimeError as error:  # LinAlgError is one, and the libraries of GPUs have others
        if out_of_memory(error) or (_trusted(stacked) and len(stacked) == 1):
            raise
        log.info("%d matrices of rank %d are solved one by one (%s)", len(stacked), stacked.shape[1], error)
        return _one_by_one(solve, stacked)
    if not _trusted(stacked) and (faulty := wrong(stacked, *results)).any():
        log.info(
            "%d of %d matrices of rank %d are solved again by the CPU", faulty.sum(), len(faulty), stacked.shape[1]
        )
        for result, right in zip(results, _one_by_one(solve, stacked[faulty]), strict=True):
            result[faulty] = right
    return results


def _trusted(stacked: Tensor) -> bool:
    return stacked.device.type == "cpu"


def _one_by_one(solve: Callable[[Tensor], tuple[Tensor, ...]], stacked: Tensor) -> tuple[Tensor, ...]:
    solutions = [solve(matrix[None]) for matrix in stacked.cpu()]
    return tuple(torch.cat(parts).to(stacked.device) for parts in zip(*solutions, strict=True))


def wrong_vectors(stacked: Tensor, values: Tensor, vectors: Tensor) -> Tensor:
    """[L] True where V·Λ is not K·V, or V is not orthonormal; NaN is wrong."""
    stacked = _symmetric(stacked)
    sizes = torch.linalg.matrix_norm(stacked)
    residuals = torch.linalg.matrix_norm(stacked @ vectors - vectors * values[:, None, :])
    identity = torch.eye(stacked.shape[-1], dtype=vectors.dtype, device=vectors.device)
    skews = torch.linalg.matrix_norm(vectors.mT @ vectors - identity)
    right: Tensor = (residuals <= _TOLERANCE * sizes) & (skews <= _TOLERANCE * stacked.shape[-1] ** 0.5)
    return ~right


def wrong_values(stacked: Tensor, values: Tensor) -> Tensor:
    """[L] True where the eigenvalues have another sum or sum of squares than the matrix."""
    stacked = _symmetric(stacked)
    squares = stacked.square().sum((-2, -1))
    traces = stacked.diagonal(dim1=-2, dim2=-1).sum(-1)
    right: Tensor = ((values.square().sum(-1) - squares).abs() <= _TOLERANCE * squares) & (
        (values.sum(-1) - traces).abs() <= _TOLERANCE * squares.sqrt() * stacked.shape[-1] ** 0.5
    )
    return ~right


def _symmetric(stacked: Tensor) -> Tensor:
    """The matrices that the solvers see, which read the lower triangle alone."""
    return stacked.tril() + stacked.tril(-1).mT
