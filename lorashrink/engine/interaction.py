"""How several ΔW of one weight overlap, and the singular values of their weighted sum, from their factors.

With the factors of all of them side by side, U = [up_1 | up_2 | ...] and V = [down_1; down_2; ...], two products, UᵀU
and VVᵀ, hold everything: <ΔW_i, ΔW_j> is the sum over block (i, j) of UᵀU ∘ VVᵀ, the singular vectors of ΔW_i are
combinations of the columns of block i, and the sum's singular values are those of U·diag(w)·V. All r×r work is in
float64.

How much two subspaces overlap is ‖Q_iᵀ·Q_j‖_F² / min(k_i, k_j), the mean of cos² of their principal angles (LoRA,
https://arxiv.org/abs/2106.09685, section 7.2): 1 if one lies in the other, 0 if they are orthogonal. The subspaces are
those of the dimensions that carry 90 % of the energy: those of whole spectra would be mostly noise, and vectors of
small singular values have few digits.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from lorashrink.engine.eigen import eigh, eigvalsh
from lorashrink.engine.gram import SIGMA_FLOOR, factor_gram, solve
from lorashrink.engine.norms import still_to_come
from lorashrink.engine.products import square

_ENERGY = 0.9  # share of Σσ² in the dimensions whose subspaces are compared
_TIE = 1e-6  # singular values this close, relative, are in a subspace together: their vectors are not unique

# Sums of squares that cancel to less than this part of what was added have lost more than 9 of their 16 digits.
_CANCELLED = 2.0**-20

# Up to this rank the sum is decomposed as any layer; above, an iteration finds its largest singular values.
_FULL_RANK = 256
_START = 12  # columns of the block that the iteration starts from
_STEPS = 60  # at most
_CONVERGED = 1e-8  # growth of σ_1² that is still to come, relative, and of σ_2² as a part of σ_1²
_EXHAUSTED = 1e-13  # a new direction whose square is below this part of what it was made of is rounding


@dataclass(frozen=True, eq=False, slots=True)
class Interaction:
    """A matrices that are added to one weight; all tensors are float64 on the CPU, one line per matrix.

    `broken` are the indices of those that hold NaN or infinity; then all else is zero.
    """

    broken: tuple[int, ...]
    products: Tensor  # [A, A] <ΔW_i, ΔW_j>; on the diagonal ‖ΔW_i‖_F²
    spectral: Tensor  # [A] σ_1 of ΔW_i
    dimensions: Tensor  # [A] how many carry the energy
    left: Tensor  # [A, A] overlap of the left subspaces
    right: Tensor  # [A, A]
    total: tuple[float, float, float]  # ‖Σ w_i·ΔW_i‖_F, and the sum's σ_1 and σ_2
    shares: Tensor  # [A] part of the sum's σ_1 that is w_i·ΔW_i: u_1ᵀ·(w_i·ΔW_i)·v_1 / σ_1; 0 if it is 0


def interaction(
    ups: Tensor,
    downs: Tensor,
    scales: Sequence[float],
    ranks: Sequence[int],
    weights: Sequence[float],
    device: torch.device,
) -> Interaction:
    """The interaction of ΔW_i = up_i · diag(scale_i) · down_i, each with its weight w_i in the sum.

    ups [out, R] and downs [R, in·kh·kw] hold the factors side by side, `ranks` columns for each, of any float dtype;
    `scales` has a number for every column. O((out + in)·R²); nothing of the size of ΔW is formed unless the factors
    are larger than all ΔW together.
    """
    count, (rows, width), rank = len(ranks), (ups.shape[0], downs.shape[1]), ups.shape[1]
    scale = torch.tensor(scales, dtype=torch.float64, device=device)
    weight = torch.tensor(weights, dtype=torch.float64, device=device)
    if rank * (rows + width) > count * rows * width:
        up, down = ups.to(device).double() * scale, downs.to(device).double()
        return _of_matrices(_matrices(up, down, ranks), weight)
    gram_up = factor_gram(ups.to(device), columns=True).mul_(scale).mul_(scale[:, None])
    gram_down = factor_gram(downs.to(device), columns=False)
    # before any sums over blocks, which would carry NaN from one to the next
    squares = gram_up.diagonal() * gram_down.diagonal()
    if broken := _not_finite([part.sum() for part in torch.split(squares, list(ranks))]):
        return _broken(broken, count)
    members = _membership(ranks, device)
    rows_of_blocks = zip(torch.split(gram_up, list(ranks)), torch.split(gram_down, list(ranks)), strict=True)
    # <ΔW_i, ΔW_j>: sums over the blocks of gram_up ∘ gram_down, of which no more than a block's rows exist
    products = torch.stack([(up * down).sum(0) for up, down in rows_of_blocks]) @ members
    lengths_up, lengths_down = (gram.diagonal() @ members for gram in (gram_up, gram_down))
    bounds = (lengths_up * lengths_down).sqrt()  # no less than the norms of ΔW
    sum_cancels = float(weight @ products @ weight) < _CANCELLED * float(weight.abs() @ bounds) ** 2
    if sum_cancels or (products.diagonal() < _CANCELLED * bounds**2).any():
        # A QR decomposition does not square the condition number, as a Gram matrix does.
        up, down = ups.to(device).double() * scale, downs.to(device).double()
        core_up, core_down = (torch.linalg.qr(factor, mode="r").R for factor in (up, down.mT))
        return _of_matrices(_matrices(core_up, core_down.mT, ranks), weight)
    return _of_grams(gram_up, gram_down, products, ranks, weight)


# --- from Gram matrices -------------------------------------------------------------------------


def _of_grams(
    gram_up: Tensor, gram_down: Tensor, products: Tensor, ranks: Sequence[int], weight: Tensor
) -> Interaction:
    """The interaction from Gram matrices [R, R], which contain the scales, and <ΔW_i, ΔW_j>."""
    blocks = _blocks(ranks)
    spectra = _spectra_of_blocks(gram_up, gram_down, blocks)
    counts = _dimensions([sigma for sigma, _, _ in spectra])
    lefts, rights = [], []
    for (sigma, left, right), count in zip(spectra, counts, strict=True):
        inverse = sigma[:count].rsqrt()  # no σ that carries energy is 0
        lefts.append(left[:, :count] * inverse)
        rights.append(right[:count].mT * inverse)
    columns = weight.repeat_interleave(torch.tensor(ranks, device=weight.device))
    first, second, top = _top(gram_up, gram_down, columns, _first_vectors(blocks, rights, weight))
    parts = columns * top * (gram_up @ (columns * top))
    shares = torch.stack([parts[block].sum() for block in blocks])
    return Interaction(
        (),
        products.cpu(),
        torch.stack([sigma[0] for sigma, _, _ in spectra]).cpu(),
        torch.tensor(counts, dtype=torch.float64),
        _overlaps(gram_up, blocks, lefts).cpu(),
        _overlaps(gram_down, blocks, rights).cpu(),
        (float((weight @ products @ weight).clamp(min=0).sqrt()), first, second),
        (shares / first**2 if first > 0 else torch.zeros_like(shares)).cpu(),
    )


def _blocks(ranks: Sequence[int]) -> list[slice]:
    ends = [sum(ranks[:index]) for index in range(len(ranks) + 1)]
    return [slice(start, stop) for start, stop in pairwise(ends)]


def _membership(ranks: Sequence[int], device: torch.device) -> Tensor:
    """[R, A] 1 where a column belongs to a matrix, else 0."""
    owner = torch.arange(len(ranks)).repeat_interleave(torch.tensor(ranks))
    return torch.nn.functional.one_hot(owner, len(ranks)).to(device, torch.float64)


def _spectra_of_blocks(
    gram_up: Tensor, gram_down: Tensor, blocks: Sequence[slice]
) -> list[tuple[Tensor, Tensor, Tensor]]:
    """(sigma [r], left [r, r], right [r, r]) of each matrix as `solve` gives them, those of equal rank together."""
    spectra: dict[int, tuple[Tensor, Tensor, Tensor]] = {}
    for rank in {block.stop - block.start for block in blocks}:
        indices = [index for index, block in enumerate(blocks) if block.stop - block.start == rank]
        stacked = (torch.stack([gram[blocks[i], blocks[i]] for i in indices]) for gram in (gram_down, gram_up))
        spectra |= {index: (s, u, v) for index, s, u, v in zip(indices, *solve(*stacked), strict=True)}
    return [spectra[index] for index in range(len(blocks))]


def _dimensions(spectra: Sequence[Tensor]) -> list[int]:
    """How many of the largest singular values carry the energy of each spectrum; 0 for a zero matrix."""
    sigma = torch.nn.utils.rnn.pad_sequence(list(spectra), batch_first=True)
    energies = (sigma**2).cumsum(1)
    total = energies[:, -1:]
    last = (energies < _ENERGY * total).sum(1, keepdim=True).clamp(max=sigma.shape[1] - 1)
    counts = (sigma >= (1 - _TIE) * sigma.gather(1, last)).sum(1)
    return torch.where(total[:, 0] > 0, counts, 0).tolist()


def _overlaps(gram: Tensor, blocks: Sequence[slice], maps: Sequence[Tensor]) -> Tensor:
    """[A, A] overlaps of the subspaces whose orthonormal bases are factor_i · map_i, from the factors' Gram matrix."""
    lines = torch.cat([basis.mT @ gram[block] for block, basis in zip(blocks, maps, strict=True)])  # [K, R]
    cosines = torch.cat([lines[:, block] @ basis for block, basis in zip(blocks, maps, strict=True)], 1)  # [K, K]
    return _mean_squares(cosines, [basis.shape[1] for basis in maps])


def _mean_squares(cosines: Tensor, counts: Sequence[int]) -> Tensor:
    """[A, A] Σcos² / min(k_i, k_j) over the blocks of Q_iᵀ·Q_j; 0 for an empty block."""
    sizes = torch.tensor(counts, dtype=torch.float64, device=cosines.device)
    smaller = torch.minimum(sizes[:, None], sizes)
    members = _membership(counts, cosines.device)
    sums = members.mT @ cosines**2 @ members
    return torch.where(smaller > 0, sums / smaller, 0).clamp(max=1)


def _top(gram_up: Tensor, gram_down: Tensor, columns: Tensor, start: Tensor) -> tuple[float, float, Tensor]:
    """(σ_1, σ_2, down·v_1 [R]) of the weighted sum, up · diag(columns) · down, from Gram matrices."""
    if len(columns) > _FULL_RANK:
        return largest(gram_up, gram_down, columns, start)
    sigma, _, right = (
        solution[0] for solution in solve(gram_down[None], (gram_up * torch.outer(columns, columns))[None])
    )
    second = float(sigma[1]) if len(sigma) > 1 else 0.0
    return float(sigma[0]), second, gram_down @ right[0] / sigma[0].sqrt().clamp(min=torch.finfo(sigma.dtype).tiny)


def _first_vectors(blocks: Sequence[slice], rights: Sequence[Tensor], weight: Tensor) -> Tensor:
    """[b, R]: the first right vectors of all matrices, from which an iteration for the sum begins."""
    share = max(1, _START // len(blocks))
    start = torch.zeros(_START, blocks[-1].stop, dtype=torch.float64, device=weight.device)
    for index, (block, right) in enumerate(zip(blocks, rights, strict=True)):
        vectors, row = right[:, :share].mT, index * share % _START
        start[row : row + len(vectors), block] = vectors * weight[index]
    return start


def largest(gram_up: Tensor, gram_down: Tensor, columns: Tensor, start: Tensor) -> tuple[float, float, Tensor]:
    """`_top` for high ranks, where a full decomposition would take much longer than all of the rest.

    Block Krylov iteration for the eigenvalues of gram_up · gram_down, which is symmetric in the inner product of
    gram_down, with full orthogonalisation (Golub & Van Loan, Matrix Computations, 10.3.6); to about 1e-8 relative,
    worst where the largest singular values are nearly equal. Vectors are rows; `start` are b of them.
    """
    length = gram_down.diagonal().sqrt()
    inverse = torch.where(length > 0, 1 / length, 0)
    turns = columns * length

    def measure(rows: Tensor) -> Tensor:
        """Times gram_down, scaled so that all of its diagonal is 1."""
        return (rows * inverse) @ gram_down * inverse

    most = _START * _STEPS
    # only what is reached of them takes memory
    basis, images = start.new_empty(most, len(length)), start.new_empty(most, len(length))
    projected = start.new_empty(most, most)  # its lower triangle
    block, size, tops = start * length, 0, list[Tensor]()
    for _ in range(_STEPS):
        block, image = orthonormal(block, basis[:size], images[:size], measure)
        if not len(block):
            break
        rows = slice(size, size + len(block))
        size = rows.stop
        basis[rows], images[rows] = block, image
        block = (image * turns) @ gram_up * turns
        projected[rows, :size] = block @ images[:size].mT
        tops.append(eigvalsh(projected[:size, :size])[-2:])
        if len(tops) > 2 and bool((still_to_come(*tops[-3:]) <= _CONVERGED * tops[-1][-1]).all()):
            break
    if not size:
        return 0.0, 0.0, torch.zeros_like(length)
    values, vectors = eigh(projected[:size, :size])
    sigma = values.clamp(min=0).sqrt()
    sigma = torch.where(sigma > SIGMA_FLOOR * sigma[-1], sigma, 0)
    return float(sigma[-1]), float(sigma[-2]) if len(sigma) > 1 else 0.0, length * (vectors[:, -1] @ images[:size])


def orthonormal(
    block: Tensor, basis: Tensor, images: Tensor, measure: Callable[[Tensor], Tensor]
) -> tuple[Tensor, Tensor]:
    """(new directions in the rows of `block`, orthonormal in the inner product of `measure`; measure(directions))."""
    size = block.norm(dim=1)
    block = block[size > 0] / size[size > 0, None]
    image = measure(block)
    for _ in range(2):  # twice is enough for full precision
        overlap = block @ images.mT
        block, image = block - overlap @ basis, image - overlap @ images
        values, vectors = eigh(image @ block.mT)
        new = values > _EXHAUSTED
        turn = (vectors[:, new] / values[new].sqrt()).mT
        block, image = turn @ block, turn @ image
    return block, image


# --- from matrices ------------------------------------------------------------------------------


def _matrices(up: Tensor, down: Tensor, ranks: Sequence[int]) -> Tensor:
    """[A, out, in·kh·kw] the products of the factors that lie side by side."""
    return torch.stack([up[:, block] @ down[block] for block in _blocks(ranks)])


def _of_matrices(matrices: Tensor, weight: Tensor) -> Interaction:
    """The same from the matrices [A, n, m], or from their coordinates in orthonormal bases of both sides."""
    flat = matrices.flatten(1)
    products = square(flat)
    if broken := _not_finite(list(products.diagonal())):
        return _broken(broken, len(matrices))
    spectra = [_decomposed(matrix) for matrix in matrices]
    counts = _dimensions([sigma for sigma, _, _ in spectra])
    lefts = torch.cat([left[:, :k] for (_, left, _), k in zip(spectra, counts, strict=True)], 1)
    rights = torch.cat([right[:, :k] for (_, _, right), k in zip(spectra, counts, strict=True)], 1)
    total = torch.einsum("a,anm->nm", weight, matrices)
    sigma, left, right = _decomposed(total)
    first, second = float(sigma[0]), float(sigma[1]) if len(sigma) > 1 else 0.0
    parts = weight * torch.einsum("n,anm,m->a", left[:, 0], matrices, right[:, 0])
    return Interaction(
        (),
        products.cpu(),
        torch.stack([sigma[0] for sigma, _, _ in spectra]).cpu(),
        torch.tensor(counts, dtype=torch.float64),
        _mean_squares(square(lefts.mT), counts).cpu(),
        _mean_squares(square(rights.mT), counts).cpu(),
        (float(total.norm()), first, second),
        (parts / first if first > 0 else torch.zeros_like(parts)).cpu(),
    )


def _decomposed(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(σ [r], left vectors [n, r], right vectors [m, r]) with r = min(n, m); vectors of σ = 0 are zero on one side."""
    if matrix.shape[0] > matrix.shape[1]:
        sigma, right, left = _decomposed(matrix.mT)
        return sigma, left, right
    values, vectors = eigh(square(matrix))
    sigma, left = values.flip(-1).clamp(min=0).sqrt(), vectors.flip(-1)
    sigma = torch.where(sigma > SIGMA_FLOOR * sigma[:1], sigma, 0)
    return sigma, left, matrix.mT @ left * torch.where(sigma > 0, 1 / sigma, 0)


# --- what cannot be used ------------------------------------------------------------------------


def _not_finite(numbers: Sequence[Tensor]) -> tuple[int, ...]:
    return tuple(index for index, number in enumerate(numbers) if not torch.isfinite(number))


def _broken(indices: tuple[int, ...], count: int) -> Interaction:
    zeros, table = torch.zeros(count, dtype=torch.float64), torch.zeros(count, count, dtype=torch.float64)
    return Interaction(indices, table, zeros, zeros, table, table, (0.0, 0.0, 0.0), zeros)
