"""What --plan says, against numbers known from real SDXL and against what a real run keeps."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny_sdxl
import torch
import training

from lorashrink.train.command import main
from lorashrink.train.memory import GIB, count_activations, optimizer_bytes
from lorashrink.train.model import SETTINGS, load_model
from lorashrink.train.network import build_network
from lorashrink.train.options import Options, parse
from lorashrink.train.plan import Memory, estimate, meta_model, plan

GUIDE = [
    *["--network_module=lycoris.kohya", "--network_dim=8", "--network_alpha=4", "--resolution=1024,1024"],
    *["--network_args", "preset=full", "conv_dim=256", "conv_alpha=4", "algo=locon"],
    *["--mixed_precision=fp16", "--save_precision=fp16", "--no_half_vae", "--cache_latents"],
    *["--gradient_checkpointing", "--train_batch_size=8", "--gradient_accumulation_steps=6", "--max_train_steps=400"],
]


@pytest.fixture(scope="module")
def text() -> str:
    return plan(parse(GUIDE))


def test_the_guides_run_has_its_known_size(text: str) -> None:
    assert "trained: 1052 modules, 120.1 M parameters; the file will have 240.1 MB" in text  # 229 MiB
    rows = {line[2:22].strip(): line[22:].split() for line in text.splitlines() if line.startswith("  ")}
    assert rows["UNet linear and 1×1"][0] == "750"
    assert rows["UNet convolutions"] == ["38", "91.10", "182.2", "76", "%"]
    assert int(rows["text encoder 1"][0]) + int(rows["text encoder 2"][0]) == 264


def test_convolutions_out_of_proportion_are_pointed_out(text: str) -> None:
    assert "76 % of the file are convolutions, because conv_dim is 256" in text
    even = [*GUIDE, "--network_args", "preset=full", "conv_dim=8", "conv_alpha=4", "algo=locon"]
    assert "are convolutions" not in plan(parse(even))


def test_the_guides_memory_is_what_people_report(text: str) -> None:
    """SDXL in fp16 has 4.8 GiB of UNet; batch 1 with checkpointing runs on 12 GB, and not without it."""
    assert "UNet, frozen              4.8" in text or "4.8" in text
    model = meta_model(SETTINGS, parse(GUIDE))
    network = build_network(model, parse(GUIDE))
    network.groups(parse(GUIDE))
    memory = estimate(model, network, parse([*GUIDE, "--train_batch_size=1"]), (1024, 1024))
    assert 8 * GIB < memory.total < 12 * GIB
    assert memory.total - memory.activations + memory.activations_kept > 14 * GIB
    assert memory.frozen["UNet"] == 2 * 2_567_463_684  # parameters of SDXL's UNet


def test_shapes_alone_tell_what_a_real_run_keeps(tmp_path: Path) -> None:
    base = tiny_sdxl.write_model(tmp_path / "base")
    options = Options(
        pretrained_model_name_or_path=str(base),
        network_module="lycoris.kohya",
        network_args=("preset=full", "conv_dim=4"),
        seed=1,
    )
    counted = []
    for model in (meta_model(base, options), load_model(options, torch.device("cpu"))):
        network = build_network(model, options)
        network.groups(options)
        counted.append(count_activations(model, network, options, 2, (64, 64)))
    shapes, real = counted
    assert shapes.full == pytest.approx(real.full, rel=0.01)
    assert shapes.checkpointed == pytest.approx(real.checkpointed, rel=0.01)
    assert real.checkpointed < real.full / 2


@pytest.mark.parametrize(
    ("name", "bytes_"),
    [("", 8), ("AdamW8bit", 2), ("Lion", 4), ("SGDNesterov", 4), ("torch.optim.SGD", 0), ("x.Y", None)],
)
def test_optimizers_keep_what_is_known_of_them(name: str, bytes_: int | None) -> None:
    assert optimizer_bytes(Options(optimizer_type=name)) == bytes_


def test_memory_adds_up() -> None:
    memory = Memory({"a": 1, "b": 2}, 3, 4, None, 5, 50, 5)
    assert memory.total == 15 + 1.5 * GIB


def test_a_plan_with_pictures_tells_how_long_training_is(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    base, data = tiny_sdxl.write_model(tmp_path / "base"), training.write_data(tmp_path / "data")
    arguments = training.flags(base, data, tmp_path / "o", "--train_batch_size=2", "--gradient_accumulation_steps=3")
    assert main([*arguments, "--plan"]) == 0
    out = capfd.readouterr().out
    assert "pictures: 3 pictures in 1 folder, 2 buckets, 6 showings per epoch" in out
    assert "steps: 5, in 5 epochs of 1 step; a step sees up to 6 pictures (batch 2 × 3 accumulated × 1 process)" in out
    assert "for pictures of 64x64" in out
    assert not (tmp_path / "o").exists()


def test_a_plan_needs_neither_base_nor_pictures(capfd: pytest.CaptureFixture[str]) -> None:
    arguments = ["--plan", "--network_module=lycoris.kohya", "--network_args", "preset=attn-only", "--resolution=512"]
    assert main([*arguments, "--pretrained_model_name_or_path=not/there"]) == 0
    out = capfd.readouterr().out
    assert out.startswith("base: SDXL 1.0\n")
    assert "not known without pictures" in out
    assert main(["--plan", "--network_module=x"]) == 2
