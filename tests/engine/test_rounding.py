"""Factors in e4m3: against torch's own conversion, brute force, and dense products."""

import numpy as np
import pytest
import torch

from lorashrink.engine.rounding import FLOAT8, _nearest, relative_error, squares, to_float8

EVERY = torch.arange(256, dtype=torch.uint8).view(FLOAT8).float()
EVERY = EVERY[EVERY.isfinite()].unique()


def pair(out: int, rank: int, fan_in: int, size: float = 0.05) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(out + rank)
    falls = 0.7 ** torch.arange(rank)
    return size * torch.randn(out, rank, generator=generator) * falls, torch.randn(rank, fan_in, generator=generator)


def error(up: torch.Tensor, down: torch.Tensor, new_up: torch.Tensor, new_down: torch.Tensor) -> float:
    product = up.double() @ down.double()
    return float((new_up.double() @ new_down.double() - product).norm() / product.norm())


def test_numbers_become_the_nearest_that_the_dtype_has() -> None:
    generator = torch.Generator().manual_seed(0)
    numbers = torch.randn(20_000, generator=generator) * 10 ** (6 * torch.rand(20_000, generator=generator) - 4)
    numbers = numbers.clamp(-448, 448)
    ours = _nearest(numbers)
    distance = (numbers[:, None] - EVERY).abs().amin(1)
    assert torch.isin(ours, EVERY).all()
    # by way of float16, so that near the middle between two either may be taken
    assert ((ours - numbers).abs() <= distance * (1 + 2**-6)).all()
    assert torch.equal(_nearest(EVERY), EVERY)


def test_numbers_beyond_the_largest_become_the_largest() -> None:
    assert _nearest(torch.tensor([449.0, -1e6, 3e38, 448.0])).tolist() == [448.0, -448.0, 448.0, 448.0]


def test_the_product_changes_by_the_precision_of_the_dtype() -> None:
    for size in (0.05, 1e-3, 30.0):  # the sides are balanced, whatever they come as
        up, down = pair(96, 8, 160, size)
        down = down * (0.5 / size)
        rounded = to_float8(up, down)
        assert rounded.up.dtype == rounded.down.dtype == FLOAT8
        assert (rounded.up.shape, rounded.down.shape) == (up.shape, down.shape)
        actual = error(up, down, rounded.up.float(), rounded.down.float())
        assert 0.02 < actual < 0.045
        assert rounded.error / rounded.norm == pytest.approx(actual, rel=0.1)


def test_balanced_factors_lose_less_than_plain_conversion() -> None:
    up, down = pair(96, 8, 160, 2e-4)
    rounded = to_float8(up, down * 50)
    ours = error(up, down * 50, rounded.up.float(), rounded.down.float())
    assert ours < 0.2 * error(up, down * 50, up.to(FLOAT8).float(), (down * 50).to(FLOAT8).float())


def test_a_dimension_of_zeros_stays_zero() -> None:
    up, down = pair(32, 3, 16)
    up[:, 1], down[2] = 0, 0
    rounded = to_float8(up, down)
    assert not rounded.up[:, 1].float().any()
    assert rounded.up.float().isfinite().all()
    assert error(up, down, rounded.up.float(), rounded.down.float()) < 0.05
    nothing = to_float8(torch.zeros(4, 2), torch.zeros(2, 4))
    assert not nothing.up.float().any()
    assert nothing.error == 0


def test_the_best_of_the_balances_is_taken_for_the_energies() -> None:
    """Compared with all balances, where one direction of each side counts."""
    up, down = pair(48, 6, 40)
    generator = torch.Generator().manual_seed(1)
    left, right = torch.randn(48, 1, generator=generator), torch.randn(40, 1, generator=generator)

    def cost(new_up: torch.Tensor, new_down: torch.Tensor, of_up: torch.Tensor, of_down: torch.Tensor) -> torch.Tensor:
        def energy(rows: torch.Tensor, way: torch.Tensor) -> torch.Tensor:
            return ((rows @ way) ** 2).sum(1)

        return energy(new_up - of_up, left) * energy(of_down, right) + energy(new_down - of_down, right) * energy(
            of_up, left
        )

    rounded = to_float8(up, down, lambda rows: squares(rows @ left), lambda rows: squares(rows @ right))
    ratio = ((down.norm(dim=1) / 40**0.5) / (up.norm(dim=0) / 48**0.5)).sqrt()[:, None]
    rows, columns = up.mT * ratio, down / ratio
    costs = []
    for number in range(16):
        balance = 2.0 ** (number / 16 - 0.5)
        tried = (_nearest(rows * balance) / balance, _nearest(columns / balance) * balance)
        costs.append(cost(*tried, rows, columns))
    table = torch.stack(costs)
    # the written factors have the balance inside
    taken = (rounded.up.float().mT.norm(dim=1) / rows.norm(dim=1))[:, None]
    ours = cost(rounded.up.float().mT / taken, rounded.down.float() * taken, rows, columns)
    assert float(table.amin(0).sum()) < 0.3 * float(table.mean(0).sum())
    assert float(ours.sum()) < 0.5 * float(table.mean(0).sum())


@pytest.mark.parametrize("rms", [0.05, 0.01, 2e-3, 3e-4, 60.0, 400.0])
def test_the_predicted_error_is_that_of_random_numbers(rms: float) -> None:
    numbers = torch.randn(200_000, generator=torch.Generator().manual_seed(0)) * rms
    rounded = numbers.clamp(-448, 448).to(FLOAT8).float()
    expected = float((rounded - numbers).norm() / numbers.norm())
    assert float(relative_error(np.array([rms]), FLOAT8)[0]) == pytest.approx(expected, rel=0.05)
