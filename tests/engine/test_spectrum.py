"""The engine against dense float64 decompositions, planted spectra, and what must hold for every input."""

from __future__ import annotations

import math
from concurrent.futures import CancelledError, ThreadPoolExecutor

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from lorashrink.engine import spectrum as engine
from lorashrink.engine.delta import Delta, Dense, Kronecker
from lorashrink.engine.gram import Grams, solve
from lorashrink.engine.spectrum import Item, alignment, decompose, spectrum, truncate

SHAPES = [(64, 6, 48), (48, 6, 64), (8, 12, 8), (1, 1, 1), (5, 3, 1), (1, 3, 5), (300, 64, 200), (40, 40, 40)]


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def random_delta(out: int, rank: int, columns: int, *, scale: float = 1.0, seed: int = 0) -> Delta:
    return Delta(randn(out, rank, seed=seed), randn(rank, columns, seed=seed + 1), scale, (out, columns))


def planted(sigma: list[float], out: int = 50, columns: int = 70, rank: int | None = None, seed: int = 3) -> Delta:
    """A delta with these singular values, its factors mixed so that neither shows them."""
    size, rank = len(sigma), rank or len(sigma)
    left = torch.linalg.qr(randn(out, size, seed=seed)).Q
    right = torch.linalg.qr(randn(columns, size, seed=seed + 1)).Q
    mix = torch.linalg.qr(randn(rank, size, seed=seed + 2)).Q
    half = torch.tensor(sigma, dtype=torch.float64).sqrt()
    return Delta((left * half) @ mix.T, mix @ (right * half).T, 1.0, (out, columns))


def dense(delta: Delta) -> Tensor:
    return delta.scale * (delta.up.double() @ delta.down.double())


@st.composite
def deltas(draw: st.DrawFn) -> Delta:
    """Any shapes, ranks and scales; factors with zero, equal and tiny columns."""
    out, columns, rank = draw(st.integers(1, 24)), draw(st.integers(1, 24)), draw(st.integers(1, 16))
    seed = draw(st.integers(0, 10**6))
    up, down = randn(out, rank, seed=seed), randn(rank, columns, seed=seed + 1)
    column = draw(st.integers(0, rank - 1))
    match draw(st.sampled_from(["plain", "zero up", "zero down", "zero both", "equal", "all zero", "steep"])):
        case "zero up":
            up[:, column] = 0
        case "zero down":
            down[column] = 0
        case "zero both":
            up[:, column], down[column] = 0, 0
        case "equal":
            down[column] = down[0]
        case "all zero":
            up *= 0
        case "steep":
            up *= 10.0 ** -torch.arange(rank, dtype=torch.float64)
    scale = draw(st.sampled_from([1.0, 0.0625, -2.0, 1e-6, 3e5]))
    return Delta(up, down, scale, (out, columns))


@pytest.mark.parametrize("decades", [2, 7, 12, 30])
@pytest.mark.parametrize("dependent", [False, True], ids=["independent", "dependent"])
def test_dimensions_balanced_against_each_other_are_all_found(decades: int, dependent: bool) -> None:
    up, down = randn(32, 8), randn(8, 40, seed=1)
    if dependent:
        down[5], up[:, 2] = down[4], up[:, 1]
    plain = Delta(up, down, 0.5, (32, 40))
    skew = 2.0 ** (torch.linspace(-decades / 2, decades / 2, 8, dtype=torch.float64) / math.log10(2)).round()
    skewed = Delta(up * skew, down / skew[:, None], 0.5, (32, 40))
    assert torch.equal(dense(skewed), dense(plain))
    solved = spectrum(skewed)
    assert_close(solved.sigma, torch.linalg.svdvals(dense(plain))[:8], rtol=1e-9, atol=1e-9)
    kept = range(solved.rank)
    up_out, down_out = truncate(skewed, solved, kept)
    assert_close(up_out @ down_out, dense(plain), rtol=1e-5, atol=1e-5)


def test_a_dimension_that_the_solution_lacks_counts_as_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    def lacking(*stacked: Tensor) -> tuple[Tensor, ...]:
        sigma, left, right = solve(*stacked)
        sigma[:, 4:] = 0
        return sigma, left, right

    delta = random_delta(30, 6, 20, scale=-0.5)
    monkeypatch.setattr(engine, "solve", lacking)
    solved = spectrum(delta)
    expected = torch.linalg.svdvals(dense(delta))[:6]
    assert solved.total == pytest.approx(float((expected**2).sum()))
    assert solved.lost(range(4)) == pytest.approx(float(expected[4:].norm()))


@pytest.mark.parametrize(("out", "rank", "columns"), SHAPES)
def test_the_spectrum_is_that_of_the_dense_svd(out: int, rank: int, columns: int) -> None:
    delta = random_delta(out, rank, columns, scale=-0.25)
    real = min(out, rank, columns)
    sigma = spectrum(delta).sigma
    assert_close(sigma[:real], torch.linalg.svdvals(dense(delta))[:real], rtol=1e-9, atol=0)
    assert torch.equal(sigma[real:], torch.zeros(rank - real, dtype=torch.float64))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_half_precision_factors_lose_nothing_on_the_way(dtype: torch.dtype) -> None:
    delta = Delta(randn(200, 16, dtype=dtype), randn(16, 333, seed=1, dtype=dtype), 0.5, (200, 333))
    assert_close(spectrum(delta).sigma, torch.linalg.svdvals(dense(delta))[:16], rtol=1e-9, atol=0)


def test_planted_singular_values_come_back_in_order() -> None:
    assert_close(
        spectrum(planted([3.0, 2.0, 1e-3])).sigma,
        torch.tensor([3.0, 2.0, 1e-3], dtype=torch.float64),
        rtol=1e-9,
        atol=0,
    )


def test_values_down_to_a_thousandth_of_the_largest_are_exact() -> None:
    sigma = torch.logspace(0, -3, 24, dtype=torch.float64)
    assert_close(spectrum(planted(sigma.tolist(), 200, 300)).sigma, sigma, rtol=1e-9, atol=0)


def test_values_of_a_huge_ratio_are_all_present() -> None:
    sigma = spectrum(planted([1.0, 1e-2, 1e-6])).sigma
    assert_close(sigma[:2], torch.tensor([1.0, 1e-2], dtype=torch.float64), rtol=1e-9, atol=0)
    assert float(sigma[2]) == pytest.approx(1e-6, rel=1e-3)


@pytest.mark.parametrize("sigma", [[2.0, 1.0], [1.0]], ids=["rank 2 of 6", "rank 1 of 6"])
def test_padded_ranks_are_exactly_zero(sigma: list[float]) -> None:
    result = spectrum(planted(sigma, rank=6))
    assert result.rank == len(sigma)
    assert_close(result.sigma, torch.tensor([*sigma, *[0.0] * (6 - len(sigma))]).double(), rtol=1e-9, atol=0)


def test_a_zero_layer_has_a_zero_spectrum() -> None:
    result = spectrum(Delta(torch.zeros(8, 4), torch.randn(4, 8), 1.0, (8, 8)))
    assert result.finite
    assert result.rank == 0


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("side", ["up", "down"])
def test_a_number_that_is_not_finite_marks_its_layer_alone(bad: float, side: str) -> None:
    broken, sound = random_delta(20, 4, 30), random_delta(20, 4, 30, seed=7)
    getattr(broken, side)[2, 3] = bad
    with ThreadPoolExecutor(1) as pool:
        first, second = decompose([Item(lambda: broken, 4), Item(lambda: sound, 4)], pool)
    assert not first.result().finite
    assert torch.equal(second.result().sigma, spectrum(sound).sigma)


@given(deltas())
def test_the_dense_svd_agrees_for_any_factors(delta: Delta) -> None:
    truth = torch.linalg.svdvals(dense(delta))
    sigma = spectrum(delta).sigma
    count = min(len(truth), len(sigma))
    largest = float(truth[0])
    # A Gram matrix squares the condition number; of both factors here, which "steep" makes as bad as can be.
    assert float((sigma[:count] ** 2 - truth[:count] ** 2).abs().max()) <= 1e-12 * max(largest**2, 1e-300) * count
    assert bool((sigma[:-1] >= sigma[1:]).all())


@given(deltas())
def test_all_dimensions_together_are_the_delta(delta: Delta) -> None:
    result = spectrum(delta)
    up, down = truncate(delta, result, range(result.rank))
    size = float(dense(delta).norm())
    noise = abs(delta.scale) * float(delta.up.norm() * delta.down.norm())
    assert float((up.double() @ down.double() - dense(delta)).norm()) <= 2e-6 * max(size, noise)


@given(deltas(), st.integers(0, 16))
def test_truncation_is_the_best_approximation_of_its_rank(delta: Delta, rank: int) -> None:
    """The error is the root sum of squares of the dropped values."""
    result = spectrum(delta)
    rank = min(rank, result.rank)
    up, down = truncate(delta, result, range(rank))
    error = float((up.double() @ down.double() - dense(delta)).norm())
    best = float(torch.linalg.svdvals(dense(delta))[rank:].norm())
    assert error <= best + 2e-6 * abs(delta.scale) * float(delta.up.norm() * delta.down.norm())


def test_both_factors_carry_the_root_of_sigma_and_the_scale() -> None:
    delta = random_delta(60, 8, 90, scale=-0.125)
    result = spectrum(delta)
    up, down = truncate(delta, result, range(8))
    assert_close(up.double().norm(dim=0) ** 2, result.sigma, rtol=1e-5, atol=0)
    assert_close(down.double().norm(dim=1) ** 2, result.sigma, rtol=1e-5, atol=0)


def test_any_dimensions_may_be_kept_and_scaled_and_padded() -> None:
    delta = random_delta(30, 6, 40)
    up, down = truncate(delta, spectrum(delta), [0, 3], width=5, scale=-2.0)
    u, s, v = torch.linalg.svd(dense(delta), full_matrices=False)
    expected = -2 * (s[0] * torch.outer(u[:, 0], v[0]) + s[3] * torch.outer(u[:, 3], v[3]))
    assert up.shape == (30, 5)
    assert down.shape == (5, 40)
    assert not up[:, 2:].any()
    assert_close(up.double() @ down.double(), expected, rtol=1e-5, atol=1e-5)


@given(st.integers(0, 10**6), st.floats(0.5, 30))
def test_the_spectrum_does_not_depend_on_the_gauge(seed: int, spread: float) -> None:
    """up·M and M⁻¹·down are other factors of the same ΔW."""
    delta = random_delta(30, 5, 40, seed=seed)
    rotation = torch.linalg.qr(randn(5, 5, seed=seed + 2)).Q
    gauge = rotation @ torch.diag(torch.logspace(0, math.log10(spread), 5, dtype=torch.float64)) @ rotation.T
    turned = Delta(delta.up @ gauge, torch.linalg.inv(gauge) @ delta.down, 1.0, delta.shape)
    assert_close(spectrum(turned).sigma, spectrum(delta).sigma, rtol=1e-9, atol=0)


@given(st.floats(1e-12, 1e12), st.sampled_from([1, -1]))
def test_strength_scales_the_spectrum_and_nothing_else(size: float, sign: int) -> None:
    delta = random_delta(20, 5, 30)
    stronger = Delta(delta.up * size, delta.down, 2.0 * sign, delta.shape)
    assert_close(spectrum(stronger).sigma, 2 * size * spectrum(delta).sigma, rtol=1e-9, atol=0)


def test_layers_of_many_ranks_and_shapes_keep_their_order_in_a_pool() -> None:
    layers = [random_delta(10 + 7 * (i % 5), 1 + i % 9, 12 + 5 * (i % 3), seed=i) for i in range(200)]
    items = [Item(lambda delta=delta: delta, delta.rank) for delta in layers]
    with ThreadPoolExecutor(2) as pool:
        together = [future.result() for future in decompose(items, pool)]
    for delta, result in zip(layers, together, strict=True):
        assert_close(result.sigma, spectrum(delta).sigma, rtol=1e-12, atol=0)


def test_the_error_of_one_layer_is_its_own() -> None:
    def broken() -> Delta:
        raise OSError("gone")

    delta = random_delta(8, 2, 8)
    with ThreadPoolExecutor(1) as pool:
        first, second = decompose([Item(broken, 2), Item(lambda: delta, 2)], pool)
    with pytest.raises(OSError, match="gone"):
        first.result()
    assert second.result().rank == 2


def test_a_pool_that_is_shut_down_cancels_instead_of_hanging() -> None:
    delta = random_delta(8, 2, 8)
    pool = ThreadPoolExecutor(1)
    with pool:
        pending = decompose([Item(lambda: delta, 2)] * 50_000, pool)
        pool.shutdown(wait=True, cancel_futures=True)
    assert all(layer.chunk.done() for layer in pending)
    with pytest.raises(CancelledError):
        pending[-1].result()


# --- matrices and Kronecker products ------------------------------------------------------------

FORMS = {
    "tall matrix": Dense(randn(24, 20), -0.5, (24, 20)),
    "wide matrix": Dense(randn(12, 20), 0.5, (12, 20)),
    "product of matrices": Kronecker(Dense(randn(3, 2), -0.5, (3, 2)), Dense(randn(4, 10), 1.0, (4, 10)), (12, 20)),
    "product with factors": Kronecker(
        Dense(randn(3, 4), -0.5, (3, 4)), Delta(randn(4, 2), randn(2, 5), 3.0, (4, 5)), (12, 20)
    ),
}


@pytest.mark.parametrize("delta", FORMS.values(), ids=FORMS.keys())
def test_every_form_has_the_spectrum_of_its_dense_svd(delta: Dense | Kronecker) -> None:
    result = spectrum(delta)
    matrix = delta.row_reader(torch.device("cpu"))(0, delta.shape[0])
    u, s, v = torch.linalg.svd(matrix, full_matrices=False)
    assert len(result.sigma) == delta.rank
    assert_close(result.sigma, s[: delta.rank], rtol=1e-9, atol=0)
    up, down = truncate(delta, result, [0, 2])
    expected = s[0] * torch.outer(u[:, 0], v[0]) + s[2] * torch.outer(u[:, 2], v[2])
    assert_close(up.double() @ down.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("delta", FORMS.values(), ids=FORMS.keys())
def test_every_form_is_calibrated_at_its_own_rank(delta: Dense | Kronecker) -> None:
    out, columns = delta.shape
    c, g = statistics(columns, 200, 5), statistics(out, 200, 6)
    factors = delta.factored(torch.float64)
    result = spectrum(delta, Grams(factors.down @ c @ factors.down.T, factors.up.T @ g @ factors.up))
    matrix = delta.row_reader(torch.device("cpu"))(0, out)
    u, s, v = torch.linalg.svd(root(g) @ matrix @ root(c), full_matrices=False)
    assert_close(result.sigma, s[: delta.rank], rtol=1e-6, atol=0)
    up, down = truncate(delta, result, range(2))
    best = u[:, :2] @ torch.diag(s[:2]) @ v[:2]
    assert_close(root(g) @ (up.double() @ down.double()) @ root(c), best, rtol=1e-4, atol=1e-5 * float(s[0]))


# --- statistics: truncation that is best for a model's output ---------------------------


def statistics(columns: int, count: int, seed: int) -> Tensor:
    samples = randn(columns, count, seed=seed)
    return samples @ samples.T / count


def root(matrix: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(matrix)
    return vectors @ torch.diag(values.clamp(min=0).sqrt()) @ vectors.T


@pytest.mark.parametrize("inputs", [200, 3], ids=["full rank", "singular"])
def test_gram_matrices_of_statistics_yield_the_svd_in_their_norm(inputs: int) -> None:
    delta = random_delta(30, 8, 40)
    c, g = statistics(40, inputs, 5), statistics(30, 200, 6)
    result = spectrum(delta, Grams(delta.down @ c @ delta.down.T, delta.up.T @ g @ delta.up))
    u, s, v = torch.linalg.svd(root(g) @ dense(delta) @ root(c), full_matrices=False)
    count = min(8, inputs)
    assert result.rank == count
    assert_close(result.sigma[:count], s[:count], rtol=1e-7, atol=0)
    kept = count - 1
    up, down = truncate(delta, result, range(kept))
    best = u[:, :kept] @ torch.diag(s[:kept]) @ v[:kept]
    assert_close(root(g) @ (up.double() @ down.double()) @ root(c), best, rtol=1e-4, atol=1e-5 * float(s[0]))


def test_a_layer_that_the_output_does_not_feel_has_a_zero_spectrum() -> None:
    delta = random_delta(30, 8, 40)
    assert spectrum(delta, Grams(delta.down @ delta.down.T, torch.zeros(8, 8))).rank == 0


@given(st.integers(0, 10**6), st.integers(1, 7))
def test_calibrated_truncation_is_the_better_one_in_its_own_norm(seed: int, kept: int) -> None:
    delta = random_delta(20, 8, 24, seed=seed)
    c, g = statistics(24, 6, seed + 5), statistics(20, 30, seed + 6)
    calibrated = Grams(delta.down @ c @ delta.down.T, delta.up.T @ g @ delta.up)

    def error(grams: Grams | None) -> float:
        result = spectrum(delta, grams)
        up, down = truncate(delta, result, range(min(kept, result.rank)))
        return float((root(g) @ (up.double() @ down.double() - dense(delta)) @ root(c)).norm())

    assert error(calibrated) <= error(None) * (1 + 1e-5) + 1e-6


def test_many_problems_at_once_are_solved_like_each_alone() -> None:
    layers = [random_delta(20, 6, 30, seed=i) for i in range(5)] + [
        Delta(torch.zeros(20, 6), randn(6, 30), 1, (20, 30))
    ]
    down = torch.stack([delta.down.double() @ delta.down.double().T for delta in layers])
    up = torch.stack([delta.up.double().T @ delta.up.double() for delta in layers])
    sigma, _, _ = solve(down, up)
    for delta, values in zip(layers, sigma, strict=True):
        assert_close(values, spectrum(delta).sigma, rtol=1e-12, atol=0)


def test_alignment_is_u_w_v_of_every_pair() -> None:
    delta, weight = random_delta(30, 5, 40, scale=0.5), randn(30, 40, seed=9)
    u, _, v = torch.linalg.svd(dense(delta), full_matrices=False)
    expected = torch.stack([u[:, i] @ weight @ v[i] for i in range(5)])
    assert_close(alignment(delta, spectrum(delta), weight), expected, rtol=1e-4, atol=1e-5)


def test_alignment_past_the_numerical_rank_is_zero() -> None:
    delta = planted([2.0, 1.0], rank=4)
    assert torch.equal(alignment(delta, spectrum(delta), randn(50, 70))[2:], torch.zeros(2, dtype=torch.float64))
