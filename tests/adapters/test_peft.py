"""PEFT folders: read at the strength that PEFT gives them, written so that PEFT reads the same."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.testing import assert_close

from lorashrink.adapters import open_adapter, peft
from lorashrink.linking.inputs import find_adapters
from lorashrink.shrinking.run import resize


class Model(nn.Module):
    """Two blocks whose modules have the same names, as in every transformer."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.blocks = nn.ModuleList(
            nn.ModuleDict({"q_proj": nn.Linear(24, 24), "up_proj": nn.Linear(24, 40), "down_proj": nn.Linear(40, 24)})
            for _ in range(2)
        )
        for parameter in self.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.2

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + block["down_proj"](torch.tanh(block["up_proj"](block["q_proj"](x))))
        return x


INPUTS = torch.randn(5, 24, generator=torch.Generator().manual_seed(1))
CONFIGS = {
    "plain": {"r": 8, "lora_alpha": 16},
    "patterns": {"r": 8, "lora_alpha": 4, "rank_pattern": {"blocks.1.q_proj": 3}, "alpha_pattern": {"down_proj": 24}},
    "rslora": {"r": 8, "lora_alpha": 6, "use_rslora": True},
}


@pytest.fixture(params=CONFIGS)
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    config = LoraConfig(target_modules=["q_proj", "up_proj", "down_proj"], **CONFIGS[request.param])
    return saved(config, tmp_path / "adapter")


def saved(config: LoraConfig, path: Path) -> Path:
    model = get_peft_model(Model(), config)
    generator = torch.Generator().manual_seed(2)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.1
    model.save_pretrained(path)
    return path


def output(folder: Path) -> Tensor:
    with torch.no_grad():
        return PeftModel.from_pretrained(Model(), folder)(INPUTS)


def merged(folder: Path) -> Tensor:
    """The model with the dense deltas, as lorashrink reads them, added to its weights."""
    model = Model()
    with open_adapter(folder) as adapter:
        for layer in adapter:
            model.get_submodule(layer.name.removeprefix("base_model.model.")).weight.data += layer.delta.dense()
    with torch.no_grad():
        return model(INPUTS)


def test_a_folder_is_read_at_pefts_strength(folder: Path) -> None:
    assert_close(merged(folder), output(folder), rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        assert not torch.allclose(output(folder), Model()(INPUTS), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("kind", ["folder", "file"])
def test_all_of_a_folder_loads_as_before(folder: Path, tmp_path: Path, kind: str) -> None:
    source = folder if kind == "folder" else folder / "adapter_model.safetensors"
    report = resize(source, recipes="energy=1", dtype="fp32", output=tmp_path / "out")
    output_folder = Path(report.results[0].output)
    assert sorted(path.name for path in output_folder.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    assert_close(output(output_folder), output(folder), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("recipe", ["energy=.7", "rank=2", "rank=5,uniform"])
def test_peft_reads_a_truncated_folder_at_its_written_strength(folder: Path, tmp_path: Path, recipe: str) -> None:
    report = resize(folder, recipes=recipe, dtype="fp32", output=tmp_path)
    output_folder = Path(report.results[0].output)
    assert report.results[0].relative_error > 0.01
    assert_close(output(output_folder), merged(output_folder), rtol=1e-4, atol=1e-4)
    config = json.loads((output_folder / "adapter_config.json").read_text())
    assert config["r"] == config["lora_alpha"] == max(layer.rank_after for layer in report.results[0].layers)
    assert config["rank_pattern"] == config["alpha_pattern"]
    assert not config["use_rslora"]
    assert config["target_modules"]


def test_dora_folders_load_as_before(tmp_path: Path) -> None:
    folder = saved(LoraConfig(target_modules=["q_proj", "up_proj"], r=6, lora_alpha=9, use_dora=True), tmp_path / "a")
    report = resize(folder, recipes="energy=1", dtype="fp32", output=tmp_path)
    output_folder = Path(report.results[0].output)
    assert_close(output(output_folder), output(folder), rtol=1e-4, atol=1e-4)
    assert json.loads((output_folder / "adapter_config.json").read_text())["r"] == 6
    before, after = (load_file(path / "adapter_model.safetensors") for path in (folder, output_folder))
    magnitudes = [key for key in before if "magnitude" in key]
    assert len(magnitudes) == 4
    assert all(torch.equal(before[key], after[key]) for key in magnitudes)
    smaller = Path(resize(folder, recipes="rank=5", dtype="fp32", output=tmp_path).results[0].output)
    change = float((output(smaller) - output(folder)).norm() / output(folder).norm())
    assert 1e-5 < change < 0.1


def test_layers_that_stay_as_they_are_keep_their_scale(tmp_path: Path) -> None:
    folder = saved(LoraConfig(target_modules=["q_proj", "up_proj"], r=8, lora_alpha=20), tmp_path / "adapter")
    tensors = load_file(folder / "adapter_model.safetensors")
    tensors["base_model.model.blocks.0.q_proj.hada_w1_a"] = torch.zeros(24)
    save_file(tensors, folder / "adapter_model.safetensors")
    report = resize(folder, recipes="rank=3", output=tmp_path)
    config = json.loads((Path(report.results[0].output) / "adapter_config.json").read_text())
    assert len(report.results[0].verbatim) == 3
    assert (config["r"], config["lora_alpha"]) == (8, 20)
    assert set(config["rank_pattern"]) == {"^blocks.0.up_proj", "^blocks.1.q_proj", "^blocks.1.up_proj"}
    assert set(config["rank_pattern"].values()) == set(config["alpha_pattern"].values()) == {3}


def test_a_folder_of_folders_is_a_list_of_adapters(tmp_path: Path) -> None:
    first = saved(LoraConfig(target_modules=["q_proj"], r=2), tmp_path / "all" / "one")
    shutil.copytree(first, tmp_path / "all" / "two")
    assert find_adapters([tmp_path / "all"], recursive=True) == [first, tmp_path / "all" / "two"]
    report = resize(tmp_path / "all", recipes="rank=1", recursive=True, output=tmp_path / "out")
    assert [Path(result.output).name for result in report.results] == ["one_rank1", "two_rank1"]


@pytest.mark.parametrize(
    ("text", "says"),
    [("{", "not valid JSON"), ("[]", "holds no settings"), ('{"lora_alpha": "four"}', "lora_alpha")],
)
def test_broken_settings_are_named(tmp_path: Path, text: str, says: str) -> None:
    folder = saved(LoraConfig(target_modules=["q_proj"], r=2), tmp_path / "adapter")
    (folder / "adapter_config.json").write_text(text)
    (failure,) = resize(folder, recipes="rank=1", output=tmp_path / "out").failed
    assert str(folder) in failure.error
    assert says in failure.error


def test_settings_survive_a_header_and_a_folder() -> None:
    settings = {"unet": {"r": 4, "lora_alpha": 2}, "text_encoder": {"r": 3}}
    assert peft.from_metadata({peft.METADATA_KEY: peft.to_metadata(settings)}) == settings
    assert json.loads(peft.to_file({"": {"r": 4}})) == {"r": 4}
