"""Reading and writing as on Windows, which has no positioned reads and writes and no flock."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

import lorashrink
from lorashrink.files.memory import SLABS


@pytest.mark.parametrize("in_memory", [True, False])
def test_outputs_are_the_same_without_positioned_io(
    adapter: Path, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, in_memory: bool
) -> None:
    if not in_memory:  # as for files of more than 64 MiB
        monkeypatch.setattr(SLABS, "take", lambda nbytes: None)
    outputs = []
    for folder in ("posix", "windows"):
        report = lorashrink.resize(
            adapter, base=base, recipes=["fro_ckpt=1,thr=-3", "rank=2"], output=tmp_path / folder
        )
        assert not report.failed
        outputs.append([Path(result.output).read_bytes() for result in report.results if result.output])
        for name in ("pwrite", "preadv"):
            monkeypatch.delattr(os, name, raising=False)
        monkeypatch.setitem(sys.modules, "fcntl", None)
    assert len(outputs[0]) == 2
    assert outputs[0] == outputs[1]
