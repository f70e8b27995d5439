"""Outputs that would be larger than their inputs: kept as they are, or asked for by name and said."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import lorashrink
from lorashrink.results.shrinking import FileResult

NAME = "lora_unet_input_blocks_1_0_in_layers_2"


def tucker(path: Path, rank: int = 8, dtype: torch.dtype = torch.float16) -> Path:
    """A LoCon with a core, whose folded form has nine times the numbers of `down`."""
    torch.manual_seed(0)
    tensors = {
        f"{NAME}.lora_up.weight": torch.randn(64, rank, 1, 1),
        f"{NAME}.lora_mid.weight": torch.randn(rank, rank, 3, 3) / 8,
        f"{NAME}.lora_down.weight": torch.randn(rank, 64, 1, 1) / 8,
        f"{NAME}.alpha": torch.tensor(4.0),
        "lora_unet_out_2.lora_up.weight": torch.randn(32, rank),
        "lora_unet_out_2.lora_down.weight": torch.randn(rank, 32),
    }
    save_file({key: tensor.to(dtype) for key, tensor in tensors.items()}, path)
    return path


def only(path: Path, **options: object) -> FileResult:
    report = lorashrink.resize(path, output=path.parent / "out", force=True, **options)
    assert not report.failed, report.failed
    return report.results[0]


def delta(tensors: dict[str, Tensor]) -> Tensor:
    """ΔW of the convolution in float64, [out, in, kh, kw]."""
    up, down = (tensors[f"{NAME}.lora_{role}.weight"].double() for role in ("up", "down"))
    scale = float(tensors.get(f"{NAME}.alpha", torch.tensor(float(up.shape[1])))) / down.shape[0]
    if f"{NAME}.lora_mid.weight" in tensors:
        core = tensors[f"{NAME}.lora_mid.weight"].double()
        return scale * torch.einsum("or,rskl,si->oikl", up.flatten(1), core, down.flatten(1))
    return scale * torch.einsum("or,rikl->oikl", up.flatten(1), down)


def test_a_core_is_kept_where_folding_it_would_grow_the_file(tmp_path: Path) -> None:
    path = tucker(tmp_path / "a.safetensors")
    result = only(path, recipes="energy=0.999")
    old, new = load_file(path), load_file(result.output)
    assert all(torch.equal(old[key], new[key]) for key in old if key.startswith(NAME))
    assert f"{NAME}.lora_mid.weight" in {tensor.key for tensor in result.verbatim}
    assert not [warning for warning in result.warnings if "larger" in warning]


def test_a_core_is_folded_where_that_is_smaller(tmp_path: Path) -> None:
    result = only(tucker(tmp_path / "a.safetensors"), recipes="rank=1")
    assert f"{NAME}.lora_mid.weight" not in load_file(result.output)


def test_a_core_that_is_folded_by_name_grows_the_file_and_says_so(tmp_path: Path) -> None:
    path = tucker(tmp_path / "a.safetensors")
    result = only(path, recipes="energy=0.999", form="lora")
    assert "is larger than its input: all layers are LoRA" in result.warnings
    error = (delta(load_file(result.output)) - delta(load_file(path))).norm() / delta(load_file(path)).norm()
    assert error < 0.05


@pytest.mark.parametrize("recipe", ["energy=0.999,rescale=0.5", "energy=0.999"])
def test_rescale_reaches_layers_that_would_stay_in_their_own_form(tmp_path: Path, recipe: str) -> None:
    path = tucker(tmp_path / "a.safetensors")
    result = only(path, recipes=recipe)
    expected = delta(load_file(path)) * (0.5 if "rescale" in recipe else 1)
    assert (delta(load_file(result.output)) - expected).norm() < 0.05 * expected.norm()


def test_rescale_reaches_layers_of_families_that_stay(tmp_path: Path) -> None:
    torch.manual_seed(0)
    name, path = "lora_unet_middle_block_1_transformer_blocks_0_attn1_to_q", tmp_path / "a.safetensors"
    shapes = {"hada_w1_a": (32, 4), "hada_w1_b": (4, 32), "hada_w2_a": (32, 4), "hada_w2_b": (4, 32)}
    factors = {f"{name}.{role}": torch.randn(shape) for role, shape in shapes.items()}
    save_file(factors, path)
    new = load_file(only(path, recipes="energy=1,rescale=0.5").output)
    up, down, alpha = (new[f"{name}.{role}"] for role in ("lora_up.weight", "lora_down.weight", "alpha"))
    got = up.double() @ down.double() * float(alpha) / up.shape[1]
    w1, w2 = (factors[f"{name}.hada_w{n}_a"].double() @ factors[f"{name}.hada_w{n}_b"].double() for n in (1, 2))
    assert (got - 0.5 * w1 * w2).norm() < 1e-5 * (w1 * w2).norm()


def test_a_wider_dtype_grows_the_file_and_says_so(tmp_path: Path) -> None:
    result = only(tucker(tmp_path / "a.safetensors"), recipes="energy=1", dtype="fp32", form="lora")
    assert "is larger than its input: their dtype is fp32, all layers are LoRA" in result.warnings


@pytest.mark.parametrize(("up", "down"), [(1e-5, 1e-5), (1e-6, 1e-6), (2e-7, 2e-7), (1e-7, 1e-2), (1e-7, 1e-4)])
@pytest.mark.parametrize("recipe", ["energy=1", "rank=2"])
def test_a_layer_of_next_to_no_norm_does_not_stop_the_others(
    tmp_path: Path, up: float, down: float, recipe: str
) -> None:
    torch.manual_seed(0)
    tensors = {}
    for name, of_up, of_down in (("lora_unet_b_to_q", 1.0, 1e-2), ("lora_unet_b_to_k", up, down)):
        tensors[f"{name}.lora_up.weight"] = (torch.randn(64, 8) * of_up).half()
        tensors[f"{name}.lora_down.weight"] = (torch.randn(8, 64) * of_down).half()
        tensors[f"{name}.alpha"] = torch.tensor(8.0)
    path = tmp_path / "a.safetensors"
    save_file(tensors, path)
    result = only(path, recipes=recipe)
    new, small = load_file(result.output), "lora_unet_b_to_k"
    norms = []
    for factors in (tensors, new):
        up_factor, down_factor = (factors[f"{small}.lora_{role}.weight"].double() for role in ("up", "down"))
        scale = float(factors[f"{small}.alpha"]) / len(down_factor)
        kept = torch.linalg.svdvals(up_factor @ down_factor)[: len(new[f"{small}.lora_down.weight"])]
        norms.append(scale * float(kept.norm()))
    lost = [warning for warning in result.warnings if f"1 layer, first {small}, lost" in warning]
    assert bool(lost) == (abs(norms[0] - norms[1]) > 0.01 * norms[0])


def test_a_layer_that_does_not_fit_the_base_says_its_shapes(base: Path, tmp_path: Path) -> None:
    """Inpainting models have more inputs in the first layer."""
    torch.manual_seed(0)
    first = "input_blocks_4_0_in_layers_2"
    shapes = {first: (24, 25, 3, 3), "input_blocks_4_1_proj_in": (24, 24), "input_blocks_4_1_proj_out": (24, 24)}
    tensors = {}
    for name, (out, *fan_in) in shapes.items():
        tensors[f"lora_unet_{name}.lora_up.weight"] = torch.randn(out, 4, *[1] * (len(fan_in) - 1))
        tensors[f"lora_unet_{name}.lora_down.weight"] = torch.randn(4, *fan_in)
    path = tmp_path / "a.safetensors"
    save_file(tensors, path)
    result = only(path, base=base, recipes="fro_ckpt=1,thr=-9")
    assert {(tensor.key.partition(".")[0], tensor.reason) for tensor in result.verbatim} == {
        (f"lora_unet_{first}", "its ΔW is [24, 25, 3, 3], but the weight of the base is [24, 20, 3, 3]")
    }
