"""Batches that are killed at random moments: every output is complete or not there, and the next run ends the same."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import killed_runs
import pytest
import torch
from safetensors.torch import save_file

COUNT = 50 if os.environ.get("LORASHRINK_FAULTS") == "long" else 6
SOURCES, OUTPUTS = 10, 20  # each is made by two recipes


def write_file(path: Path, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    name = "lora_unet_middle_block_1_transformer_blocks_0_attn1_to_q"
    shapes = {"lora_up.weight": (64, 8), "lora_down.weight": (8, 64)}
    tensors = {f"{name}.{role}": torch.randn(shape, generator=generator) for role, shape in shapes.items()}
    save_file({**tensors, f"{name}.alpha": torch.tensor(8.0)}, path.with_suffix(".safetensors"))


def write_folder(path: Path, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    name = "base_model.model.model.layers.0.self_attn.q_proj"
    shapes = {"lora_A.weight": (8, 64), "lora_B.weight": (64, 8)}
    tensors = {f"{name}.{role}": torch.randn(shape, generator=generator) for role, shape in shapes.items()}
    path.mkdir()
    save_file(tensors, path / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "r": 8, "lora_alpha": seed + 1, "target_modules": ["q_proj"]}
    (path / "adapter_config.json").write_text(json.dumps(settings))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system cannot fork")
@pytest.mark.parametrize("write", [write_file, write_folder])
def test_killed_runs_continue_to_the_same_bytes(tmp_path: Path, write: Callable[[Path, int], None]) -> None:
    (tmp_path / "in").mkdir()
    for seed in range(SOURCES):
        write(tmp_path / "in" / f"style{seed}", seed)
    places = [str(tmp_path / name) for name in ("in", "out", "reference")]
    command = [sys.executable, killed_runs.__file__, *places, str(COUNT)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    trials = json.loads(done.stdout)
    assert len(trials) == COUNT
    for trial in trials:
        assert trial["whole"], "an output under its name is complete"
        assert (trial["status"], trial["equal"], trial["done"]) == (0, True, True), trial
    # they were killed at work, and not before or after it
    assert sum(trial["killed"] and 0 < trial["outputs"] < OUTPUTS for trial in trials) >= COUNT // 3
