"""Outputs of two files appear together or not at all, and old ones are never mixed with new ones."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from typer.testing import CliRunner

from lorashrink.cli import app
from lorashrink.errors import OutputError
from lorashrink.files import disk
from lorashrink.files.disk import clear_leftovers, write_together

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
OLD, NEW = {CONFIG: b"old config", WEIGHTS: b"old weights"}, {CONFIG: b"new config", WEIGHTS: b"new weights"}
MODULE = "base_model.model.model.layers.0.self_attn.q_proj"


def write(folder: Path, files: Mapping[str, bytes]) -> None:
    write_together({folder / name: data for name, data in files.items()})


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()} if folder.exists() else {}


def peft_folder(folder: Path, alpha: int, seed: int) -> Path:
    generator = torch.Generator().manual_seed(seed)
    folder.mkdir(parents=True, exist_ok=True)
    factors = {"A": (8, 64), "B": (64, 8)}
    save_file(
        {f"{MODULE}.lora_{side}.weight": torch.randn(shape, generator=generator) for side, shape in factors.items()},
        folder / WEIGHTS,
    )
    settings = {"peft_type": "LORA", "r": 8, "lora_alpha": alpha, "target_modules": ["q_proj"]}
    (folder / CONFIG).write_text(json.dumps(settings))
    return folder


@pytest.mark.parametrize("before", [{}, OLD, {CONFIG: b"old config"}, {WEIGHTS: b"old weights"}])
@pytest.mark.parametrize("step", range(6))
def test_a_pair_is_the_old_or_the_new_one_whatever_rename_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, before: dict[str, bytes], step: int
) -> None:
    for name, data in before.items():
        (tmp_path / name).write_bytes(data)
    steps, real = iter(range(100)), os.replace

    def fails(source: Path, target: Path) -> None:
        if next(steps) == step:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(source, target)

    monkeypatch.setattr(os, "replace", fails)
    if step < 2 + len(before):
        with pytest.raises(OutputError, match="No space left"):
            write(tmp_path, NEW)
        assert contents(tmp_path) == before
    else:
        write(tmp_path, NEW)
        assert contents(tmp_path) == NEW


@pytest.mark.parametrize("before", [{}, OLD])
@pytest.mark.parametrize("step", range(4))
def test_a_killed_replacement_is_put_back_by_the_next_run(tmp_path: Path, before: dict[str, bytes], step: int) -> None:
    """Killed before each rename; no reader then finds a mixed pair."""
    for name, data in before.items():
        (tmp_path / name).write_bytes(data)
    code = f"""
import os, signal
from pathlib import Path
from lorashrink.files.disk import write_together
steps, real = iter(range(100)), os.replace
def killed(source, target):
    if next(steps) == {step}:
        os.kill(os.getpid(), signal.SIGKILL)
    real(source, target)
os.replace = killed
folder = Path({str(tmp_path)!r})
write_together({{folder / name: data for name, data in {NEW!r}.items()}})
"""
    subprocess.run([sys.executable, "-c", code], check=False)
    seen = {name: data for name, data in contents(tmp_path).items() if name in NEW}
    assert WEIGHTS not in seen or seen in (before, NEW)
    clear_leftovers([tmp_path / WEIGHTS, tmp_path / CONFIG])
    after = contents(tmp_path)
    if before:
        assert after in (before, NEW)
    else:
        assert after in ({}, {CONFIG: NEW[CONFIG]}, NEW)


def test_what_a_living_process_has_set_aside_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, OLD)
    real = os.replace

    def look(source: Path, target: Path) -> None:
        clear_leftovers([tmp_path / WEIGHTS, tmp_path / CONFIG])
        real(source, target)

    monkeypatch.setattr(os, "replace", look)
    write(tmp_path, NEW)
    assert contents(tmp_path) == NEW


@pytest.mark.parametrize("command", [["resize", "-r", "rank=4"], ["convert", "-t", "bf16"]])
def test_a_peft_folder_is_replaced_as_a_pair(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: list[str]
) -> None:
    source, out = peft_folder(tmp_path / "in", 16, 0), tmp_path / "out"
    line = [*command, "-o", str(out), str(source)]
    assert CliRunner().invoke(app, line).exit_code == 0
    (output,) = out.iterdir()
    before = contents(output)
    peft_folder(source, 64, 1)
    real = os.replace

    def fails(path: Path, target: Path) -> None:
        if Path(path).suffix == ".tmp" and Path(target).name == WEIGHTS:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(path, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", fails)
        result = CliRunner().invoke(app, [*line, "--force"])
    assert result.exit_code == 2
    assert "No space left" in result.stderr
    assert contents(output) == before
    assert CliRunner().invoke(app, [*line, "--force"]).exit_code == 0
    assert contents(output) != before
    assert contents(output).keys() == {CONFIG, WEIGHTS}


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_signals_in_any_number_leave_no_temporary_file(tmp_path: Path, number: signal.Signals) -> None:
    """More signals arrive while the first one is handled."""
    for seed in range(3):
        peft_folder(tmp_path / "in" / f"{seed}", 16, seed)
    slow = f"""
import os, signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # whatever the parent ignores, as under nohup
if hasattr(signal, "SIGHUP"):
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
real = os.fsync
def slowly(number):
    open({str(tmp_path / "working")!r}, "a").write("x")
    time.sleep(0.4)
    real(number)
os.fsync = slowly
from lorashrink.cli import main
folder = {str(tmp_path)!r}
sys.argv = ["lorashrink", "resize", "-r", "rank=2", "--recursive", "-o", folder + "/out", folder + "/in"]
main()
"""
    process = subprocess.Popen([sys.executable, "-c", slow], stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 100
    while not (tmp_path / "working").exists() or len((tmp_path / "working").read_text()) < 4:
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)
    for _ in range(4):
        process.send_signal(number)
        time.sleep(0.05)
    _, errors = process.communicate(timeout=100)
    assert process.returncode == 130, errors
    assert "output" in errors
    assert "written; no unfinished file was left" in errors
    assert "Traceback" not in errors
    for folder in (tmp_path / "out").iterdir():
        assert contents(folder).keys() in ({CONFIG, WEIGHTS}, set())


def test_unfinished_files_of_this_process_can_be_deleted(tmp_path: Path) -> None:
    number, temporary = disk.create_temporary(tmp_path / "x")
    os.close(number)
    disk.discard_unfinished()
    assert not temporary.exists()
