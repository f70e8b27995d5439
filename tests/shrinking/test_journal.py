"""The journal: which entries it trusts, and how it survives damage."""

from __future__ import annotations

import logging
import os
import sqlite3
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorashrink.shrinking import journal
from lorashrink.shrinking.journal import DONE, FAILED, NAME, STARTED, Entry, Journal, Stamp, stamps

FACTS: dict[str, Any] = {
    "source_sha256": "ab" * 32,
    "recipe": "rank=2",
    "base": "",
    "options": "dtype=same",
    "version": "1",
    "depends_on_base": True,
    "bytes_before": 10,
    "threshold": None,
    "relative_error": 0.25,
    "seconds": 1.5,
}


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    """(a source, its output), both old enough to be trusted."""
    monkeypatch.setattr(journal, "SETTLED_SECONDS", 0.0)
    source, output = tmp_path / "source.safetensors", tmp_path / "out" / "small.safetensors"
    output.parent.mkdir()
    source.write_bytes(b"0123456789")
    output.write_bytes(b"01234")
    return source, output


def note(opened: Journal, source: Path, output: Path, state: str = DONE, **facts: Any) -> Entry:
    entry = opened.entry(output, source, state=state, stamps=stamps([source]), **FACTS | facts)
    opened.write([entry])
    return entry


def test_entries_are_read_by_the_next_process(files: tuple[Path, Path]) -> None:
    source, output = files
    with Journal(output.parent) as opened:
        entry = note(opened, source, output)
    assert (entry.output, entry.bytes_after) == ("small.safetensors", 5)
    with Journal(output.parent) as opened:
        assert opened.finished(output, source) == entry
        assert opened.entries() == [entry]
        assert opened.finished(output, source.with_name("other.safetensors")) is None
        assert opened.finished(output.with_name("other.safetensors"), source) is None


def rewritten(path: Path) -> None:
    """Another file of the same name, size and time."""
    stat = path.stat()
    replacement = path.with_suffix(".new")
    replacement.write_bytes(bytes(len(path.read_bytes())))
    os.utime(replacement, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    replacement.replace(path)


CHANGES = {
    "the source is longer": lambda source, output: source.write_bytes(b"0123456789a"),
    "the source is newer": lambda source, output: os.utime(source, (1, 1)),
    "the source is another file of the same time": lambda source, output: rewritten(source),
    "the source is gone": lambda source, output: source.unlink(),
    "the output is gone": lambda source, output: output.unlink(),
    "the output is shorter": lambda source, output: output.write_bytes(b"012"),
    "the output is newer": lambda source, output: os.utime(output, (1, 1)),
}


@pytest.mark.parametrize("change", CHANGES)
def test_files_win_over_the_journal(files: tuple[Path, Path], change: str) -> None:
    source, output = files
    with Journal(output.parent) as opened:
        note(opened, source, output)
        CHANGES[change](source, output)
        assert opened.finished(output, source) is None


@pytest.mark.parametrize("state", [STARTED, FAILED])
def test_started_and_failed_entries_are_not_finished(files: tuple[Path, Path], state: str) -> None:
    source, output = files
    with Journal(output.parent) as opened:
        note(opened, source, output)
        opened.write([opened.entry(output, source, state=state, message="why")])
        assert opened.finished(output, source) is None
        assert [(entry.state, entry.message) for entry in opened.entries()] == [(state, "why")]


def test_a_source_changed_just_now_is_not_trusted(files: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """The source could change again within the resolution of its time stamp."""
    source, output = files
    monkeypatch.undo()
    assert stamps([source]) == ()
    with Journal(output.parent) as opened:
        note(opened, source, output)
        assert opened.finished(output, source) is None


@pytest.mark.skipif(sys.platform != "linux", reason="only there a name can be any bytes")
def test_names_need_not_be_unicode(files: tuple[Path, Path]) -> None:
    source, output = (path.rename(path.with_name(os.fsdecode(b"\xff.safetensors"))) for path in files)
    with Journal(output.parent) as opened:
        note(opened, source, output)
        assert opened.finished(output, source)
        opened.write([opened.entry(output, source, state=FAILED, message=str(source))])
        assert opened.entries()[0].message.endswith("udcff.safetensors")


def test_a_journal_moves_with_its_folder(files: tuple[Path, Path]) -> None:
    source, output = files
    with Journal(output.parent) as opened:
        note(opened, source, output)
    moved = output.parent.rename(output.parent.with_name("moved"))
    with Journal(moved) as opened:
        assert opened.finished(moved / output.name, source)


@given(
    st.builds(
        Entry,
        output=st.text(max_size=5),
        source=st.text(max_size=5),
        state=st.sampled_from([STARTED, DONE, FAILED]),
        message=st.text(max_size=20),
        stamps=st.lists(
            st.builds(Stamp, st.text(max_size=5), *[st.integers(0, 2**63 - 1) for _ in range(4)]), max_size=3
        ).map(tuple),
        depends_on_base=st.booleans(),
        threshold=st.none() | st.floats(allow_nan=False),
        relative_error=st.floats(0, 1),
    )
)
def test_every_entry_comes_back_as_it_was(entry: Entry) -> None:
    row = entry.to_row()
    with sqlite3.connect(":memory:") as database:
        marks = ", ".join(f"? AS c{number}" for number in range(len(row)))
        assert Entry.from_row(database.execute(f"SELECT {marks}", row).fetchone()) == entry
    database.close()


# --- damaged journals -----------------------------------------------------------------------------


@pytest.mark.parametrize("content", [b"not a database, but long enough to be read as one" * 100, b"\0" * 4096])
def test_a_damaged_journal_is_made_anew(files: tuple[Path, Path], content: bytes) -> None:
    source, output = files
    (output.parent / NAME).write_bytes(content)
    with Journal(output.parent) as opened:
        note(opened, source, output)
        assert opened.finished(output, source)


def test_a_journal_of_another_version_is_made_anew(files: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    source, output = files
    with Journal(output.parent) as opened:
        note(opened, source, output)
    monkeypatch.setattr(journal, "_VERSION", 3)
    with Journal(output.parent) as opened:
        assert opened.entries() == []
        note(opened, source, output)
        assert opened.finished(output, source)


def test_a_journal_that_cannot_be_written_is_a_warning(
    files: tuple[Path, Path], caplog: pytest.LogCaptureFixture
) -> None:
    source, output = files
    (output.parent / NAME).mkdir()
    with caplog.at_level(logging.WARNING), Journal(output.parent) as opened:
        note(opened, source, output)
        assert opened.finished(output, source) is None
        assert opened.entries() == []
    assert "the run goes on without it" in caplog.text


def test_a_journal_that_breaks_in_the_middle_is_a_warning(
    files: tuple[Path, Path], caplog: pytest.LogCaptureFixture
) -> None:
    source, output = files
    with caplog.at_level(logging.WARNING), Journal(output.parent) as opened:
        with sqlite3.connect(output.parent / NAME) as rival:
            rival.execute("DROP TABLE outputs")
        rival.close()
        note(opened, source, output)
        assert opened.finished(output, source) is None
    assert caplog.text.count("the run goes on without it") == 1


def test_threads_and_other_processes_write_into_one_journal(files: tuple[Path, Path]) -> None:
    source, output = files
    code = (
        "import sys; from pathlib import Path; from lorashrink.shrinking.journal import Journal, STARTED\n"
        "with Journal(Path(sys.argv[1])) as known:\n"
        "    for number in range(20):\n"
        "        known.write([known.entry(known.folder / f'{sys.argv[2]}{number}', Path('a'), state=STARTED)])"
    )
    command = [sys.executable, "-W", "error", "-c", code, str(output.parent)]
    others = [subprocess.Popen([*command, name]) for name in "ab"]
    with Journal(output.parent) as opened:

        def write(name: str) -> None:
            for number in range(20):
                opened.write([opened.entry(output.with_name(f"{name}{number}"), source, state=STARTED)])

        threads = [threading.Thread(target=write, args=name) for name in "cd"]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert [process.wait() for process in others] == [0, 0]
        assert len(opened.entries()) == 80


@pytest.mark.parametrize(
    "cells", ["stamps='{'", "stamps='[[1]]'", "stamps=NULL", "stamps=5", "threshold='high'", "relative_error=x'00'"]
)
def test_a_damaged_cell_sets_the_journal_aside_and_the_run_goes_on(
    files: tuple[Path, Path], cells: str, caplog: pytest.LogCaptureFixture
) -> None:
    source, output = files
    with Journal(output.parent) as opened:
        note(opened, source, output)
    database = sqlite3.connect(output.parent / NAME)
    database.execute(f"UPDATE outputs SET {cells}")
    database.commit()
    database.close()
    with caplog.at_level(logging.WARNING), Journal(output.parent) as opened:
        assert opened.finished(output, source) is None
        entry = note(opened, source, output)
        assert opened.finished(output, source) == entry
    assert "is damaged" in caplog.text
    assert (output.parent / f"{NAME}.damaged").exists()


def test_a_database_damaged_in_the_middle_is_set_aside(files: tuple[Path, Path]) -> None:
    """Its first page is in order, so that it opens."""
    source, output = files
    with Journal(output.parent) as opened:
        note(opened, source, output)
        opened.write([opened.entry(output.with_name(f"{n}"), source, state=STARTED) for n in range(500)])
    path = output.parent / NAME
    data = path.read_bytes()
    path.write_bytes(data[:4096] + b"\xff" * (len(data) - 4096))
    with Journal(output.parent) as opened:
        assert opened.finished(output, source) is None
        entry = note(opened, source, output)
        assert opened.entries() == [entry]


@pytest.mark.parametrize("column", [b"depends_on_bas\x8a", b"depends_on_bose"], ids=["no text", "another name"])
def test_a_journal_whose_table_is_damaged_is_begun_anew(tmp_path: Path, column: bytes) -> None:
    with Journal(tmp_path) as journal:
        journal.write([journal.entry(tmp_path / "a", tmp_path / "b", state=STARTED)])
    file = tmp_path / NAME
    file.write_bytes(file.read_bytes().replace(b"depends_on_base", column))
    with Journal(tmp_path) as journal:
        assert not journal.entries()
        journal.write([journal.entry(tmp_path / "c", tmp_path / "d", state=STARTED)])
        assert [entry.output for entry in journal.entries()] == ["c"]
    assert (tmp_path / f"{NAME}.damaged").exists()
