"""`convert -t fp16` and numbers that fp16 cannot hold: balanced between factors, or said."""

import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from lorashrink.errors import NonFinite
from lorashrink.making.conversion import convert
from lorashrink.results.shrinking import Converted

UP, DOWN = "lora_unet_b_to_q.lora_up.weight", "lora_unet_b_to_q.lora_down.weight"


def converted(folder: Path, up: float, down: float, dtype: torch.dtype) -> tuple[Converted, float]:
    """(result, relative error of ΔW against float64) of factors of these magnitudes."""
    torch.manual_seed(0)
    old = {UP: (torch.randn(64, 8) * up).to(dtype), DOWN: (torch.randn(8, 64) * down).to(dtype)}
    save_file(old, folder / "a.safetensors")
    report = convert(folder / "a.safetensors", dtype="fp16", output=folder / "out")
    if report.failed:
        raise NonFinite(report.failed[0].error)
    (result,) = report.results
    new = load_file(result.output)
    assert {tensor.dtype for tensor in new.values()} == {torch.float16}
    return result, float((product(new) - product(old)).norm() / product(old).norm())


def product(factors: dict[str, Tensor]) -> Tensor:
    return factors[UP].double() @ factors[DOWN].double()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize(("up", "down"), [(1e-9, 1.0), (1.0, 1e-9), (1e-7, 1e3), (1e6, 1e-3), (1e-3, 1e7)])
def test_factors_are_balanced_where_one_would_not_fit(
    tmp_path: Path, up: float, down: float, dtype: torch.dtype
) -> None:
    result, error = converted(tmp_path, up, down, dtype)
    assert error < 2e-3
    assert not result.warnings


def test_factors_that_fit_are_only_rounded(tmp_path: Path) -> None:
    converted(tmp_path, 1e-2, 1.0, torch.float32)
    old, new = load_file(tmp_path / "a.safetensors"), load_file(tmp_path / "out" / "a_fp16.safetensors")
    assert all(torch.equal(old[key].half(), new[key]) for key in old)


def test_what_no_balance_saves_is_a_warning(tmp_path: Path) -> None:
    result, error = converted(tmp_path, 1e-9, 1e-9, torch.bfloat16)
    assert error > 0.9
    (warning,) = result.warnings
    assert warning.startswith(f"2 tensors, first {DOWN}, lose up to 100 % of their norm: ")
    assert "Use -t bf16 or fp32" in warning


def test_what_no_balance_keeps_finite_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(NonFinite, match="cannot hold"):
        converted(tmp_path, 1e6, 1e6, torch.float32)


def test_a_single_tensor_that_vanishes_is_a_warning(tmp_path: Path) -> None:
    key = "lora_unet_b_to_q.diff"
    save_file({key: torch.full((4, 4), 1e-9)}, tmp_path / "a.safetensors")
    (result,) = convert(tmp_path / "a.safetensors", dtype="fp16", output=tmp_path / "out").results
    (warning,) = result.warnings
    assert warning.startswith(f"{key} loses 100 % of its norm")
    assert math.isclose(result.bytes_after, result.bytes_before, rel_tol=0.5)


# --- `convert -t fp8`: what stays in 16 bits ----------------------------------------------------


def in_8_bits(folder: Path, **others: Tensor) -> tuple[Converted, dict[str, Tensor], dict[str, Tensor]]:
    """(result, tensors before, tensors after) of a layer that takes 8 bits, and these beside it."""
    torch.manual_seed(0)
    old = {UP: torch.randn(64, 8) / 8, DOWN: torch.randn(8, 64) / 8}
    old |= {f"lora_unet_b_{name}": tensor for name, tensor in others.items()}
    save_file(old, folder / "a.safetensors")
    report = convert(folder / "a.safetensors", dtype="fp8", output=folder / "out")
    if report.failed:
        raise NonFinite(report.failed[0].error)
    (result,) = report.results
    return result, old, load_file(result.output)


@pytest.mark.parametrize("strength", [1e8, 1e-7])
def test_a_layer_that_is_not_for_8_bits_is_balanced_for_16(tmp_path: Path, strength: float) -> None:
    """Scattered numbers: e4m3 has too few digits for them."""
    torch.manual_seed(0)
    up, down = (factor / factor.abs().max() for factor in (torch.randn(64, 8) ** 9, torch.randn(8, 64) ** 9))
    factors = {"to_k.lora_up.weight": up * strength, "to_k.lora_down.weight": down}
    result, old, new = in_8_bits(tmp_path, **factors)
    names = [f"lora_unet_b_{name}" for name in factors]
    assert {new[name].dtype for name in names} == {torch.float16}
    assert "stay in fp16" in result.warnings[0]
    before, after = (tensors[names[0]].double() @ tensors[names[1]].double() for tensors in (old, new))
    assert float((after - before).norm() / before.norm()) < 0.01


def test_factors_too_large_for_16_bits_are_no_infinity(tmp_path: Path) -> None:
    """The squares of these numbers are beyond float32, but they themselves are not."""
    large = {"to_k.lora_up.weight": torch.full((64, 8), 1e18), "to_k.lora_down.weight": torch.full((8, 64), 1e18)}
    with pytest.raises(NonFinite, match=r"to_k.lora_down.weight has numbers that F16 cannot hold"):
        in_8_bits(tmp_path, **large)


def test_other_tensors_that_fp16_cannot_hold_are_an_error(tmp_path: Path) -> None:
    with pytest.raises(NonFinite, match=r"diff_b has numbers that F16 cannot hold"):
        in_8_bits(tmp_path, **{"to_q.diff_b": torch.full((64,), 1e6)})


def test_other_tensors_that_vanish_are_a_warning(tmp_path: Path) -> None:
    result, _, _ = in_8_bits(tmp_path, **{"to_q.diff_b": torch.full((64,), 1e-9)})
    (warning,) = result.warnings
    assert warning.startswith("lora_unet_b_to_q.diff_b loses 100 % of its norm")


def test_a_bias_beside_factors_keeps_its_strength(tmp_path: Path) -> None:
    """Programs multiply it with the scale of the factors, which goes into these."""
    torch.manual_seed(0)
    name = "diffusion_model.blocks.0.ffn.0"
    old = {
        f"{name}.lora_B.weight": torch.randn(64, 8) / 8,
        f"{name}.lora_A.weight": torch.randn(8, 64) / 8,
        f"{name}.lora_B.bias": torch.randn(64),
        f"{name}.alpha": torch.tensor(2.0),
    }
    save_file(old, tmp_path / "a.safetensors")
    (result,) = convert(tmp_path / "a.safetensors", dtype="fp8", output=tmp_path / "out").results
    new = load_file(result.output)
    scale = float(new[f"{name}.alpha"]) / 8 if f"{name}.alpha" in new else 1.0
    torch.testing.assert_close(
        new[f"{name}.lora_B.bias"].float() * scale, old[f"{name}.lora_B.bias"] / 4, rtol=1e-3, atol=0
    )
