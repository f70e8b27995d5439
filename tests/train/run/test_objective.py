"""Noise, targets and losses against dense float64 references, closed formulas, and what must hold for every seed."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from lorashrink.train.data.batches import generator, numbers
from lorashrink.train.flags.options import Options
from lorashrink.train.run.objective import Noised, Objective

KEYS = [("a.png", 0, epoch) for epoch in range(8)]


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def signal(zero_terminal: bool = False) -> Tensor:
    """The share of the signal's variance at each timestep, in float64 by the schedule's definition."""
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    share = torch.cumprod(1 - betas, 0)
    if not zero_terminal:
        return share
    # Lin et al. 2023, algorithm 1: shift and stretch the amplitude so that it ends at 0 and starts as before.
    amplitude = share.sqrt()
    return ((amplitude - amplitude[-1]) * amplitude[0] / (amplitude[0] - amplitude[-1])) ** 2


def noised(options: Options, latents: Tensor, keys: list[tuple[str, int, int]] = KEYS, seed: int = 5) -> Noised:
    return Objective(options).noised(latents, keys[: len(latents)], seed)


def noise(options: Options, latents: Tensor, keys: list[tuple[str, int, int]] = KEYS) -> Tensor:
    return noised(options, latents, keys).target


@pytest.mark.parametrize("zero_terminal", [False, True])
def test_the_noise_schedule_is_that_of_sdxl(zero_terminal: bool) -> None:
    schedule = Objective(Options(zero_terminal_snr=zero_terminal)).noise_schedule
    assert_close(schedule.alphas_cumprod.double(), signal(zero_terminal), rtol=2e-3, atol=2e-8)
    assert_close(schedule.alphas_cumprod[:900].double(), signal(zero_terminal)[:900], rtol=5e-5, atol=0)


def test_noise_prediction_targets_the_noise_that_was_mixed_in() -> None:
    latents = randn(8, 4, 6, 5)
    batch = noised(Options(), latents)
    share = signal()[batch.timesteps].view(-1, 1, 1, 1)
    assert_close(batch.noisy.double(), share.sqrt() * latents + (1 - share).sqrt() * batch.target, rtol=1e-4, atol=1e-4)
    assert batch.timesteps.dtype == torch.int64
    assert batch.noisy.dtype == batch.target.dtype == torch.float32


def test_v_prediction_asks_for_v_of_the_same_noise() -> None:
    latents = randn(8, 4, 6, 5)
    plain, batch = noised(Options(), latents), noised(Options(v_parameterization=True), latents)
    share = signal()[batch.timesteps].view(-1, 1, 1, 1)
    assert torch.equal(batch.noisy, plain.noisy)
    # Salimans and Ho 2022: v = alpha * noise - sigma * latents.
    expected = share.sqrt() * plain.target - (1 - share).sqrt() * latents
    assert_close(batch.target.double(), expected, rtol=1e-4, atol=1e-4)


def test_with_zero_terminal_snr_the_last_timestep_is_noise_alone() -> None:
    last = {"min_timestep": 999, "max_timestep": 1000}
    latents = randn(2, 4, 6, 5)
    batch = noised(Options(zero_terminal_snr=True, **last), latents)
    assert torch.equal(batch.noisy, batch.target)
    ordinary = noised(Options(**last), latents)
    assert not torch.equal(ordinary.noisy, ordinary.target)


EVERY_NOISE = Options(noise_offset=0.1, noise_offset_random_strength=True, adaptive_noise_scale=0.05)


@pytest.mark.parametrize("options", [Options(), EVERY_NOISE])
def test_the_noise_of_a_picture_does_not_depend_on_its_batch(options: Options) -> None:
    latents, objective = randn(4, 4, 6, 5), Objective(options)
    together = objective.noised(latents, KEYS[:4], 5)
    torch.manual_seed(99)
    for position in (3, 0):
        alone = objective.noised(latents[position : position + 1], [KEYS[position]], 5)
        assert torch.equal(alone.noisy[0], together.noisy[position])
        assert torch.equal(alone.target[0], together.target[position])
        assert alone.timesteps[0] == together.timesteps[position]


def test_multires_noise_differs_between_batches_by_a_factor() -> None:
    options, latents = Options(multires_noise_iterations=6), randn(4, 4, 16, 16)
    ratio = noise(options, latents[:1])[0] / noise(options, latents)[0]
    assert_close(ratio, ratio[0, 0, 0].expand_as(ratio), rtol=1e-4, atol=0)


def test_neither_the_global_generator_nor_its_state_plays_a_part() -> None:
    options = Options(noise_offset=0.1, noise_offset_random_strength=True, multires_noise_iterations=4)
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = noised(options, randn(2, 4, 8, 8))
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    assert torch.equal(noised(options, randn(2, 4, 8, 8)).noisy, first.noisy)


def test_every_key_and_every_seed_has_its_own_noise_and_timestep() -> None:
    latents = torch.zeros(8, 4, 6, 5)
    batch = [noised(Options(), latents, seed=seed) for seed in (5, 6)]
    pictures = torch.cat([part.target for part in batch]).flatten(1)
    distances = torch.cdist(pictures, pictures) + 99 * torch.eye(16)
    assert distances.min() > 5
    assert torch.cat([part.timesteps for part in batch]).unique().numel() > 12


def test_plain_noise_is_standard_normal() -> None:
    drawn = noise(Options(), torch.zeros(8, 4, 64, 64))
    # 131072 numbers: six standard errors of the mean, of the variance and of the kurtosis.
    assert abs(drawn.mean()) < 6 / 131072**0.5
    assert abs(drawn.var() - 1) < 6 * (2 / 131072) ** 0.5
    assert abs((drawn**4).mean() - 3) < 6 * (96 / 131072) ** 0.5


@pytest.mark.parametrize(
    ("limits", "lowest", "highest"),
    [({}, 0, 999), ({"min_timestep": 200}, 200, 999), ({"max_timestep": 300}, 0, 299)],
)
def test_timesteps_are_uniform_from_the_first_to_before_the_last(
    limits: dict[str, int], lowest: int, highest: int
) -> None:
    objective, latents = Objective(Options(**limits)), torch.zeros(1, 4, 1, 1)
    drawn = [int(objective.noised(latents, [("a.png", number)], 5).timesteps) for number in range(1000)]
    width = highest - lowest + 1
    assert lowest <= min(drawn) < lowest + width / 50
    assert highest - width / 50 < max(drawn) <= highest
    assert abs(sum(drawn) / 1000 - (lowest + highest) / 2) < 5 * width / math.sqrt(12 * 1000)


@pytest.mark.parametrize("limits", [(700, 700), (700, 701)])
def test_limits_that_leave_one_timestep_give_that_one(limits: tuple[int, int]) -> None:
    options = Options(min_timestep=limits[0], max_timestep=limits[1])
    assert noised(options, torch.zeros(8, 4, 2, 2)).timesteps.tolist() == [700] * 8


def shift(options: Options, latents: Tensor) -> Tensor:
    """What the options add to plain noise, which is one number for each channel of each picture."""
    added = noise(options, latents) - noise(Options(), latents)
    assert_close(added, added[..., :1, :1].expand_as(added), rtol=0, atol=1e-6)
    return added[..., 0, 0]


def test_noise_offset_shifts_channels_by_scaled_normal_numbers() -> None:
    keys = [("a.png", number) for number in range(500)]
    latents = torch.zeros(500, 4, 1, 1)
    plain = Objective(Options()).noised(latents, keys, 5).target
    shifts = (Objective(Options(noise_offset=0.3)).noised(latents, keys, 5).target - plain).flatten()
    assert abs(shifts.mean()) < 5 * 0.3 / 2000**0.5
    assert abs(shifts.std() / 0.3 - 1) < 5 / 4000**0.5
    assert_close(shift(Options(noise_offset=0.6), torch.zeros(8, 4, 3, 3)).flatten(), 2 * shifts_of(0.3).flatten())


def shifts_of(offset: float) -> Tensor:
    return shift(Options(noise_offset=offset), torch.zeros(8, 4, 3, 3))


def test_random_strength_is_uniform_with_one_number_per_picture() -> None:
    keys = [("a.png", number) for number in range(500)]
    latents = torch.zeros(500, 4, 1, 1)
    plain, full, partly = (
        Objective(options).noised(latents, keys, 5).target.flatten(1)
        for options in (
            Options(),
            Options(noise_offset=8.0),
            Options(noise_offset=8.0, noise_offset_random_strength=True),
        )
    )
    strength = ((partly - plain) / (full - plain)).median(1).values
    assert_close(partly, plain + strength[:, None] * (full - plain), rtol=0, atol=1e-4)
    assert 0 <= strength.min() < 0.02
    assert 0.98 < strength.max() <= 1
    assert abs(strength.mean() - 0.5) < 5 / math.sqrt(12 * 500)


@pytest.mark.parametrize("adaptive", [0.5, -0.5, -1000.0])
def test_adaptive_noise_follows_channel_means_down_to_zero(adaptive: float) -> None:
    latents = randn(8, 4, 3, 3)
    strength = (0.3 + adaptive * latents.mean((2, 3)).abs()).clamp(min=0)
    result = shift(Options(noise_offset=0.3, adaptive_noise_scale=adaptive), latents)
    assert_close(result, shift(Options(noise_offset=0.3), latents) / 0.3 * strength, rtol=1e-4, atol=2e-6)


def enlarging(small: int, large: int) -> Tensor:
    """The matrix of bilinear enlargement whose pixels are areas: pixel i of the large lies at (i + 1/2) s - 1/2."""
    matrix = torch.zeros(large, small, dtype=torch.float64)
    for row in range(large):
        position = max(0.0, (row + 0.5) * small / large - 0.5)
        low = int(position)
        matrix[row, low] += 1 - (position - low)
        matrix[row, min(low + 1, small - 1)] += position - low
    return matrix


def dense_multires(options: Options, shape: tuple[int, int], key: tuple[str, int, int]) -> Tensor:
    """Multi-resolution noise before its division by the standard deviation, in float64 with dense matrices."""
    tensors, chance = generator(5, "noise", *key), numbers(5, "noise", *key)
    total = torch.randn(4, *shape, generator=tensors).double()
    total += (options.noise_offset or 0) * torch.randn(4, 1, 1, generator=tensors)
    for level in range(options.multires_noise_iterations or 0):
        shrink = (2 + 2 * chance.random()) ** level
        height, width = (max(1, int(side / shrink)) for side in shape)
        coarse = torch.randn(1, 4, height, width, generator=tensors)[0].double()
        total += (
            enlarging(height, shape[0]) @ coarse @ enlarging(width, shape[1]).T * options.multires_noise_discount**level
        )
        if height == 1 or width == 1:
            break
    return total


@pytest.mark.parametrize("shape", [(16, 16), (24, 9), (1, 7)])
@pytest.mark.parametrize(("iterations", "discount", "offset"), [(10, 0.1, None), (3, 0.8, None), (6, 0.3, 0.2)])
def test_multires_noise_is_the_normalised_dense_pyramid(
    shape: tuple[int, int], iterations: int, discount: float, offset: float | None
) -> None:
    options = Options(multires_noise_iterations=iterations, multires_noise_discount=discount, noise_offset=offset)
    expected = torch.stack([dense_multires(options, shape, key) for key in KEYS[:3]])
    result = noise(options, torch.zeros(3, 4, *shape))
    assert_close(result.double(), expected / expected.std(), rtol=1e-4, atol=1e-5)


def test_multires_noise_has_unit_deviation_and_more_low_frequencies() -> None:
    plain, coarse = (
        noise(options, torch.zeros(8, 4, 64, 64))
        for options in (Options(), Options(multires_noise_iterations=10, multires_noise_discount=0.8))
    )
    assert_close(coarse.std(), torch.tensor(1.0))
    means = [torch.nn.functional.avg_pool2d(part, 16).var() for part in (plain, coarse)]
    # The variance of the mean of 256 independent numbers is 1/256.
    assert means[0] == pytest.approx(1 / 256, rel=0.3)
    assert means[1] > 20 * means[0]


def test_the_pyramid_ends_at_one_pixel() -> None:
    latents = torch.zeros(2, 4, 16, 16)
    assert torch.equal(
        noise(Options(multires_noise_iterations=10), latents), noise(Options(multires_noise_iterations=500), latents)
    )


@pytest.mark.parametrize(
    "options",
    [
        Options(multires_noise_iterations=0, multires_noise_discount=0.9),
        Options(multires_noise_discount=0.9),
        Options(noise_offset=0.0, noise_offset_random_strength=False, adaptive_noise_scale=0.4),
    ],
)
def test_noise_options_that_are_off_change_nothing(options: Options) -> None:
    assert torch.equal(noise(options, randn(2, 4, 8, 8)), noise(Options(), randn(2, 4, 8, 8)))


def case(timesteps: list[int]) -> tuple[Noised, Tensor, Tensor]:
    count = len(timesteps)
    target = randn(count, 4, 6, 5, seed=1)
    return Noised(target, torch.tensor(timesteps), target), randn(count, 4, 6, 5, seed=2), torch.rand(count) + 0.5


def dense_loss(batch: Noised, prediction: Tensor, weights: Tensor, by_timestep: list[float]) -> Tensor:
    squares = (prediction.double() - batch.target.double()) ** 2
    part = torch.stack([picture.sum() / picture.numel() for picture in squares])
    return (part * weights.double() * torch.tensor(by_timestep, dtype=torch.float64)).sum() / len(weights)


def test_the_loss_is_the_mean_square_times_the_weight_of_each_picture() -> None:
    batch, prediction, weights = case([0, 400, 999])
    loss = Objective(Options()).loss(prediction, batch, weights)
    assert loss.shape == ()
    assert loss.dtype == torch.float32
    assert_close(loss.double(), dense_loss(batch, prediction, weights, [1, 1, 1]), rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_loss_of_a_half_precision_prediction_is_computed_in_float32(dtype: torch.dtype) -> None:
    batch, prediction, weights = case([0, 400, 999])
    half = (100 * prediction).to(dtype)
    assert_close(
        Objective(Options()).loss(half, batch, weights).double(),
        dense_loss(batch, half, weights, [1, 1, 1]),
        rtol=1e-6,
        atol=0,
    )


# S is the signal-to-noise ratio; sd-scripts counts at most 1000 of it except for min-SNR.
FORMULAS = {
    "min_snr": (Options(min_snr_gamma=5.0), lambda s: min(s, 5) / s),
    "min_snr_v": (Options(min_snr_gamma=5.0, v_parameterization=True), lambda s: min(s, 5) / (s + 1)),
    "like_noise": (
        Options(scale_v_pred_loss_like_noise_pred=True, v_parameterization=True),
        lambda s: min(s, 1000) / (min(s, 1000) + 1),
    ),
    "v_like": (Options(v_pred_like_loss=0.25), lambda s: 1 + 0.25 * (min(s, 1000) + 1) / min(s, 1000)),
    "debiased": (Options(debiased_estimation_loss=True), lambda s: 1 / math.sqrt(min(s, 1000))),
    "debiased_v": (
        Options(debiased_estimation_loss=True, v_parameterization=True),
        lambda s: 1 / (min(s, 1000) + 1),
    ),
    "two": (
        Options(min_snr_gamma=1.0, debiased_estimation_loss=True),
        lambda s: min(s, 1) / s / math.sqrt(min(s, 1000)),
    ),
}


@pytest.mark.parametrize("name", FORMULAS)
def test_weights_of_timesteps_are_those_of_their_formulas(name: str) -> None:
    options, formula = FORMULAS[name]
    batch, prediction, weights = case([0, 1, 50, 250, 600, 999])
    ratios = [float(signal()[t] / (1 - signal()[t])) for t in batch.timesteps]
    expected = dense_loss(batch, prediction, weights, [formula(ratio) for ratio in ratios])
    assert_close(Objective(options).loss(prediction, batch, weights).double(), expected, rtol=2e-4, atol=0)


def test_a_few_weights_by_hand() -> None:
    def weight(timestep: int, **options: object) -> float:
        batch = Noised(torch.zeros(1, 1, 1, 1), torch.tensor([timestep]), torch.zeros(1, 1, 1, 1))
        return float(Objective(Options(**options)).loss(torch.ones(1, 1, 1, 1), batch, torch.ones(1)))

    # The ratio of the first timestep is (1 - 0.00085) / 0.00085 = 1175.47, that of the last 0.004683.
    assert weight(0, min_snr_gamma=5.0) == pytest.approx(5 / 1175.47, rel=1e-4)
    assert weight(0, debiased_estimation_loss=True) == pytest.approx(1 / math.sqrt(1000), rel=1e-5)
    assert weight(999, min_snr_gamma=5.0) == 1
    assert weight(999, debiased_estimation_loss=True) == pytest.approx(14.61, rel=1e-3)


SWITCHES = {
    "min_snr_gamma": 5.0,
    "scale_v_pred_loss_like_noise_pred": True,
    "v_pred_like_loss": 0.5,
    "debiased_estimation_loss": True,
    "v_parameterization": True,
}


@pytest.mark.parametrize(
    "switches", [names for count in range(6) for names in itertools.combinations(SWITCHES, count)], ids="+".join
)
def test_a_ratio_of_zero_gives_a_finite_loss_and_gradient(switches: tuple[str, ...]) -> None:
    options = Options(zero_terminal_snr=True, **{name: SWITCHES[name] for name in switches})
    batch, prediction, weights = case([998, 999])
    prediction.requires_grad_()
    loss = Objective(options).loss(prediction, batch, weights)
    loss.backward()
    assert loss.isfinite()
    assert prediction.grad is not None
    assert prediction.grad.isfinite().all()


def test_min_snr_counts_pure_noise_fully_and_in_v_prediction_not_at_all() -> None:
    batch, prediction, weights = case([999])
    plain = Objective(Options()).loss(prediction, batch, weights)
    assert torch.equal(
        Objective(Options(zero_terminal_snr=True, min_snr_gamma=5.0)).loss(prediction, batch, weights), plain
    )
    v = Options(zero_terminal_snr=True, min_snr_gamma=5.0, v_parameterization=True)
    assert Objective(v).loss(prediction, batch, weights) == 0
