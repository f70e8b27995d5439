"""`calibrate` and `refine` as commands: models as positional arguments, single files, prompts as text."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_pipelines import LAYERS, WRITERS, write_adapter
from tiny_single_file import write_single_file
from typer.testing import CliRunner

import lorashrink_example
from lorashrink.cli import app

MODEL = lorashrink_example.path("model")
SHORT = ("--prompts", "a cat --w 64 --h 64 --s 2", "--steps-used", "1")


def run(*words: object, status: int = 0) -> str:
    result = CliRunner().invoke(app, list(map(str, words)))
    assert result.exit_code == status, result.output
    return result.output


def test_a_model_alone_gives_a_table(tmp_path: Path) -> None:
    run("calibrate", MODEL, *SHORT, "-o", tmp_path / "new.safetensors")
    run("calibrate", "--base-table", MODEL, *SHORT, "-o", tmp_path / "old.safetensors")
    new, old = (load_file(tmp_path / name) for name in ("new.safetensors", "old.safetensors"))
    assert new.keys() == old.keys()
    assert all(torch.equal(new[key], old[key]) for key in new)


@pytest.mark.parametrize("words", [(), ("--base-table", MODEL, "lora.safetensors")])
def test_calibrate_says_how_to_name_the_model(tmp_path: Path, words: tuple[object, ...]) -> None:
    assert "calibrate MODEL" in run("calibrate", *words, "-o", tmp_path / "t.safetensors", status=2)


def test_a_model_in_one_file_takes_its_settings_from_a_folder(tmp_path: Path) -> None:
    name = "StableDiffusionXLPipeline"
    folder = WRITERS[name](tmp_path / "model")
    file = write_single_file(folder, tmp_path / "sdxl.safetensors")
    lora = write_adapter(tmp_path / "lora.safetensors", folder, LAYERS[name][1])
    run("calibrate", folder, lora, *SHORT, "-o", tmp_path / "a.safetensors")
    run("calibrate", file, lora, *SHORT, "--images-config", folder, "-o", tmp_path / "b.safetensors")
    a, b = load_file(tmp_path / "a.safetensors"), load_file(tmp_path / "b.safetensors")
    assert a.keys() == b.keys()
    for key in a:
        torch.testing.assert_close(a[key], b[key], rtol=1e-3, atol=1e-6)
    run("resize", "-r", "rank=2", "-o", tmp_path / "small.safetensors", lora)
    words = (
        "--like",
        lora,
        "--model",
        file,
        "--images-config",
        folder,
        "--steps",
        "1",
        *SHORT[:2],
        "--seeds",
        "0,1,2,3",
    )
    run("refine", tmp_path / "small.safetensors", *words, "-o", tmp_path / "better.safetensors")
    assert (tmp_path / "better.safetensors").is_file()
