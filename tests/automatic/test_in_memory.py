"""`shrink` of adapters in memory: the tensors of the file that it writes, and models that have them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from loaders import pipe  # noqa: F401
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

import lorashrink as ls
import lorashrink_example
from lorashrink.errors import InputError, UsageError
from lorashrink.recipes.levels import ADAPTER_LINE, LEVELS, error_for

MODEL = lorashrink_example.path("model")
TABLE = lorashrink_example.path("table.safetensors")
BASE = lorashrink_example.path("base.safetensors")
STYLE = lorashrink_example.path("loras", "style.safetensors")
ADAPTER = lorashrink_example.path("adapter.safetensors")


def in_memory(path: Path) -> ls.Tensors:
    with safe_open(path, "pt") as opened:
        return ls.Tensors(load_file(path), opened.metadata())


@pytest.mark.parametrize(
    ("source", "options"),
    [
        (STYLE, {}),
        (STYLE, {"quality": "small", "dtype": "fp16"}),
        (STYLE, {"model": MODEL}),
        (STYLE, {"calibration": TABLE, "quality": 36}),
        (STYLE, {"calibration": TABLE, "dtype": "mixed"}),
        (STYLE, {"calibration": TABLE, "size": "300kB"}),
        (STYLE, {"calibration": TABLE, "rank": 3}),
        (ADAPTER, {"base": BASE, "quality": "same"}),
    ],
)
def test_tensors_and_facts_are_those_of_the_file(source: Path, options: dict[str, Any], tmp_path: Path) -> None:
    (result,) = ls.shrink(in_memory(source), **options).results
    without_pictures = {"base" if key == "model" else key: value for key, value in options.items()}
    (written,) = ls.shrink(source, output=tmp_path, **without_pictures).results
    expected = load_file(str(written.output))
    assert result.state_dict is not None
    assert result.state_dict.keys() == expected.keys()
    for key, tensor in expected.items():
        assert tensor.dtype == result.state_dict[key].dtype, key
        assert torch.equal(tensor.float(), result.state_dict[key].float()), key
    for fact in ("method", "why", "recipe", "dtype", "predicted_db", "relative_error", "bytes_before", "bytes_after"):
        assert getattr(result, fact) == getattr(written, fact), fact
    with safe_open(str(written.output), "pt") as opened:
        assert result.metadata["sshs_model_hash"] == opened.metadata()["sshs_model_hash"]


def test_a_mapping_is_shrunk_against_the_tensors_of_a_model() -> None:
    report = ls.shrink(load_file(ADAPTER), base=load_file(BASE))
    assert report.results[0].method == "base"
    assert sum(tensor.nbytes for tensor in report.state_dict.values()) < 0.9 * ADAPTER.stat().st_size
    assert any("pictures not checked" in note for note in report.notes)


def test_what_would_gain_little_comes_back_as_it_was() -> None:
    tensors = {"lora_unet_mid_block_0.lora_up.weight": torch.eye(64, 8).half()}
    tensors["lora_unet_mid_block_0.lora_down.weight"] = torch.eye(8, 64).half()
    report = ls.shrink(tensors, dtype="same")
    assert "would" in str(report.results[0].skipped)
    assert report.state_dict is tensors


def test_own_outputs_come_back_as_they_were() -> None:
    (result,) = ls.shrink(in_memory(STYLE)).results
    assert result.state_dict is not None
    again = ls.shrink(ls.Tensors(result.state_dict, result.metadata), quality=20)
    assert "made by lorashrink" in str(again.results[0].skipped)
    assert again.state_dict is result.state_dict


def test_a_peft_model_has_the_smaller_adapter() -> None:
    torch.manual_seed(0)
    config = peft.LoraConfig(r=8, lora_alpha=4, target_modules=["0", "1"])
    model = peft.get_peft_model(nn.Sequential(nn.Linear(120, 200), nn.Linear(200, 160)), config).eval()
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            decay = 0.3 ** torch.arange(8).float()
            parameter.data = torch.randn(parameter.shape) * (decay[:, None] if "lora_A" in name else decay)
    before = deltas(model, "default")
    (result,) = ls.shrink(model).results
    assert result.dtype == "fp16"
    assert max(model.get_submodule(path).r["default"] for path in before) < 8
    assert_near(deltas(model, "default"), before)


@pytest.mark.filterwarnings("ignore")
def test_a_pipeline_has_the_smaller_adapter(pipe: Any) -> None:  # noqa: F811
    pipe.unet.add_adapter(peft.LoraConfig(r=6, lora_alpha=3, target_modules=["to_q", "to_k"]), "style")
    try:
        for name, parameter in pipe.unet.named_parameters():
            if "lora_" in name:
                decay = 0.3 ** torch.arange(6).float()
                parameter.data = torch.randn(parameter.shape) * (decay[:, None] if "lora_A" in name else decay)
        pipe.set_adapters("style")
        before = deltas(pipe.unet, "style")
        assert not ls.shrink(pipe).results[0].skipped
        assert_near(deltas(pipe.unet, "style"), before)
    finally:
        pipe.delete_adapters("style")


def deltas(model: nn.Module, name: str) -> dict[str, torch.Tensor]:
    """Path -> ΔW, as PEFT itself computes it."""
    return {
        path: module.get_delta_weight(name).detach()
        for path, module in model.named_modules()
        if hasattr(module, "get_delta_weight") and name in module.lora_A
    }


def assert_near(after: dict[str, torch.Tensor], before: dict[str, torch.Tensor]) -> None:
    """Every layer lost something, and no more than quality "high" allows."""
    assert after.keys() == before.keys()
    for path, delta in before.items():
        lost = float((after[path] - delta).norm() / delta.norm())
        assert 1e-4 < lost <= error_for(LEVELS["high"], ADAPTER_LINE) + 1e-3, path


@pytest.mark.parametrize("option", ["output", "force", "prompts", "settings"])
def test_options_about_files_are_refused(option: str) -> None:
    with pytest.raises(UsageError, match=option):
        ls.shrink(load_file(STYLE), **{option: "x"})


def test_failures_in_memory_are_raised() -> None:
    with pytest.raises(InputError):
        ls.shrink({"a": torch.zeros(2)})


def test_reports_of_files_have_no_state_dict(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="in memory"):
        _ = ls.shrink(STYLE, output=tmp_path).state_dict
