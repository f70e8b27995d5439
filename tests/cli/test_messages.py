"""Mistakes that people make on the command line: each is answered with what is wrong and the line to type."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import lorashrink
import lorashrink_example
from lorashrink.cli import app

EXAMPLE = lorashrink_example.path()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA, its base in one file and as a folder, a text, an old result, and a file without tensors."""
    path = tmp_path_factory.mktemp("files")
    shutil.copy(EXAMPLE / "adapter.safetensors", path / "lora.safetensors")
    shutil.copy(EXAMPLE / "base.safetensors", path / "model.safetensors")
    (path / "sdxl").symlink_to(EXAMPLE / "model")
    (path / "prompts.txt").write_text("a cat\n")
    (path / "old.safetensors").write_bytes(b"")
    (path / "none.safetensors").write_bytes((2).to_bytes(8, "little") + b"{}")
    (path / "l_spectra.png").write_bytes(b"")
    return path


def errors(folder: Path, *words: str) -> str:
    """What the command says on stderr, as one line, when it does nothing."""
    done = subprocess.run(
        [sys.executable, "-m", "lorashrink", *words], cwd=folder, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2, done
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith("lorashrink: ")
    return line


MISTAKES = {
    # recipes
    "resize lora.safetensors energy=0.9": "energy=0.9: is not a file. Did you mean -r energy=0.9?",
    "resize lora.safetensors fro_ckpt=1,thr=-3.55 -o old.safetensors": "Did you mean -r fro_ckpt=1,thr=-3.55?",
    "resize lora.safetensors rank=4": "Did you mean -r rank=4?",
    "resize lora.safetensors -r 4": "Did you mean rank=4?",
    "resize lora.safetensors -r 0.95": "Did you mean energy=0.95?",
    "resize lora.safetensors -r -3.5": "Did you mean fro_ckpt=1,thr=-3.5?",
    "resize lora.safetensors -r new_rank=4": "Did you mean rank=4?",
    "resize lora.safetensors -r new_rank=8,new_conv_rank=4": "Did you mean rank=8,conv_rank=4?",
    "resize lora.safetensors -r dynamic_method=sv_fro,dynamic_param=0.9": "Did you mean sv_fro=0.9?",
    "resize lora.safetensors -r energy=99": "99 % is energy=0.99.",
    "resize lora.safetensors -r frockpt=1,thr=-3": "Did you mean fro_ckpt?",
    # options of other tools
    "resize lora.safetensors --rank 4": "there is no option --rank. The recipe says how much to keep: -r rank=4.",
    "resize lora.safetensors --size=4": "-r size=4.",
    "resize lora.safetensors --new-rank 4": "-r rank=4.",
    "resize lora.safetensors --dynamic_method sv_ratio": "-r sv_ratio=0.9.",
    "resize --save_to small.safetensors lora.safetensors": "Name the result with -o small.safetensors.",
    "resize lora.safetensors --outptu x": "Did you mean --output?",
    "resize lora.safetensors --jobs x": "'--jobs': it should be a valid integer. See lorashrink resize -h.",
    "resize lora.safetensors --nonsense": "See lorashrink resize -h.",
    "resise lora.safetensors": "No such command 'resise'. Did you mean 'resize'",
    "--nonsense": "No such option: --nonsense. lorashrink -h lists the commands.",
    "resize -o out": "Missing argument '[BASE] ADAPTER...'. See lorashrink resize -h.",
    "merge lora.safetensors lora.safetensors": "Missing option '--output' / '-o'.",
    "merge lora.safetensors 0.7 lora.safetensors 0.5 -o m.safetensors": "A weight is written as lora.safetensors:0.7.",
    # which file is what
    "resize model.safetensors": "after it: lorashrink resize model.safetensors lora.safetensors",
    "resize lora.safetensors model.safetensors -r rank=2": "lorashrink resize model.safetensors lora.safetensors",
    "report lora.safetensors model.safetensors": "first: lorashrink report model.safetensors lora.safetensors",
    "resize --base lora.safetensors model.safetensors": "lorashrink resize model.safetensors lora.safetensors",
    "shrink --base lora.safetensors lora.safetensors": "lora.safetensors: is a LoRA, and a base model is needed here.",
    "resize model.safetensors sdxl": "difference: lorashrink extract sdxl model.safetensors -o new.safetensors",
    "resize --base lora.safetensors lora.safetensors": "lora.safetensors: is a LoRA, and a base model is needed here.",
    "base-norms none.safetensors -o n.json": "none.safetensors: holds no tensors. Download or export it again.",
    "inspect none.safetensors": "none.safetensors: holds no tensors. Download or export it again.",
    "base-norms lora.safetensors -o n.json": "lora.safetensors: is a LoRA, and a base model is needed here.",
    "norms lora.safetensors -o n.json": "lora.safetensors: is a LoRA, and a base model is needed here.",
    "extract lora.safetensors model.safetensors": "here. To shrink the LoRA: lorashrink resize model.safetensors lora.",
    "extract model.safetensors lora.safetensors": "here. To shrink the LoRA: lorashrink resize model.safetensors lora.",
    "extract lora.safetensors ./lora.safetensors": "lorashrink compare lora.safetensors lora.safetensors",
    "compare model.safetensors sdxl": "lorashrink extract sdxl model.safetensors -o new.safetensors",
    "calibrate": "name the model first: lorashrink calibrate MODEL [ADAPTER...] -o table.safetensors",
    "calibrate lora.safetensors -o t.safetensors": "lorashrink calibrate MODEL [ADAPTER...] -o table.safetensors",
    "calibrate sdlx -o t.safetensors": "sdlx: no such file. Similar names there: sdxl",
    "refine lora.safetensors": "lorashrink refine lora.safetensors --like lora.safetensors --model sdxl/",
    "refine lora.safetensors --like lora.safetensors --model lora.safetensors -o x.safetensors": "is a LoRA, and",
    # names
    "inspect prompts.txt": "prompts.txt: not a .safetensors file.",
    "inspect lroa.safetensors": "lroa.safetensors: no such file. Similar names there: lora.safetensors",
    "pack lroa.safetensors": "lroa.safetensors: no such file. Similar names there: lora.safetensors",
    "unpack lroa.safetensors": "lroa.safetensors: no such file. Similar names there: lora.safetensors",
    "pack lora.safetensors": "pack: name the folder or file to write with -o.",
    "inspect lora": "lora: no such file. Similar names there: lora.safetensors",
    "inspect nowhere/lora.safetensors": "the folder nowhere does not exist",
    "inspect 'lora.safetensors'": "the name contains quotes. Type it without them: lora.safetensors",
    'inspect "lora.safetensors"': "the name contains quotes. Type it without them: lora.safetensors",
    "inspect https://civitai.com/a.safetensors": "is an address. Nothing is downloaded",
    "resize -r rank=2 lroa.safetensors -o old.safetensors": "lroa.safetensors: no such file.",
    "resize -r rank=2 lora.safetensors --base modle.safetensors": "no such file. Similar names there: model.",
    # results
    "resize -r rank=2 lora.safetensors -o out.pt": "-o out.pt: results are .safetensors files. Name one, such as",
    "inspect lora.safetensors --plot l.png": "--plot l_spectra.png: exists already.",
    "demo -o prompts.txt": "-o prompts.txt: is a file. Name a folder.",
    "demo -o new.safetensors": "-o new.safetensors: is the name of a file. Name a folder.",
}  # fmt: skip


@pytest.mark.parametrize("line", MISTAKES)
def test_a_mistake_is_answered_with_the_line_to_type(folder: Path, line: str) -> None:
    before = sorted(os.listdir(folder))
    assert MISTAKES[line] in errors(folder, *line.split(" "))
    assert sorted(os.listdir(folder)) == before


@pytest.mark.skipif(os.name == "nt", reason="on Windows it is a path like any other")
def test_a_path_of_windows_is_named_as_such(folder: Path) -> None:
    text = errors(folder, "inspect", r"C:\my loras\a.safetensors")
    assert "is a path of Windows" in text
    assert "'/mnt/c/my loras/a.safetensors'" in text


def test_a_mistake_is_a_json_document_too(folder: Path) -> None:
    command = [sys.executable, "-m", "lorashrink", "resize", "--json", "--rank", "4", "lora.safetensors"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    document = json.loads(done.stdout)
    assert document["version"] == lorashrink.__version__
    assert document["command"] == "resize"
    assert "-r rank=4" in document["error"]


def invoke(*words: object, status: int = 0) -> str:
    result = CliRunner().invoke(app, list(map(str, words)))
    assert result.exit_code == status, result.output
    return result.output


def test_results_of_an_earlier_run_are_no_inputs(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shutil.copy(folder / "lora.safetensors", tmp_path)
    words = ("resize", "-r", "rank=2", tmp_path)
    invoke(*words)
    assert "lora_rank2.safetensors: exists already" in invoke(*words, status=2)
    text = invoke(*words, "--skip-existing")
    assert "1 file left out" in caplog.text
    assert "0 files written" in text
    assert "1 already there" in text
    assert sorted(os.listdir(tmp_path)) == ["lora.safetensors", "lora_rank2.safetensors"]
    invoke("resize", "-r", "rank=1", tmp_path / "lora_rank2.safetensors")  # named, so that it is meant
    assert (tmp_path / "lora_rank2_rank1.safetensors").is_file()


def test_failures_have_an_input_an_error_and_a_hint(folder: Path, tmp_path: Path) -> None:
    words = (folder / "lora.safetensors", folder / "prompts.txt")
    for command in (("inspect",), ("resize", "-r", "rank=1", "-o", tmp_path)):
        result = CliRunner().invoke(app, [*command, "--json", *map(str, words)])
        assert result.exit_code == 1
        document = json.loads(result.stdout)
        assert document["command"] == command[0]
        (failure,) = document["failed"]
        assert failure["input"] == failure["source"] == str(folder / "prompts.txt")
        assert failure["error"].endswith(failure["hint"])
        assert failure["hint"] == "Give the LoRA or model itself."


def test_an_extracted_lora_larger_than_its_checkpoint_is_named(tmp_path: Path) -> None:
    torch.manual_seed(0)
    base = load_file(EXAMPLE / "base.safetensors")
    save_file({key: value + torch.randn(value.shape) for key, value in base.items()}, tmp_path / "tuned.safetensors")
    words = (tmp_path / "tuned.safetensors", EXAMPLE / "base.safetensors", "-o", tmp_path / "x.safetensors")
    text = invoke("extract", *words, "-r", "energy=1", "-t", "fp32")
    assert "is larger than the checkpoint itself; -r rank=64" in text
    assert "--as" not in text
    assert "is larger" not in invoke("extract", *words, "-r", "rank=1", "--force")
