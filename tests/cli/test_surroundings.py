"""The program in odd places: a full stdout, no home folder, names that look like markup."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from typer.testing import CliRunner

import lorashrink
import lorashrink_example
from lorashrink.cli import app
from lorashrink.cli.progress import progress_bars
from lorashrink.files.disk import user_cache

LAYER = "lora_unet_b_[/]_to_q"


def adapter(path: Path) -> Path:
    torch.manual_seed(0)
    save_file({f"{LAYER}.lora_up.weight": torch.randn(8, 4), f"{LAYER}.lora_down.weight": torch.randn(4, 8)}, path)
    return path


def run(*words: object) -> str:
    result = CliRunner().invoke(app, list(map(str, words)))
    assert result.exit_code == 0, result.output
    return result.output


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="Linux has /dev/full")
@pytest.mark.parametrize("words", [("--version",), ("inspect", "--json", "--header")])
def test_a_full_stdout_is_one_line(tmp_path: Path, words: tuple[str, ...]) -> None:
    files = [adapter(tmp_path / "a.safetensors")] if words[0] == "inspect" else []
    with open("/dev/full", "w") as full:
        command = [sys.executable, "-m", "lorashrink", *words, *map(str, files)]
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr == (
        "lorashrink: the results could not be printed (No space left on device); files are written all the same\n"
    )


def test_the_module_is_the_command() -> None:
    done = subprocess.run([sys.executable, "-m", "lorashrink", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout == f"lorashrink {lorashrink.__version__}\n"


@pytest.mark.skipif(sys.platform != "linux", reason="the cache of other systems has other rules")
def test_resize_works_without_a_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in containers whose user has no entry in /etc/passwd."""
    import pwd

    def nobody(_: int) -> None:
        raise KeyError

    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(pwd, "getpwuid", nobody)
    monkeypatch.chdir(tmp_path)
    assert user_cache() is None
    path, base = adapter(tmp_path / "a.safetensors"), lorashrink_example.path()
    report = lorashrink.resize(
        base / "adapter.safetensors",
        base=base / "base.safetensors",
        recipes="fro_ckpt=1,thr=-3",
        output=tmp_path / "out",
    )
    assert not report.failed
    assert sorted(os.listdir(tmp_path)) == [path.name, "out"]


@pytest.mark.parametrize("command", [("inspect",), ("inspect", "-v"), ("resize", "-vv", "-r", "rank=2")])
def test_names_that_look_like_markup_are_printed_as_they_are(tmp_path: Path, command: tuple[str, ...]) -> None:
    path = adapter(tmp_path / "[pony] style.safetensors")
    text = run(*command, *(["-o", tmp_path / "out"] if command[0] == "resize" else []), path)
    assert "[pony] style" in text
    if len(command) > 1:
        assert LAYER in text


def test_progress_bars_take_names_as_they_are(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setenv("FORCE_COLOR", "1")
    with progress_bars(quiet=False) as progress:
        assert progress
        progress("decomposing [/] [pony] a", 1, 2)
    assert "[/] [pony] a" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["inspect", "norms"])
def test_every_json_document_has_a_version(tmp_path: Path, command: str) -> None:
    words = {
        "inspect": ["--header", adapter(tmp_path / "a.safetensors")],
        "norms": [lorashrink_example.path("base.safetensors"), "-o", tmp_path / "norms.json"],
    }
    assert json.loads(run(command, "--json", *words[command]))["version"] == lorashrink.__version__
