"""Tables in a real terminal of several widths."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import lorashrink_example
from lorashrink.cli.tables import TextTable

pty = pytest.importorskip("pty", reason="pseudo-terminals are a part of Unix")

ADAPTER = lorashrink_example.path("adapter.safetensors")
NAME = "my favourite style of the year, version 3 final"


def in_terminal(columns: int, *words: object) -> list[str]:
    """The lines that a command prints on a terminal of so many columns."""
    import fcntl
    import struct
    import termios

    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 50, columns, 0, 0))
    environment = {key: value for key, value in os.environ.items() if key not in ("COLUMNS", "LINES", "NO_COLOR")}
    with subprocess.Popen(
        [sys.executable, "-m", "lorashrink", *map(str, words)],
        stdout=theirs,
        stderr=subprocess.DEVNULL,
        env={**environment, "TERM": "xterm"},
    ) as process:
        os.close(theirs)
        text = b""
        while True:
            try:
                piece = os.read(ours, 65536)
            except OSError:  # Linux says so that the other end is closed
                break
            if not piece:
                break
            text += piece
    os.close(ours)
    assert process.returncode == 0
    return re.sub(r"\x1b\[[\d;]*[A-Za-z]", "", text.decode()).replace("\r", "").split("\n")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("styles")
    shutil.copy(ADAPTER, path / f"{NAME}.safetensors")
    return path


@pytest.mark.parametrize("columns", [60, 80, 120])
def test_sizes_and_errors_of_resize_are_never_cut(folder: Path, columns: int) -> None:
    words = ("resize", "-r", "rank=2", "--dry-run", "-o", folder / "out", folder / f"{NAME}.safetensors")
    lines = in_terminal(columns, *words)
    table = [line for line in lines if not line.startswith((NAME, "would", "loads", "1 file"))]
    assert max(map(len, table)) <= columns
    head = next(number for number, line in enumerate(lines) if re.match(r" file +(recipe|before) ", line))
    row = lines[head + 2]
    end = lines[head].index("recipe") if columns == 120 else row.index("908.0")
    assert re.search(r" 908\.0 kB +224\.1 kB +75\.3% +29\.77%", row)
    names = "".join(line[:end] for line in lines[head + 2 : head + 8] if not line.startswith("("))
    assert f"{NAME}_rank2.safetensors".replace(" ", "") in names.replace(" ", "")
    hidden = [line for line in lines if "-v shows more columns" in line]
    assert len(hidden) == 1
    assert ("91.14%" in row) == (columns == 120)  # the energy


def test_the_table_of_shrink_fits_eighty_columns(folder: Path, tmp_path: Path) -> None:
    lines = in_terminal(80, "shrink", "-o", tmp_path, folder)
    head = next(number for number, line in enumerate(lines) if re.match(r" file +before ", line))
    assert max(map(len, lines[head : head + 4])) <= 80
    assert re.search(r" 908\.0 kB +\d+\.\d kB +\d+% +error \d+\.\d+%", lines[head + 2])


def test_verbose_shows_all_columns(folder: Path) -> None:
    words = ("resize", "-v", "-r", "rank=2", "--dry-run", "-o", folder / "out", folder / f"{NAME}.safetensors")
    text = in_terminal(160, *words)
    head = next(line for line in text if re.match(r" file +recipe ", line))
    assert re.findall(r"\w+…?", head)[:6] == ["file", "recipe", "before", "after", "saved", "error"]
    assert len(head.split()) == 11
    assert not [line for line in text if "-v shows" in line]


def test_a_column_without_numbers_is_left_out() -> None:
    columns = {"layer": ["a", "b"], "fro": ["1.0", "2.0"], "fro/base": ["-", "-"], "flags": ["", "zero"]}
    table = TextTable(columns, extra=("fro/base", "flags"))
    assert table.shown(100) == ["layer", "fro", "flags"]
    table.everything = True
    assert table.shown(10) == ["layer", "fro", "fro/base", "flags"]


@pytest.mark.parametrize("columns", [60, 80, 120])
def test_ranks_and_norms_of_inspect_are_never_cut(folder: Path, columns: int) -> None:
    lines = in_terminal(columns, "inspect", folder / f"{NAME}.safetensors")
    head = next(number for number, line in enumerate(lines) if line.startswith(" layer "))
    assert {"rank", "alpha", "fro"} <= set(lines[head].split())
    row = lines[head + 2]
    assert len(row) <= columns
    assert "…" not in row
