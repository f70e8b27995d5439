"""The closed form: effects against differences, the regression against the dense one, and what it gains on a model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import lorashrink as ls
import lorashrink_example
from lorashrink.calibration.scaling import effects, ridge
from lorashrink.errors import UsageError

EXAMPLE = lorashrink_example.path()
MODEL, HEART = EXAMPLE / "model", EXAMPLE / "loras" / "heart.safetensors"
LINES = (
    "a red heart on a white background --w 64 --h 64 --d 1 --l 4 --s 8\n"
    "a small blue heart on a black background --w 64 --h 64 --d 2 --l 4 --s 8\n"
)


def test_effects_are_what_scales_change() -> None:
    """Compared with differences in float64; unused factors give zeros."""
    generator = torch.Generator().manual_seed(0)
    ups = [torch.randn(5, rank, generator=generator, dtype=torch.float64).requires_grad_() for rank in (2, 3, 4)]
    mixed = torch.randn(5, generator=generator, dtype=torch.float64)

    def value(scales: Tensor) -> Tensor:
        first, second, _ = scales.split([2, 3, 4])
        return ((ups[0] * first).sum(1).tanh() * (ups[1] * second).sum(1) * mixed).sum()

    ones = torch.ones(9, dtype=torch.float64)
    measured = effects(value(ones), ups)
    steps = 1e-6 * torch.eye(9, dtype=torch.float64)
    expected = torch.stack([(value(ones + step) - value(ones - step)) / 2e-6 for step in steps])
    assert torch.allclose(measured, expected.detach(), atol=1e-8)
    assert not measured[5:].any()


@pytest.mark.parametrize(("samples", "dimensions"), [(20, 6), (6, 20)])
def test_ridge_is_the_regression_with_a_penalty(samples: int, dimensions: int) -> None:
    """Compared with least squares that have a row for each penalty."""
    generator = torch.Generator().manual_seed(1)
    rows = torch.randn(samples, dimensions, generator=generator, dtype=torch.float64)
    missing = torch.randn(samples, generator=generator, dtype=torch.float64)
    penalty = 0.3 * rows.square().sum(1).mean()
    stacked = torch.cat([rows, penalty.sqrt() * torch.eye(dimensions, dtype=torch.float64)])
    expected = torch.linalg.lstsq(stacked, torch.cat([missing, missing.new_zeros(dimensions)])[:, None]).solution[:, 0]
    assert torch.allclose(ridge(rows, missing, 0.3), expected, atol=1e-10)


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    path.write_text(LINES)
    return path


def test_factors_bring_predictions_nearer_without_training(prompts: Path, tmp_path: Path) -> None:
    """Columns of factors are scaled, and nothing else changes."""
    small, better = tmp_path / "small.safetensors", tmp_path / "better.safetensors"
    assert not ls.resize(HEART, recipes="rank=1", dtype="fp32", output=small).failed
    result = ls.refine(small, like=HEART, model=MODEL, output=better, prompts=prompts, steps=0)
    assert result.improved
    assert result.steps == 0
    assert result.loss_scaled is not None
    assert result.loss_after == pytest.approx(result.loss_scaled, rel=1e-4)
    assert result.loss_after < 0.97 * result.loss_before
    old, new = load_file(small), load_file(better)
    changed = {key for key in old if not torch.equal(old[key], new[key])}
    assert {key.partition(".")[2] for key in changed} == {"lora_up.weight"}
    assert {key[:8] for key in changed} == {"lora_une", "lora_te1", "lora_te2"}
    for key in changed:
        before, after = (tensor.flatten(1).double() for tensor in (old[key], new[key]))
        factors = (before * after).sum(0) / before.square().sum(0).clamp(min=1e-30)
        assert torch.allclose(before * factors, after, rtol=1e-4, atol=1e-9)


def test_a_whole_adapter_is_left_alone(prompts: Path, tmp_path: Path) -> None:
    output = tmp_path / "same.safetensors"
    result = ls.refine(HEART, like=HEART, model=MODEL, output=output, prompts=prompts, steps=0)
    assert not result.improved
    assert result.loss_after == result.loss_before


def test_no_steps_need_the_closed_form(prompts: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError):
        ls.refine(
            HEART,
            like=HEART,
            model=MODEL,
            output=tmp_path / "a.safetensors",
            prompts=prompts,
            steps=0,
            closed_form=False,
        )
