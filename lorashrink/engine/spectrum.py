"""The engine: singular values of many ΔW = scale · up · down, and their truncated factors, without forming ΔW.

Nothing larger than r×r is decomposed. With the Gram matrices G_A = down·downᵀ and G_B = upᵀ·up, and a root
G_A = L·Lᵀ, the squared singular values are the eigenvalues of the symmetric K = Lᵀ·G_B·L = V·S²·Vᵀ, and

    up' = up · (L·V·S^-½)        down' = (S^½·Vᵀ·L⁻¹) · down

are the factors with √σ on both sides. Gram matrices square the condition number, so everything r×r is in
float64. The relative error of σ_i is then about 2⁻⁵²·(σ_1/σ_i)²: below 1e-9 for all σ_i > σ_1/1000. Where a
factor is singular, its eigenvalues replace the Cholesky root.

A ΔW that is not of low rank is decomposed through the Gram matrix of its shorter side, or, where only a few
dimensions can be kept, through a random sketch (Halko, Martinsson, Tropp, https://arxiv.org/abs/0909.4061). The
singular values of a Kronecker product are the products of those of its factors. Experts that are stored in one tensor
are decomposed each, and keep the same number of dimensions: dimension i is the i-th of every expert.

With Gram matrices from statistics of a layer's inputs and of the model's sensitivity to its outputs, the same steps
give the truncation that is best for the model's output.

Tensors in, tensors out: this module knows nothing of files, names or recipes.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, Future
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import islice
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from lorashrink.engine.accelerators import computed, start
from lorashrink.engine.delta import AnyDelta, Delta, Dense, Experts, Kronecker, fan_in
from lorashrink.engine.devices import core_device
from lorashrink.engine.eigen import eigh, eigvalsh, solver_device
from lorashrink.engine.gram import CPU_BLOCK, SIGMA_FLOOR, Grams, factor_gram, grams, on_cpu, solve, stacked
from lorashrink.engine.products import product

Values = np.ndarray[tuple[int], np.dtype[np.float64]]
Indices = np.ndarray[tuple[int], np.dtype[np.int64]]

# Statistics were summed up in half or single precision while a model ran: eigenvalues of a singular Gram matrix below
# this part of the largest are rounding.
_STATISTICS_CLIP = 1e-9

# On a GPU: layers in a chunk, of which a file has several, so that one is copied while another is computed, and bytes
# of each of the r×r matrices that solving a chunk takes.
_DEVICE_LAYERS, _DEVICE_CORE_BYTES = 128, 1 << 26

# Layers of this rank and above are large enough to fill a thread by themselves.
_LARGE_RANK = 512

# A sketch pays where it has at most this part of all dimensions.
_SKETCH_SHARE = 0.25
_SKETCH_ROUNDS = 4  # of subspace iteration; the spectra of weight differences fall slowly
_SKETCH_EXTRA = 32  # dimensions beyond the limit, so that the last ones within it are right


@dataclass(frozen=True, eq=False, slots=True)
class Item:
    """One layer to decompose."""

    load: Callable[[], AnyDelta]
    rank: int  # of the delta that `load` returns; may be an estimate if that is no `Delta`
    grams: Callable[[Delta], Grams] | None = None  # from statistics, in place of the factors' own
    limit: int | None = None  # no more than this many dimensions will be kept


@dataclass(frozen=True, eq=False, slots=True)
class PendingSpectrum:
    """The spectrum of one layer, which is decomposed in a chunk with others."""

    chunk: Future[list[Spectrum | Exception]]
    index: int  # of the layer in its chunk

    def result(self) -> Spectrum:
        """Wait for the spectrum. Raises what its layer raised, or CancelledError if the pool was shut down."""
        outcome = self.chunk.result()[self.index]
        if isinstance(outcome, Exception):
            raise outcome
        return outcome


class _Plain(NamedTuple):
    """The factors' own Gram matrices, where statistics decided."""

    grams: Grams
    scale: float  # of the delta

    def square(self, middle: Tensor) -> float:
        """‖scale · up · middle · down‖_F²."""
        trace = (middle.mT @ self.grams.up @ middle * self.grams.down).sum()
        return self.scale**2 * max(0.0, float(trace))


class _Pair(NamedTuple):
    """The spectra of the two factors of a Kronecker product."""

    first: Spectrum
    second: Spectrum
    order: Tensor  # [r]: index of each singular value in the grid of products, first · (rank of second) + second


@dataclass(frozen=True, eq=False)
class Spectrum:
    """Singular values of one ΔW, and what it takes to truncate it.

    The r×r maps of a `Dense` would be as large as the layer, so that `truncate` computes its vectors again.
    """

    # [r] float64, largest first, exactly 0 past the numerical rank; in the unit of the base weight, or with statistics
    # in the unit of their norm; of experts the root of the sum of the squares of their i-th ones
    sigma: Tensor
    # Both float32, for the k ≤ r dimensions that may be kept; of experts [e, ...].
    left: Tensor | None = None  # [r, k]: up @ left[:, i] is √σ_i·u_i
    right: Tensor | None = None  # [k, r]: right[i] @ down is √σ_i·v_iᵀ
    pair: _Pair | None = None  # of a Kronecker product
    limit: int | None = None  # of a sketch, which has only this many dimensions
    tail: float = 0.0  # Σσ² of the dimensions that are not in `sigma`: a sketch leaves them out
    square: float | None = None  # ‖ΔW‖_F² of two factors, from their Gram matrices and not from `sigma`
    plain: _Plain | None = None  # with statistics

    @cached_property
    def rank(self) -> int:
        """The numerical rank: how many singular values are above rounding."""
        return int(np.count_nonzero(self._values > 0))

    @property
    def finite(self) -> bool:
        """False if a factor held NaN or infinity; then all of `sigma` is NaN."""
        return bool(np.isfinite(self._values).all())

    @property
    def total(self) -> float:
        """‖ΔW‖_F², all dimensions included."""
        if self.plain:
            return self.plain.square(torch.eye(len(self.sigma), dtype=torch.float64))
        return _square(self._values) + self.tail

    def norm(self, kept: Sequence[int], factors: Tensor | None = None) -> float:
        """‖ΔW'‖_F of ΔW reduced to the dimensions `kept`, each times its factor, float64 [k].

        With statistics there are no factors.
        """
        if self.plain:
            assert factors is None
            return math.sqrt(self.plain.square(self._projection(kept, self.plain.scale)))
        return math.sqrt(_square(self._values[list(kept)] * (1 if factors is None else factors.numpy())))

    def lost(self, kept: Sequence[int], factors: Tensor | None = None) -> float:
        """‖ΔW - ΔW'‖_F of the same, summed over the removed dimensions, so that small losses are exact."""
        if self.plain:
            assert factors is None
            rest = torch.eye(len(self.sigma), dtype=torch.float64) - self._projection(kept, self.plain.scale)
            return math.sqrt(self.plain.square(rest)) if len(kept) < self.rank else 0.0
        removed = self._values.copy()
        removed[list(kept)] *= 0 if factors is None else 1 - factors.numpy()
        return math.sqrt(_square(removed) + self.tail)

    def lengths(self) -> tuple[Values, Values]:
        """‖√σ_i·u_i‖ and ‖√σ_i·v_i‖ of all dimensions, float64 [r] each; with statistics these are no roots of σ."""
        if self.plain is None:
            root = np.sqrt(self._values)
            return root, root
        assert self.left is not None
        assert self.right is not None
        left, right = self.left.double(), self.right.double()
        up = ((self.plain.grams.up @ left) * left).sum(0).clamp(min=0).sqrt()
        down = ((right @ self.plain.grams.down) * right).sum(1).clamp(min=0).sqrt()
        return up.numpy(), down.numpy()

    @cached_property
    def _values(self) -> Values:
        # numpy's calls cost a tenth of torch's, which counts for thousands of layers
        return self.sigma.numpy()

    def _projection(self, kept: Sequence[int], scale: float) -> Tensor:
        """[r, r] float64 P: ΔW' = scale · up · P · down."""
        assert self.left is not None
        assert self.right is not None
        index = list(kept)
        return self.left[:, index].double() @ self.right[index].double() / scale


def _square(values: Values) -> float:
    return float(values @ values)


def spectrum(delta: AnyDelta, grams: Grams | None = None, *, limit: int | None = None) -> Spectrum:
    """The spectrum of one layer. See `decompose`, which does many at a time."""
    statistics = None if grams is None else lambda _: grams
    (outcome,) = _decompose_chunk([Item(lambda: delta, delta.rank, statistics, limit)], torch.device("cpu"))
    if isinstance(outcome, Exception):
        raise outcome
    return outcome


def decompose(
    items: Sequence[Item],
    pool: Executor,
    *,
    device: str | torch.device = "cpu",
    reading: Callable[[Sequence[int]], AbstractContextManager[None]] | None = None,
) -> list[PendingSpectrum]:
    """The spectra of many layers, in the order of `items`, while the threads of the pool compute them.

    Layers of equal rank are solved together as [L, r, r] problems. Each chunk of layers is read, decomposed and
    forgotten by one thread, so that the factors of no more than a few layers per thread are in memory. On a GPU the
    last bits of a layer may depend on its chunk, and so on `items`, but not on what else is computed meanwhile. Cost:
    O((out + in)·r²) per layer.

    reading: what a thread is in while it loads the items with these indices.
    """
    device = core_device(device)
    if device.type != "cpu":
        start(device)  # in this thread, which can raise what is wrong with it
    by_rank: dict[tuple[int, bool], list[int]] = defaultdict(list)
    for index, item in enumerate(items):
        by_rank[item.rank, item.grams is None].append(index)
    pending: dict[int, PendingSpectrum] = {}
    for (rank, _), indices in sorted(by_rank.items(), reverse=True):  # what takes longest begins first
        size = _chunk_size(rank, device)
        for low in range(0, len(indices), size):
            chunk = indices[low : low + size]
            loading = reading(chunk) if reading else nullcontext()
            future = pool.submit(_decompose_chunk, [items[index] for index in chunk], device, loading)
            pending |= {index: PendingSpectrum(future, position) for position, index in enumerate(chunk)}
    return [pending[index] for index in range(len(items))]


def truncate(
    delta: AnyDelta,
    spectrum: Spectrum,
    kept: Sequence[int],
    *,
    factors: Tensor | None = None,
    width: int | None = None,
    scale: float = 1.0,
    device: str | torch.device = "cpu",
) -> tuple[Tensor, Tensor]:
    """(up' [out, k], down' [k, in·kh·kw]) on the CPU, whose product is `scale` · ΔW reduced to the dimensions `kept`.

    Each dimension is multiplied with its factor, float64 [k] from 0 to 1, if there are `factors`. Both sides have √σ,
    and contain the delta's own scale. With `width` > len(kept) zeros fill the factors up to that rank. Computed in
    float32, or in float64 if the delta is float64. The factors of experts, [out, e·k] and [e·k, in], have the
    dimensions of the first expert first.
    """
    return _truncated(Cut(delta, spectrum, kept, factors, width, scale), core_device(device))


class Cut(NamedTuple):
    """One layer to truncate; see `truncate`."""

    delta: AnyDelta
    spectrum: Spectrum
    kept: Sequence[int]
    factors: Tensor | None = None
    width: int | None = None
    scale: float = 1.0

    @property
    def halves(self) -> tuple[float, float]:
        """What the vectors of both sides are multiplied with."""
        half = math.sqrt(abs(self.scale))
        return math.copysign(half, self.scale), half

    @property
    def dimensions(self) -> Indices:
        """[k], the dimensions that are kept."""
        return np.asarray(self.kept, np.int64)

    def finished(self, up: Tensor, down: Tensor) -> tuple[Tensor, Tensor]:
        """Both factors times the roots of `factors`, and as wide as `width`."""
        count, experts = len(self.kept), len(self.delta.up) if isinstance(self.delta, Experts) else 1
        extra = (self.width or count) - count
        if self.factors is None and not extra:
            return up, down
        up, down = up.reshape(len(up), experts, count), down.reshape(experts, count, down.shape[1])
        if self.factors is not None:
            root = self.factors.sqrt().to(up)
            up, down = up * root, down * root[:, None]
        if extra:
            up = torch.nn.functional.pad(up, (0, extra))
            down = torch.nn.functional.pad(down, (0, 0, 0, extra))
        return up.flatten(1), down.flatten(0, 1)


def truncate_together(cuts: Sequence[Cut], device: str | torch.device) -> list[tuple[Tensor, Tensor]]:
    """`truncate` of many layers, in their order. On a GPU layers of equal shape and dtype are one product."""
    device = core_device(device)
    if device.type == "cpu":
        return [_truncated(cut, device) for cut in cuts]
    groups: dict[object, list[int]] = defaultdict(list)
    for index, (delta, spectrum, *_) in enumerate(cuts):
        batched = isinstance(delta, Delta) and spectrum.left is not None
        groups[tuple((tensor.shape, tensor.dtype) for tensor in delta.tensors) if batched else index].append(index)
    results: dict[int, tuple[Tensor, Tensor]] = {}
    for indices in groups.values():
        results |= zip(indices, computed(_truncated_together, [cuts[index] for index in indices], device), strict=True)
    return [results[index] for index in range(len(cuts))]


def alignment(delta: AnyDelta, spectrum: Spectrum, weight: Tensor, device: str | torch.device = "cpu") -> Tensor:
    """[r] float64: u_iᵀ·W·v_i for each singular pair of ΔW; 0 past the numerical rank. W is [out, in·kh·kw]."""
    rank = spectrum.rank
    up, down = truncate(delta, spectrum, range(rank), device=device)
    up, down, weight = (tensor.to(core_device(device)) for tensor in (up, down, weight))
    dtype = _product_dtype(delta, up.device)
    products = ((weight.to(dtype) @ down.to(dtype).mT) * up.to(dtype)).sum(0, dtype=torch.float64).cpu()
    return torch.nn.functional.pad(products / spectrum.sigma[:rank], (0, len(spectrum.sigma) - rank))


# --- singular vectors ---------------------------------------------------------------------------


def _truncated(cut: Cut, device: torch.device) -> tuple[Tensor, Tensor]:
    up, down = cut.finished(*_vectors(cut.delta, cut.spectrum, cut.dimensions, cut.halves, device))
    return up.to("cpu", cut.delta.precision), down.to("cpu", cut.delta.precision)


def _truncated_together(cuts: Sequence[Cut], device: torch.device) -> list[tuple[Tensor, Tensor]]:
    """Layers of two factors and of equal shape; or one layer of any form."""
    if len(cuts) == 1:
        return [_truncated(cuts[0], device)]
    delta, most = cuts[0].delta, max(len(cut.kept) for cut in cuts)
    dtype = _product_dtype(delta, device)
    maps = [_scaled_maps(cut.spectrum, cut.dimensions, cut.halves) for cut in cuts]
    # All as wide as the widest: what zeros make is cut off again.
    lefts = [torch.nn.functional.pad(left, (0, most - left.shape[1])) for left, _ in maps]
    rights = [torch.nn.functional.pad(right, (0, 0, 0, most - len(right))) for _, right in maps]
    factors = zip(*(cut.delta.tensors for cut in cuts), strict=True)
    ups, downs = (stacked(tensors, device).to(dtype) for tensors in factors)
    ups, downs = ups @ stacked(lefts, device).to(dtype), stacked(rights, device).to(dtype) @ downs
    ups, downs = on_cpu(ups.to(delta.precision), downs.to(delta.precision))
    return [
        cut.finished(up[:, : len(cut.kept)], down[: len(cut.kept)])
        for cut, up, down in zip(cuts, ups, downs, strict=True)
    ]


def _product_dtype(delta: AnyDelta, device: torch.device) -> torch.dtype:
    """The dtype for products of the factors: float64 on CUDA, where float32 is as coarse as fp16 if the program around
    this has allowed TF32, and that switch belongs to the whole process."""
    return torch.float64 if device.type == "cuda" else delta.precision


def _scaled_maps(spectrum: Spectrum, index: Indices, factors: tuple[float, float]) -> tuple[Tensor, Tensor]:
    """(left [r, k], right [k, r]) of the dimensions in `index`, each side times its factor."""
    assert spectrum.left is not None
    assert spectrum.right is not None
    left, right = spectrum.left.numpy(), spectrum.right.numpy()  # whose calls cost a third of torch's
    with np.errstate(all="ignore"):
        left, right = left[..., index] * factors[0], right[..., index, :] * factors[1]
    return torch.from_numpy(left), torch.from_numpy(right)


def _vectors(
    delta: AnyDelta, spectrum: Spectrum, index: Indices, factors: tuple[float, float], device: torch.device
) -> tuple[Tensor, Tensor]:
    """√σ_i·u_i [out, k] and √σ_i·v_iᵀ [k, in·kh·kw] of the dimensions in `index`, each side times its factor."""
    if isinstance(delta, Experts):
        dtype = _product_dtype(delta, device)
        left, right = _scaled_maps(spectrum, index, factors)
        ups = delta.up.to(device, dtype) @ left.to(device, dtype)  # [e, out, k]
        downs = right.to(device, dtype) @ delta.down.to(device, dtype)  # [e, k, in]
        return ups.movedim(0, 1).flatten(1), downs.flatten(0, 1)
    if spectrum.left is not None:
        delta = delta.factored()
        dtype = _product_dtype(delta, device)
        left, right = _scaled_maps(spectrum, index, factors)
        return (
            product(delta.up.to(device, dtype), left.to(device, dtype)),
            product(right.to(device, dtype), delta.down.to(device, dtype)),
        )
    if isinstance(delta, Dense):
        return _dense_vectors(delta, spectrum, index, factors, device)
    assert isinstance(delta, Kronecker)
    assert spectrum.pair is not None
    first, second, order = spectrum.pair
    grid, count = order.numpy()[index], len(second.sigma)
    up_1, down_1 = _vectors(delta.first, first, grid // count, factors, device)
    up_2, down_2 = _vectors(delta.second, second, grid % count, (1.0, 1.0), device)
    dtype = _product_dtype(delta, device)
    up = torch.einsum("ak,bk->abk", up_1.to(dtype), up_2.to(dtype)).reshape(-1, len(index))
    down = torch.einsum("ka,kb->kab", down_1.to(dtype), down_2.to(dtype)).reshape(len(index), -1)
    return up, down


def _dense_vectors(
    delta: Dense, spectrum: Spectrum, index: Indices, factors: tuple[float, float], device: torch.device
) -> tuple[Tensor, Tensor]:
    """`_vectors` of a matrix, whose vectors on the shorter side are the eigenvectors of its Gram matrix."""
    if spectrum.limit is not None:
        sketch, maps = _sketch(delta, spectrum.limit, device)
        return _vectors(sketch, maps, index, factors, device)
    dtype = _product_dtype(delta, device)
    matrix = delta.matrix.to(device)
    vectors = eigh(_dense_gram(matrix))[1].flip(-1)[:, torch.from_numpy(index).to(device)]  # [r, k]
    half = spectrum.sigma[index].sqrt().to(device)
    inverse = torch.where(half > 0, 1 / half, 0) * abs(delta.scale)
    short, long = (vectors * half).to(dtype), (vectors * inverse).to(dtype)
    sign = math.copysign(factors[0], factors[0] * delta.scale)
    if matrix.shape[0] > matrix.shape[1]:
        return matrix.to(dtype) @ (long * sign), short.mT * factors[1]
    return short * sign, (long * factors[1]).mT @ matrix.to(dtype)


# --- one layer ----------------------------------------------------------------------------------


def _with_scale(
    deltas: Sequence[Delta], sigma: Tensor, left: Tensor, right: Tensor, limit: int | None = None
) -> list[tuple[Tensor, Tensor, Tensor]]:
    """(sigma, left, right) of `Spectrum` from the solution of Gram matrices, which do not contain the scale."""
    scale = torch.tensor([delta.scale for delta in deltas], dtype=torch.float64)[:, None]
    sigma = sigma * scale.abs()
    for values, delta in zip(sigma, deltas, strict=True):
        if (side := min(delta.up.shape[0], fan_in(delta.shape))) < len(values):
            values[side:] *= 0  # not 0 itself: NaN stays NaN
    root = scale.abs().sqrt()
    # What no recipe can keep would only wait in memory until the file is written.
    left, right = left[:, :, :limit] * torch.copysign(root, scale)[:, :, None], right[:, :limit] * root[:, :, None]
    return list(zip(sigma, left.float(), right.float(), strict=True))


def _of_statistics(delta: Delta, statistics: Callable[[Delta], Grams], device: torch.device) -> Spectrum:
    """The spectrum in the norm of Gram matrices from statistics."""
    (own,) = computed(_grams_each, [delta], device)
    weighted = [gram[None].double() for gram in statistics(delta)]
    ((sigma, left, right),) = _with_scale([delta], *solve(*weighted, clip=_STATISTICS_CLIP))
    return Spectrum(sigma if own.finite else sigma * math.nan, left, right, plain=_Plain(own, delta.scale))


def _of_dense(delta: Dense, limit: int | None, device: torch.device) -> Spectrum:
    if limit is not None and limit + _SKETCH_EXTRA <= _SKETCH_SHARE * delta.rank:
        # The first `limit` dimensions; what they leave out is known to the last digit.
        blocks = torch.split(delta.matrix.reshape(-1), CPU_BLOCK)
        total = delta.scale**2 * float(torch.stack([block.double() @ block.double() for block in blocks]).sum())
        if not math.isfinite(total):
            return Spectrum(torch.full((limit,), math.nan, dtype=torch.float64))
        sigma = _sketch(delta, limit, device)[1].sigma[:limit]
        return Spectrum(sigma, limit=limit, tail=max(0.0, total - float((sigma**2).sum())))
    gram = _dense_gram(delta.matrix.to(device))
    if not torch.isfinite(gram.diagonal().sum()):
        return Spectrum(torch.full((delta.rank,), math.nan, dtype=torch.float64))
    sigma = eigvalsh(gram).flip(-1).clamp(min=0).sqrt()
    return Spectrum(abs(delta.scale) * torch.where(sigma > SIGMA_FLOOR * sigma[:1], sigma, 0).cpu())


def _dense_gram(matrix: Tensor) -> Tensor:
    """[r, r] float64 of the shorter side."""
    return factor_gram(matrix, columns=matrix.shape[0] > matrix.shape[1])


def _sketch(delta: Dense, limit: int, device: torch.device) -> tuple[Delta, Spectrum]:
    """ΔW projected on the space of its first `limit` left vectors and some more, by subspace iteration."""
    dtype, columns = _product_dtype(delta, device), limit + _SKETCH_EXTRA
    matrix = delta.matrix.to(device, dtype)
    # The same random numbers each time: what is written must be what was judged.
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(matrix.shape[1], columns, generator=generator, dtype=dtype).to(device)
    basis = torch.linalg.qr(matrix @ start).Q
    for _ in range(_SKETCH_ROUNDS):
        basis = torch.linalg.qr(matrix @ torch.linalg.qr(matrix.mT @ basis).Q).Q
    projected = Delta(basis.cpu(), (basis.mT @ matrix).cpu(), delta.scale, delta.shape)
    return projected, spectrum(projected)


def _of_kronecker(delta: Kronecker, device: torch.device) -> Spectrum:
    first = _of_dense(delta.first, None, device)
    second = spectrum(delta.second) if isinstance(delta.second, Delta) else _of_dense(delta.second, None, device)
    products = torch.outer(first.sigma, second.sigma).flatten()
    order = products.argsort(descending=True, stable=True)
    sigma = products[order]
    sigma = torch.where(sigma > SIGMA_FLOOR * sigma[:1], sigma, 0 * sigma)  # not 0 itself: NaN stays NaN
    return Spectrum(sigma, pair=_Pair(first, second, order))


def _of_experts(delta: Experts, limit: int | None, device: torch.device) -> Spectrum:
    spectra = _of_solution(delta.parts, *_solved(grams(delta.parts, device)), limit=limit)
    sigma = torch.stack([spectrum.sigma for spectrum in spectra]).square().sum(0).sqrt()
    left, right = (torch.stack([getattr(spectrum, side) for spectrum in spectra]) for side in ("left", "right"))
    tail, square = (sum(getattr(spectrum, name) for spectrum in spectra) for name in ("tail", "square"))
    return Spectrum(sigma, left, right, tail=tail, square=square)


# --- chunks of layers ---------------------------------------------------------------------------


def _chunk_size(rank: int, device: torch.device) -> int:
    """Layers solved at once: on a GPU as many as memory likes, on a CPU enough to hide the overhead of calls."""
    if device.type != "cpu":
        layers = _DEVICE_LAYERS if solver_device(device, rank) == device else _DEVICE_LAYERS // 4
        return max(1, min(layers, _DEVICE_CORE_BYTES // (8 * rank * rank)))
    return 1 if rank >= _LARGE_RANK else max(4, 1024 // rank)


def _decompose_chunk(
    items: Sequence[Item],
    device: torch.device,
    loading: AbstractContextManager[None] = nullcontext(),
) -> list[Spectrum | Exception]:
    """The spectrum of each layer, or the error with which it could not be loaded."""
    deltas: list[AnyDelta | Exception] = []
    with loading:
        for item in items:
            try:
                deltas.append(item.load())
            except Exception as error:
                deltas.append(error)
    solutions = spectra_of_factors(items, deltas, device)
    outcomes: list[Spectrum | Exception] = []
    for index, (item, delta) in enumerate(zip(items, deltas, strict=True)):
        if isinstance(delta, Exception):
            outcomes.append(delta)
        elif item.grams is not None:
            outcomes.append(_of_statistics(delta.factored(), item.grams, device))
        elif index in solutions:
            outcomes.append(solutions[index])
        else:
            spectra: list[Spectrum] = computed(partial(_of_other_forms, limit=item.limit), [delta], device)
            outcomes += spectra
    return outcomes


def _of_other_forms(
    deltas: Sequence[Dense | Kronecker | Experts], device: torch.device, limit: int | None
) -> list[Spectrum]:
    """The spectra of what is no two factors."""
    spectra = []
    for delta in deltas:
        match delta:
            case Dense():
                spectra.append(_of_dense(delta, limit, device))
            case Kronecker():
                spectra.append(_of_kronecker(delta, device))
            case Experts():
                spectra.append(_of_experts(delta, limit, device))
    return spectra


def spectra_of_factors(
    items: Sequence[Item], deltas: Sequence[AnyDelta | Exception], device: torch.device
) -> dict[int, Spectrum]:
    """Index -> spectrum of the layers in two factors without statistics; those of equal rank are one batch."""
    batches: dict[tuple[int, int | None], dict[int, Delta]] = defaultdict(dict)
    for index, (item, delta) in enumerate(zip(items, deltas, strict=True)):
        if isinstance(delta, Delta) and item.grams is None:
            batches[delta.rank, item.limit][index] = delta
    spectra: dict[int, Spectrum] = {}
    for (rank, limit), layers in batches.items():
        batch = list(layers.values())
        if solver_device(device, rank) == device:
            solutions = computed(lambda part, gpu: [_solved(grams(part, gpu))], batch, device)
        else:  # by this thread, while the GPU goes on
            pairs = computed(_grams_each, batch, device)
            solutions = [_solved(Grams(*map(torch.stack, zip(*pairs, strict=True))))]
        rest, results = iter(batch), list[Spectrum]()
        for solution in solutions:
            results += _of_solution(list(islice(rest, len(solution[0]))), *solution, limit=limit)
        spectra |= zip(layers, results, strict=True)
    return spectra


def _of_solution(
    deltas: Sequence[Delta],
    sigma: Tensor,
    left: Tensor,
    right: Tensor,
    squares: Tensor,
    roundings: Tensor,
    *,
    limit: int | None,
) -> list[Spectrum]:
    """The spectra of layers from the solution of their Gram matrices, with norms that come from these alone."""
    scaled = _with_scale(deltas, sigma, left, right, limit)
    spectra = []
    for delta, maps, square, rounding in zip(deltas, scaled, squares.tolist(), roundings.tolist(), strict=True):
        square *= delta.scale**2
        # What sigma lacks of that: no recipe can keep it, and every loss contains it.
        missing = square - float(maps[0] @ maps[0])
        tail = missing if missing > delta.scale**2 * rounding else 0.0
        spectra.append(Spectrum(*maps, tail=tail, square=square))
    return spectra


def _solved(own: Grams) -> list[Tensor]:
    """What `solve` gives, and the norms' squares with their roundings, on the CPU."""
    return on_cpu(*solve(*own), *own.squares())


def _grams_each(deltas: Sequence[Delta], device: torch.device) -> list[Grams]:
    """The Gram matrices of each layer, on the CPU."""
    own = grams(deltas, device)
    return list(map(Grams, *on_cpu(*own)))
