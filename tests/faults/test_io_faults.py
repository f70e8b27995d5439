"""Every call of the system that a writing command makes fails once: the old output is left, or the new one complete.

LORASHRINK_FAULTS=long tries every call with every error, and more commands; the short form most calls with one of them.
"""

from __future__ import annotations

import builtins
import errno
import json
import os
import shutil
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable
from io import FileIO
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from lorashrink.cli import app
from lorashrink.files import disk, store, writing
from lorashrink.shrinking.run import resize

LONG = os.environ.get("LORASHRINK_FAULTS") == "long"
PARITY = Path(__file__).parents[1] / "data" / "parity"
BASE, LORA = PARITY / "base.safetensors", PARITY / "lora.safetensors"
MODULE = "base_model.model.model.layers.0.self_attn.q_proj"

ERRORS = (errno.ENOSPC, errno.EIO, errno.EACCES)
SHORT = -1  # in place of an error: the call does a part of its work

# Calls by path, and calls by descriptor.
BY_PATH = ("open", "stat", "replace", "unlink", "mkdir", "listdir", "scandir", "access")
BY_NUMBER = ("pwrite", "preadv", "fsync")
READS = ("read", "readall", "file")  # of open files, and `builtins.open`


_MANY = ("stat", "access", "listdir", "scandir")  # of which the short form lets every third fail


class Faults:
    """Counts the calls of the system below a folder, and lets one of them fail."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder, self.counts, self.lock = str(folder), Counter[str](), threading.Lock()
        self.fails: tuple[str, int, int] | None = None
        for name in BY_PATH:
            monkeypatch.setattr(os, name, self._by_path(name, getattr(os, name)))
        for name in BY_NUMBER:
            monkeypatch.setattr(os, name, self._by_number(name, getattr(os, name)))
        monkeypatch.setattr(builtins, "open", self._by_path("file", builtins.open))
        for module in (store, writing):
            monkeypatch.setattr(module, "FileIO", self._files())

    def plan(self, fails: tuple[str, int, int] | None) -> None:
        self.counts.clear()
        self.fails = fails

    def _now(self, name: str) -> int:
        """The error with which this call fails; 0 for none."""
        with self.lock:
            count = self.counts[name]
            self.counts[name] += 1
        return self.fails[2] if self.fails and self.fails[:2] == (name, count) else 0

    def _by_path(self, name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(path: Any = ".", *rest: Any, **options: Any) -> Any:
            inside = isinstance(path, (str, os.PathLike)) and os.fspath(path).startswith(self.folder)
            if inside and (error := self._now(name)) > 0:
                if name == "access":
                    return False
                raise OSError(error, os.strerror(error), os.fspath(path))
            return real(path, *rest, **options)

        return call

    def _by_number(self, name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(number: int, *rest: Any) -> Any:
            error = self._now(name)
            if error > 0:
                raise OSError(error, os.strerror(error))
            if error == SHORT and name == "pwrite":
                return real(number, rest[0][: max(1, len(rest[0]) // 2)], *rest[1:])
            if error == SHORT and name == "preadv":
                return 0  # as if the file had been cut
            return real(number, *rest)

        return call

    def _files(self) -> type[FileIO]:
        now = self._now

        class Files(FileIO):
            def read(self, size: int | None = -1, /) -> bytes:
                error = now("read")
                if error > 0:
                    raise OSError(error, os.strerror(error))
                return super().read(max(1, size // 2) if error == SHORT and size and size > 0 else size)

            def readall(self) -> bytes:
                if (error := now("readall")) > 0:
                    raise OSError(error, os.strerror(error))
                return super().readall()

        return Files


def peft_folder(folder: Path, seed: int) -> Path:
    generator = torch.Generator().manual_seed(seed)
    folder.mkdir(parents=True, exist_ok=True)
    factors = {"A": (8, 64), "B": (64, 8)}
    save_file(
        {f"{MODULE}.lora_{side}.weight": torch.randn(shape, generator=generator) for side, shape in factors.items()},
        folder / "adapter_model.safetensors",
    )
    settings = {"peft_type": "LORA", "r": 8, "lora_alpha": 16 + seed, "target_modules": ["q_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    return folder


def single_file(path: Path, seed: int) -> Path:
    generator = torch.Generator().manual_seed(seed)
    name = "lora_unet_middle_block_1_transformer_blocks_0_attn1_to_q"
    path.parent.mkdir(parents=True, exist_ok=True)
    factors = {"down": (4, 32), "up": (32, 4)}
    tensors = {f"{name}.lora_{side}.weight": torch.randn(shape, generator=generator) for side, shape in factors.items()}
    save_file(tensors, path, {"sshs_model_hash": "0" * 64})
    return path


# What is made of the inputs in a folder `in`, into a folder `out`, replacing what is there.
LINES: dict[str, list[str]] = {
    "resize": ["resize", "-r", "rank=2", "--force", "-o", "out", "in/a.safetensors"],
    "resize with a base": [
        "resize",
        "-r",
        "fro_ckpt=1,rank=2",
        "--base",
        "base",
        "--force",
        "-o",
        "out",
        "in/a.safetensors",
    ],
    "resize a PEFT folder": ["resize", "-r", "rank=2", "--force", "-o", "out", "in/p"],
    "resize with a journal": ["resize", "-r", "rank=2", "--skip-existing", "-o", "out", "in/a.safetensors"],
    "convert": ["convert", "-t", "bf16", "--force", "-o", "out", "in/a.safetensors"],
    "convert a PEFT folder": ["convert", "-t", "bf16", "--force", "-o", "out", "in/p"],
    "merge": ["merge", "in/a.safetensors:0.5", "in/b.safetensors", "--force", "-o", "out/m.safetensors"],
    "norms": ["norms", "base", "--force", "-o", "out/n.json"],
    "inspect --csv": ["inspect", "-q", "--csv", "out/t.csv", "--force", "in/a.safetensors"],
    "resize --csv": ["resize", "-q", "-r", "rank=2", "--csv", "out/t.csv", "--force", "-o", "out", "in/a.safetensors"],
}
if LONG:
    LINES["report"] = ["report", "--force", "-o", "out/r.html", "in/a.safetensors"]
    LINES["extract"] = ["extract", "-r", "rank=2", "--force", "-o", "out/x.safetensors", "tuned", "base"]


class Scratch:
    """A folder with inputs, and outputs of an earlier run."""

    def __init__(self, folder: Path, line: list[str]) -> None:
        self.folder, self.out = folder, folder / "out"
        single_file(folder / "in" / "a.safetensors", 0)
        single_file(folder / "in" / "b.safetensors", 1)
        peft_folder(folder / "in" / "p", 0)
        (folder / "base").symlink_to(BASE)
        if "tuned" in line:
            tensors = load_file(BASE)
            save_file({key: value + 0.01 for key, value in tensors.items()}, folder / "tuned")
        self.line = [
            str(folder / word) if word.partition("/")[0] in ("in", "out", "base", "tuned") else word for word in line
        ]

    def run(self) -> Any:
        return CliRunner().invoke(app, self.line)

    def outputs(self) -> dict[str, bytes]:
        files = [path for path in self.out.rglob("*") if path.is_file()] if self.out.exists() else []
        return {str(path.relative_to(self.out)): path.read_bytes() for path in files if "journal" not in path.name}

    def restore(self, files: dict[str, bytes]) -> None:
        shutil.rmtree(self.out, ignore_errors=True)
        for name, data in files.items():
            (self.out / name).parent.mkdir(parents=True, exist_ok=True)
            (self.out / name).write_bytes(data)

    def inputs(self) -> dict[str, bytes]:
        return {str(path): path.read_bytes() for path in (self.folder / "in").rglob("*") if path.is_file()}


def groups(files: dict[str, bytes]) -> dict[str, dict[str, bytes]]:
    """Files that belong together: those of a PEFT folder."""
    together: dict[str, dict[str, bytes]] = {}
    for name, data in files.items():
        together.setdefault(str(Path(name).parent) if "adapter_" in name else name, {})[name] = data
    return together


@pytest.mark.parametrize("kind", LINES)
@pytest.mark.parametrize("replaced", [True, False])
def test_any_call_of_the_system_may_fail_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, replaced: bool
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    scratch = Scratch(tmp_path, LINES[kind])
    first = scratch.run()
    assert first.exit_code == 0, first.output
    new, inputs = scratch.outputs(), scratch.inputs()
    old = {name: b"old " + name.encode() for name in new} if replaced and "--force" in LINES[kind] else {}
    with monkeypatch.context() as patch:
        faults = Faults(tmp_path, patch)
        scratch.restore(old)
        faults.plan(None)
        assert scratch.run().exit_code == 0
        counts = dict(faults.counts)
    assert sum(counts.values()) > 10
    number = 0
    for name, count in sorted(counts.items()):
        errors = (*ERRORS, SHORT) if name in (*BY_NUMBER, "read") else ERRORS
        for index in range(count):
            number += 1
            if not LONG and name in _MANY and number % 3:
                continue
            for error in errors if LONG else [errors[number % len(errors)]]:
                scratch.restore(old)
                with monkeypatch.context() as patch:
                    faults = Faults(tmp_path, patch)
                    faults.plan((name, index, error))
                    result = scratch.run()
                check(scratch, result, f"{name} {index} {error}", old, new, inputs)


def check(
    scratch: Scratch, result: Any, where: str, old: dict[str, bytes], new: dict[str, bytes], inputs: dict[str, bytes]
) -> None:
    """The state of the disk and the words after a run in which one call failed."""
    assert isinstance(result.exception, SystemExit | None), (where, repr(result.exception))
    present = scratch.outputs()
    assert not [name for name in present if name.endswith((".tmp", ".old"))], (where, list(present))
    before, after = groups(old), groups(new)
    for group, files in groups(present).items():
        if group.endswith(".csv") and result.exit_code:  # the table of a run that failed has no rows
            assert after[group][group].startswith(next(iter(files.values()))) or files == before.get(group), where
        else:
            assert files in (before.get(group), after.get(group)), (where, group, result.output)
    assert before.keys() <= groups(present).keys(), (where, list(present))
    if result.exit_code == 0:
        assert present == new, (where, result.output)
    else:
        assert result.exit_code in (1, 2), (where, result.exit_code)
        lines = result.stderr.strip().splitlines()
        assert lines, where
        assert lines[-1].startswith(("lorashrink: ", "Error: Invalid value")), (where, lines)
        assert "unexpected" not in result.stderr, (where, lines)
        assert "Traceback" not in result.stderr, (where, lines)
    assert scratch.inputs() == inputs, where


# --- whole runs ------------------------------------------------------------------------------------


def test_a_folder_that_vanishes_fails_its_files_with_a_message(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sources = [single_file(tmp_path / "in" / f"{name}.safetensors", seed) for seed, name in enumerate("abc")]
    real, calls = os.fsync, iter(range(1000))

    def vanishes(number: int) -> None:
        if next(calls) == 0:
            shutil.rmtree(tmp_path / "out")
        real(number)

    monkeypatch.setattr(os, "fsync", vanishes)
    report = resize(sources, recipes="rank=2", output=tmp_path / "out")
    assert len(report.failed) == 1
    assert "cannot be written (No such file or directory)" in report.failed[0].error
    assert len(list((tmp_path / "out").iterdir())) == 2


def test_two_processes_may_write_into_one_folder(tmp_path: Path) -> None:
    """The outputs are those of one run, and no temporary file remains."""
    for seed in range(12):
        single_file(tmp_path / "in" / f"{seed}.safetensors", seed)
    line = [sys.executable, "-m", "lorashrink.cli", "resize", "-r", "rank=2", "--force", "-o"]
    processes = [
        subprocess.Popen([*line, str(tmp_path / "out"), str(tmp_path / "in")], stderr=subprocess.PIPE) for _ in "ab"
    ]
    errors = [process.communicate(timeout=200)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], errors
    resize(tmp_path / "in", recipes="rank=2", output=tmp_path / "alone")
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == {
        path.name: path.read_bytes() for path in (tmp_path / "alone").iterdir()
    }


def test_leftovers_of_failed_deletions_are_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    number, temporary = disk.create_temporary(tmp_path / "x")
    os.close(number)
    real, calls = os.unlink, iter(range(1000))

    def fails_twice(path: Path) -> None:
        if next(calls) < 2:
            raise OSError(errno.EIO, "Input/output error")
        real(path)

    monkeypatch.setattr(os, "unlink", fails_twice)
    disk.discard(temporary)
    assert temporary.exists()
    disk.discard_unfinished()
    assert not temporary.exists()
