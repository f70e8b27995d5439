"""Layers that have factors but no ΔW = up · down: they are carried, and the others shrink."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import lorashrink
from lorashrink.adapters import open_adapter

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore:LoRA adapter added to ConvNd layer")


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.grouped = nn.Conv2d(16, 24, 3, padding=1, groups=2)
        self.plain = nn.Conv2d(24, 8, 3, padding=1)
        self.first = nn.Linear(8, 8)
        self.second = nn.Linear(8, 8)


def saved(folder: Path, **settings: object) -> Path:
    """An adapter as PEFT saves it, with random factors."""
    torch.manual_seed(0)
    model = peft.get_peft_model(Net(), peft.LoraConfig(r=4, lora_alpha=4, **settings))
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter)
    model.save_pretrained(folder)
    return folder


def test_a_grouped_convolution_is_carried_and_the_others_shrink(tmp_path: Path) -> None:
    """PEFT's lora_B of a grouped convolution has [out, r/groups, 1, 1]."""
    folder = saved(tmp_path / "adapter", target_modules=["grouped", "plain", "first"])
    (result,) = lorashrink.resize(folder, recipes="rank=2", output=tmp_path / "out").results
    old, new = load_file(folder / "adapter_model.safetensors"), load_file(f"{result.output}/adapter_model.safetensors")
    for factor in "AB":
        key = f"base_model.model.grouped.lora_{factor}.weight"
        assert torch.equal(old[key], new[key])
        assert new[f"base_model.model.first.lora_{factor}.weight"].numel() == 16
    assert {tensor.reason for tensor in result.verbatim} == {
        "LoRA of a convolution in 2 groups, whose up · down is no one matrix"
    }
    loaded = peft.PeftModel.from_pretrained(Net(), result.output)
    scales = {name: layer.scaling["default"] for name, layer in loaded.named_modules() if hasattr(layer, "lora_A")}
    assert scales["base_model.model.grouped"] == 1


@pytest.mark.skipif(not hasattr(peft.LoraConfig(), "use_bdlora"), reason="this PEFT has no block-diagonal LoRA")
def test_block_diagonal_lora_is_carried(tmp_path: Path) -> None:
    """Shapes alone do not tell that lora_A of `first` is a row of blocks."""
    blocks = {"nblocks": 2, "target_modules_bd_a": ["first"], "target_modules_bd_b": ["second"], "match_strict": True}
    from peft.tuners.lora.config import BdLoraConfig

    folder = saved(tmp_path / "adapter", target_modules=["first", "second"], use_bdlora=BdLoraConfig(**blocks))
    with open_adapter(folder) as adapter:
        assert not adapter.layers
        assert {reason.partition(",")[0] for reason in adapter.others.values()} == {"block-diagonal LoRA (use_bdlora)"}
