"""Every command and every line of Python in the README works, on the example pair."""

from __future__ import annotations

import re
import shlex
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import lorashrink_example
from lorashrink.cli import app

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "README.md").read_text()
COMMANDS = [line for block in re.findall(r"```sh\n(.*?)```", TEXT, re.DOTALL) for line in block.splitlines()]
PYTHON = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)


@pytest.fixture
def example(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the files that the README speaks of."""
    source = lorashrink_example.path()
    shutil.copy(source / "base.safetensors", tmp_path / "model.safetensors")
    shutil.copy(source / "adapter.safetensors", tmp_path / "lora.safetensors")
    (tmp_path / "loras").mkdir()
    shutil.copy(source / "adapter.safetensors", tmp_path / "loras" / "one.safetensors")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.usefixtures("example")
@pytest.mark.parametrize("command", [line for line in COMMANDS if line.startswith("lorashrink")])
def test_every_command_works(command: str) -> None:
    if "tuned.safetensors" in command:
        tensors = load_file("model.safetensors")
        save_file(
            {key: tensor + 0.01 * torch.randn(tensor.shape) for key, tensor in tensors.items()}, "tuned.safetensors"
        )
    if "peft-folder" in command:
        denoiser = {key: each for key, each in load_file("lora.safetensors").items() if key.startswith("lora_unet")}
        save_file(denoiser, "peft.safetensors")
        CliRunner().invoke(app, ["convert", "--naming", "peft", "model.safetensors", "peft.safetensors"])
        Path("peft_peft").rename("peft-folder")
    if "shrunk.safetensors" in command:
        CliRunner().invoke(app, ["resize", "-r", "energy=0.99", "-o", "shrunk.safetensors", "lora.safetensors"])
    if "model-norms.json" in command and " norms " not in command:
        CliRunner().invoke(app, ["norms", "model.safetensors", "-o", "model-norms.json"])
    result = CliRunner().invoke(app, shlex.split(command, comments=True)[1:])
    assert result.exit_code == 0, result.output


@pytest.mark.usefixtures("example")
@pytest.mark.parametrize("code", PYTHON)
def test_every_example_in_python_works(code: str) -> None:
    exec(compile(code, "README.md", "exec"), {})


@pytest.mark.parametrize("command", [line for line in COMMANDS if line.startswith("make")])
def test_every_make_target_exists(command: str) -> None:
    target = command.split()[1]
    assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE)


def test_every_file_that_is_linked_or_listed_exists() -> None:
    linked = re.findall(r"\]\(([\w./-]+)\)", TEXT)
    assert len(linked) >= 3
    assert all((ROOT / name).exists() for name in linked)
    listed = re.findall(r"^  (\w+(?:\.py|/))", TEXT, re.MULTILINE)
    assert len(listed) >= 10
    assert all((ROOT / "lorashrink" / name).exists() for name in listed)
