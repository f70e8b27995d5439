"""The plan of a run: numbers of the guide's run on SDXL in full size, and tiny ones by hand."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest
import tiny_sdxl
import torch
import training
from safetensors.torch import save_file
from torch import Tensor

from lorashrink.errors import InputError
from lorashrink.train.data.batches import batch_count
from lorashrink.train.data.scanning import scan
from lorashrink.train.flags.options import Options, parse
from lorashrink.train.model.loading import load_model
from lorashrink.train.model.network import build_network
from lorashrink.train.output.saving import run_length
from lorashrink.train.run.optimizers import make_optimizer
from lorashrink.train.run.preparing import STATES, describe, plan

CPU = torch.device("cpu")
GIB = 2**30

# The guide's command, without what neither size nor memory depends on.
GUIDE = parse(
    [
        *["--pretrained_model_name_or_path=/no/base/here", "--train_data_dir=/no/pictures/here"],
        *["--resolution=1024,1024", "--output_dir=/no/output/here", "--enable_bucket"],
        *["--network_module=lycoris.kohya", "--network_dim=8", "--network_alpha=4", "--network_args", "preset=full"],
        *["conv_dim=256", "conv_alpha=4", "algo=locon", "--learning_rate=0.0001", "--no_half_vae"],
        *["--mixed_precision=fp16", "--save_precision=fp16", "--cache_latents", "--optimizer_type=AdamW"],
        *["--gradient_accumulation_steps=6", "--gradient_checkpointing", "--train_batch_size=8"],
        *["--max_train_steps=400"],
    ]
)


@pytest.fixture(scope="module")
def guide() -> str:
    return plan(GUIDE)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_sdxl.write_model(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return training.write_data(tmp_path_factory.mktemp("pictures"))


def options(base: Path, **more: object) -> Options:
    settings = {"network_module": "lycoris.kohya", "network_dim": 2, "resolution": "64", "learning_rate": 1e-4}
    return Options(pretrained_model_name_or_path=str(base), **{**settings, **more})


def rows(text: str) -> dict[str, list[str]]:
    """The lines of the table, by what stands on their left; columns are two spaces apart or more."""
    cells = (re.split(r" {2,}", line.strip()) for line in text.splitlines())
    return {first: rest for first, *rest in cells if rest}


# --- SDXL in full size --------------------------------------------------------------------------


def test_the_guides_run_has_the_modules_and_parameters_of_its_command(guide: str) -> None:
    # Counted on real SDXL: 788 + 264 modules, 120.1 million parameters, 229 MiB in fp16
    assert "  UNet linear and 1×1: 750 modules, 21,747,200 parameters" in guide
    assert "  UNet convolutions: 38 modules, 91,095,040 parameters" in guide
    assert "  text encoder 1: 72 modules, 1,327,104 parameters" in guide
    assert "  text encoder 2: 192 modules, 5,898,240 parameters" in guide
    assert "network: 1052 modules, 120.1 million parameters; a file has 240.1 MB in fp16" in guide
    assert round(240.1e6 / 2**20) == 229


def test_a_step_of_the_guides_run_sees_48_pictures(guide: str) -> None:
    assert "batch: 8 × 6 accumulated × 1 process = 48 pictures per step" in guide


def test_what_is_not_there_is_said_and_planned_for_sdxl(guide: str) -> None:
    assert "base: /no/base/here, which is not there; planned for SDXL 1.0" in guide
    assert "pictures: none in /no/pictures/here" in guide
    assert "length: 400 steps; without pictures it is not known how many steps an epoch has" in guide
    assert "for 8 pictures of 1024×1024" in guide


def test_lasting_memory_is_bytes_of_weights_adapter_gradients_and_states(guide: str) -> None:
    table = {name: cells[-1] for name, cells in rows(guide).items()}
    # Parameters of SDXL 1.0: UNet 2,567,463,684; text encoders 123,060,480 and 694,659,840
    assert table["UNet, float16"] == f"{2 * 2_567_463_684 / GIB:.2f}" == "4.78"
    assert table["text encoders, float16"] == f"{2 * (123_060_480 + 694_659_840) / GIB:.2f}" == "1.52"
    assert table["adapter, float32"] == table["its gradients"] == f"{4 * 120_067_584 / GIB:.2f}"
    assert table["states of AdamW"] == f"{8 * 120_067_584 / GIB:.2f}"
    assert not any(name.startswith("VAE") for name in table)  # latents are cached


def test_the_total_is_that_of_the_rows(guide: str) -> None:
    memory = rows(guide[guide.index("GPU memory") :])
    *parts, total = (float(cells[-1]) for cells in memory.values())
    assert total == pytest.approx(sum(parts), abs=0.05)
    assert 16 < total < 24 * 0.95


# --- pictures, batches, length ------------------------------------------------------------------


def of_pictures(base: Path, pictures: Path, **more: object) -> Options:
    buckets = {"enable_bucket": True, "min_bucket_reso": 32, "max_bucket_reso": 128, "bucket_reso_steps": 32}
    folder = {"train_data_dir": str(pictures), "caption_extension": ".txt"}
    return options(base, **{**folder, **buckets, "gradient_accumulation_steps": 4, "max_train_steps": 5, **more})


PICTURES = "pictures: 3 in 1 folder and 2 buckets, 6 showings per epoch"
# 6 showings of batches of 1 are 6 batches, hence ceil(6 / 4) steps; ceil(5 / 2) epochs
LENGTH = "length: 6 batches or 2 steps per epoch, 3 epochs, 5 steps"


def test_pictures_and_length_are_those_of_the_folder(base: Path, pictures: Path) -> None:
    lines = plan(of_pictures(base, pictures)).splitlines()
    assert lines[:2] == [f"base: {base}", PICTURES]
    assert "batch: 1 × 4 accumulated × 1 process = 4 pictures per step" in lines
    assert LENGTH in lines


def test_processes_share_the_batches(base: Path, pictures: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    text = plan(of_pictures(base, pictures))
    assert "batch: 1 × 4 accumulated × 2 processes = 8 pictures per step" in text
    assert "length: 3 batches or 1 step per epoch, 5 epochs, 5 steps" in text


def test_memory_is_that_of_the_batch_with_the_most_pixels(base: Path, pictures: Path) -> None:
    # Two pictures, twice each, are 64×64; the third, twice, is of another shape.
    assert "for 4 pictures of 64×64" in plan(of_pictures(base, pictures, train_batch_size=8))
    assert "for 3 pictures of 64×64" in plan(of_pictures(base, pictures, train_batch_size=3))


def test_a_run_begins_with_the_same_numbers(base: Path, pictures: Path) -> None:
    chosen = of_pictures(base, pictures, network_args=("preset=attn-mlp",), save_precision="bf16")
    data, network = scan(chosen), build_network(load_model(chosen, CPU), chosen)
    lines = describe(chosen, data, network, run_length(chosen, batch_count(data)), 1).splitlines()
    assert lines[0] == PICTURES
    assert lines[-1] == LENGTH
    # Four projections of rank 2 and two layers of double width, in each of two layers of width 16, or 24
    assert f"  text encoder 1: 12 modules, {2 * (4 * 2 * (16 + 16) + 2 * 2 * (16 + 32))} parameters" in lines
    assert f"  text encoder 2: 12 modules, {2 * (4 * 2 * (24 + 24) + 2 * 2 * (24 + 48)):,} parameters" in lines
    assert set(lines) <= set(plan(chosen).splitlines())


def test_ranks_can_come_from_a_file(base: Path, tmp_path: Path) -> None:
    chosen = options(base, network_dim=3, network_alpha=3.0)
    save_file(build_network(load_model(chosen, CPU), chosen).state(), tmp_path / "x.safetensors")
    again = options(base, network_weights=str(tmp_path / "x.safetensors"), dim_from_weights=True)
    assert plan(again) == plan(chosen)


def test_parts_that_are_cached_or_not_trained_take_nothing(base: Path) -> None:
    everything = plan(options(base, mixed_precision="fp16", no_half_vae=True))
    assert {"VAE, float32", "text encoders, float16"} <= rows(everything).keys()
    assert "text encoder 1: " in everything
    unet = plan(options(base, cache_latents=True, cache_text_encoder_outputs=True, network_train_unet_only=True))
    assert "VAE" not in unet
    assert "text encoder" not in unet


def test_an_unknown_optimizer_is_planned_like_adam(base: Path) -> None:
    table = rows(plan(options(base, optimizer_type="torch.optim.Rprop")))
    assert table["states of torch.optim.Rprop"] == rows(plan(options(base)))["states of AdamW"]


def test_a_single_file_is_planned_with_the_settings_given_for_it(base: Path, tmp_path: Path) -> None:
    file = tmp_path / "x.safetensors"
    file.touch()
    text = plan(options(file, model_config=str(base)))
    assert f"base: {file}, with the settings in {base}" in text
    assert rows(text).keys() == rows(plan(options(base))).keys()


def test_a_folder_without_settings_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="settings of the base cannot be read"):
        plan(options(tmp_path))


# --- memory -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["AdamW", "Lion", "Prodigy", "Adafactor"])
def test_an_optimizer_keeps_no_more_bytes_than_planned(name: str) -> None:
    chosen = Options(
        optimizer_type=name,
        learning_rate=1.0,
        optimizer_args=("relative_step=False",) if name == "Adafactor" else (),
    )
    weight = torch.nn.Parameter(torch.ones(32, 32))
    optimizer, _ = make_optimizer(chosen, [{"params": [weight], "lr": 1.0}])
    weight.grad = torch.ones_like(weight)
    optimizer.step()
    states = [state for state in optimizer.state[weight].values() if isinstance(state, Tensor) and state.numel() > 1]
    kept = sum(state.numel() * state.element_size() for state in states) / weight.numel()
    planned = STATES[name.lower()]
    assert kept == planned or (name == "Adafactor" and 0 < kept <= planned)


@pytest.mark.parametrize(
    ("change", "total"),
    [
        ({"train_batch_size": 8}, 16.3),
        ({"train_batch_size": 1}, 10.0),
        ({"train_batch_size": 1, "gradient_checkpointing": False}, 17.8),
        ({"train_batch_size": 1, "mixed_precision": "no"}, 16.8),
        ({"train_batch_size": 1, "resolution": "768"}, 9.6),
    ],
)
def test_memory_is_about_what_was_counted_for_the_guides_run(change: dict[str, Any], total: float) -> None:
    memory = rows(plan(dataclasses.replace(GUIDE, **change)).partition("GPU memory")[2])
    assert float(memory["in all"][-1]) == pytest.approx(total, abs=0.15)
