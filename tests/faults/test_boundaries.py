"""One input that fails in any way: its line in `failed`, the others done, status 1."""

from __future__ import annotations

import json
import os
import shutil
import sqlite3
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from typer.testing import CliRunner

from lorashrink import adapters
from lorashrink.cli import app
from lorashrink.shrinking import journal
from lorashrink.shrinking.run import resize

LAYER = "lora_unet_middle_block_1_transformer_blocks_0_attn1_to_q"


def write_adapter(path: Path, seed: int = 0, alpha: torch.Tensor | None = None) -> Path:
    generator = torch.Generator().manual_seed(seed)
    tensors = {
        f"{LAYER}.lora_up.weight": torch.randn(32, 4, generator=generator),
        f"{LAYER}.lora_down.weight": torch.randn(4, 32, generator=generator),
        f"{LAYER}.alpha": torch.tensor(4.0) if alpha is None else alpha,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, path)
    return path


def huge_alpha(folder: Path) -> Path:
    return write_adapter(folder / "bad.safetensors", alpha=torch.tensor(1e300, dtype=torch.float64))


def long_alpha(folder: Path) -> Path:
    path = folder / "bad"
    generator = torch.Generator().manual_seed(0)
    name = "base_model.model.model.layers.0.self_attn.q_proj"
    factors = {"A": (4, 32), "B": (32, 4)}
    path.mkdir()
    save_file(
        {f"{name}.lora_{side}.weight": torch.randn(shape, generator=generator) for side, shape in factors.items()},
        path / "adapter_model.safetensors",
    )
    (path / "adapter_config.json").write_text(f'{{"peft_type":"LORA","r":4,"lora_alpha":1{"0" * 400}}}')
    return path


def surrogate(folder: Path) -> Path:
    path = write_adapter(folder / "bad.safetensors")
    data = path.read_bytes()
    header = data[8 : 8 + int.from_bytes(data[:8], "little")]
    changed = header.replace(b'"lora_unet_middle', b'"\\ud800a_unet_mid')
    path.write_bytes(len(changed).to_bytes(8, "little") + changed + data[8 + len(header) :])
    return path


def pipe(folder: Path) -> Path:
    os.mkfifo(folder / "bad.safetensors")
    return folder / "bad.safetensors"


BAD: list[Callable[[Path], Path]] = [huge_alpha, long_alpha, surrogate, pipe]
COMMANDS = {
    "resize": ["-r", "rank=2", "-o", "out"],
    "inspect": [],
    "convert": ["-t", "fp16", "-o", "out"],
    "overlap": [],
    "pack": ["-o", "out"],
}


@pytest.mark.parametrize("make", BAD)
@pytest.mark.parametrize("command", COMMANDS)
def test_one_bad_input_does_not_stop_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str, make: Callable[[Path], Path]
) -> None:
    if command == "convert" and make is huge_alpha:
        return  # a copy does not look at the number
    monkeypatch.chdir(tmp_path)
    good = [write_adapter(tmp_path / f"{name}.safetensors", seed) for seed, name in enumerate("ab")]
    bad = make(tmp_path)
    result = CliRunner().invoke(app, [command, *map(str, [good[0], bad, good[1]]), *COMMANDS[command], "--json"])
    assert isinstance(result.exception, SystemExit | None), repr(result.exception)
    assert result.exit_code == 1, result.output
    failed = json.loads(result.stdout)["failed"]
    assert [str(bad)] == (list(failed) if isinstance(failed, dict) else [failure["source"] for failure in failed])
    assert str(bad) in result.stderr
    assert "unexpected" not in result.stderr
    if "-o" in COMMANDS[command]:
        assert len(list((tmp_path / "out").rglob("*.safetensors"))) == 2


@pytest.mark.parametrize("error", [RuntimeError("first\nsecond"), MemoryError(), OSError(5, "Input/output error")])
@pytest.mark.parametrize("command", COMMANDS)
def test_an_unforeseen_error_is_the_line_of_its_input(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str, error: Exception
) -> None:
    """The other inputs are done, and the line says what to do."""
    monkeypatch.chdir(tmp_path)
    good = [write_adapter(tmp_path / f"{name}.safetensors", seed) for seed, name in enumerate("abc")]
    real = adapters.adapter_of

    def breaks(path: Path, *rest: object) -> object:
        if path.name == "b.safetensors":
            raise error
        return real(path, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(adapters, "adapter_of", breaks)
    result = CliRunner().invoke(app, [command, *map(str, good), *COMMANDS[command]])
    assert result.exit_code == 1, result.output
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1
    assert lines[0].startswith(f"lorashrink: {good[1]}: ")
    assert lines[0].endswith((".", "--debug shows."))


def test_any_error_of_a_whole_command_is_a_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    good = write_adapter(tmp_path / "a.safetensors")

    def breaks(*_: object) -> object:
        raise RuntimeError("no idea")

    monkeypatch.setattr(adapters, "adapter_of", breaks)
    result = CliRunner().invoke(app, ["compare", str(good), str(good)])
    assert isinstance(result.exception, SystemExit)
    assert result.exit_code == 2
    assert "unexpected RuntimeError: no idea" in result.stderr
    assert "report" in result.stderr


def test_outputs_may_be_moved_away_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As watch folders and `rsync --remove-source-files` do."""
    monkeypatch.setattr(journal, "SETTLED_SECONDS", 0.0)
    sources = [write_adapter(tmp_path / "in" / f"{name}.safetensors", seed) for seed, name in enumerate("abc")]
    real = os.replace

    def move_on(source: Path, target: Path) -> None:
        real(source, target)
        shutil.move(target, tmp_path / "away" / target.name)

    (tmp_path / "away").mkdir()
    monkeypatch.setattr(os, "replace", move_on)
    report = resize(sources, recipes="rank=2", output=tmp_path / "out", skip_existing=True)
    assert not report.failed
    assert len(list((tmp_path / "away").iterdir())) == 3


@pytest.mark.parametrize("cell", ["'{'", "'[[1]]'", "NULL", "5", "x'00'"])
@pytest.mark.parametrize("column", ["stamps", "bytes_before", "threshold", "relative_error", "recipe", "state"])
def test_a_damaged_journal_stops_no_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, column: str, cell: str
) -> None:
    monkeypatch.setattr(journal, "SETTLED_SECONDS", 0.0)
    sources = [write_adapter(tmp_path / f"{name}.safetensors", seed) for seed, name in enumerate("ab")]
    keywords = {"recipes": "rank=2", "output": tmp_path / "out", "skip_existing": True}
    resize(sources, **keywords)  # type: ignore[arg-type]
    with sqlite3.connect(tmp_path / "out" / journal.NAME) as database:
        database.execute(f"UPDATE outputs SET {column}={cell}")
    database.close()
    report = resize(sources, **keywords)  # type: ignore[arg-type]
    assert not report.failed
    assert [result.skipped for result in report.results] == [True, True]
