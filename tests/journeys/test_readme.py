"""Every command and all Python of the README and of the pages for users work, and print what is shown."""

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
PAGES = ("README.md", "docs/index.md", "docs/ja/index.md", "docs/recipes.md", "docs/commands.md", "docs/python.md")
TEXTS = {name: (ROOT / name).read_text(encoding="utf-8") for name in PAGES}
README = TEXTS["README.md"]
COMMANDS = {  # command -> the first page that has it
    line: name
    for name, text in reversed(TEXTS.items())
    for block in re.findall(r"```sh\n(.*?)```", text, re.DOTALL)
    for line in block.splitlines()
}
SHOWN = re.findall(r"```sh\n(lorashrink [^\n]*)\n```\n\n```text\n(.*?)```", README, re.DOTALL)
PYTHON = re.findall(r"```python\n(import .*?)```", "".join(TEXTS.values()), re.DOTALL)


@pytest.fixture
def example(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the files that the pages speak of."""
    source = lorashrink_example.path()
    shutil.copy(source / "base.safetensors", tmp_path / "model.safetensors")
    shutil.copy(source / "adapter.safetensors", tmp_path / "lora.safetensors")
    (tmp_path / "loras").mkdir()
    shutil.copy(source / "adapter.safetensors", tmp_path / "loras" / "one.safetensors")
    shutil.copytree(source / "model", tmp_path / "sdxl")  # a link would lead to the table that lies beside the model
    shutil.copy(source / "loras" / "style.safetensors", tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(command: str) -> str:
    result = CliRunner().invoke(app, shlex.split(command, comments=True)[1:])
    assert result.exit_code == 0, result.output
    return result.output


@pytest.mark.usefixtures("example")
@pytest.mark.parametrize("command", [line for line in COMMANDS if line.startswith("lorashrink")])
def test_every_command_works(command: str) -> None:
    if "tuned.safetensors" in command:
        tensors = load_file("model.safetensors")
        save_file(
            {key: tensor + 0.01 * torch.randn(tensor.shape) for key, tensor in tensors.items()}, "tuned.safetensors"
        )
    if "peft-folder" in command:
        denoiser = {key: value for key, value in load_file("lora.safetensors").items() if key.startswith("lora_unet")}
        save_file(denoiser, "peft.safetensors")
        run("lorashrink convert --naming peft model.safetensors peft.safetensors")
        Path("peft_peft").rename("peft-folder")
    if "shrunk.safetensors" in command:
        run("lorashrink resize -r energy=0.99 -o shrunk.safetensors lora.safetensors")
    if "out/lora_energy0.99" in command:
        run("lorashrink resize -r energy=0.99 -o out lora.safetensors")
    if "model-norms.json" in command and " base-norms " not in command:
        run("lorashrink base-norms model.safetensors -o model-norms.json")
    run(command)


@pytest.mark.usefixtures("example")
@pytest.mark.parametrize(("command", "shown"), SHOWN)
def test_output_that_the_readme_shows_is_printed(command: str, shown: str) -> None:
    printed = [" ".join(line.split()) for line in run(command).splitlines()]
    lines = [" ".join(line.split()) for line in shown.splitlines() if line != "..."]
    assert lines
    assert [line for line in lines if line not in printed] == []


@pytest.mark.usefixtures("example")
@pytest.mark.parametrize("code", PYTHON)
def test_every_example_in_python_works(code: str) -> None:
    exec(compile(code, "documentation", "exec"), {})


@pytest.mark.parametrize("command", [line for line in COMMANDS if line.startswith("make")])
def test_every_make_target_exists(command: str) -> None:
    target = command.split()[1]
    assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE)


def test_every_file_that_the_readme_links_exists() -> None:
    linked = re.findall(r"\]\(([\w./-]+)\)", README)
    assert len(linked) >= 10
    assert all((ROOT / name).exists() for name in linked)


def test_readme_fits_on_a_few_screens() -> None:
    assert len(README.splitlines()) <= 130
