"""The journal of an output folder: a database of finished and failed outputs, which saves a rerun reading sources.

The metadata of an output says what it was made from, and is right if the two differ. Without the journal a rerun takes
longer and does the same, so errors of the journal never stop a run: one that is damaged is set aside and begun anew.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import sqlite3
import threading
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple

log = logging.getLogger(__name__)

NAME = ".lorashrink-journal.sqlite3"

STARTED, DONE, FAILED = "started", "done", "failed"

_VERSION = 2  # of the table

_PATIENCE = 10.0  # s, while another run writes into the same journal

# Until then a file can change once more without another time stamp, which on some disks has steps of two seconds.
SETTLED_SECONDS = 2.0


# What a damaged file makes SQLite or the reading of a cell raise; text that is no Unicode is a ValueError.
_DAMAGE = (sqlite3.Error, ValueError, TypeError, RecursionError)


class Stamp(NamedTuple):
    """Size, times and inode of a file; while these are equal the file need not be read again."""

    path: str
    bytes: int
    mtime_ns: int
    ctime_ns: int
    inode: int


@dataclass(frozen=True, slots=True)
class Entry:
    """One output."""

    output: str  # relative to the journal's folder
    source: str
    state: str  # STARTED, DONE or FAILED
    message: str = ""  # why it failed
    # what the output was made from, if it is done
    stamps: tuple[Stamp, ...] = ()  # of the source's files; () if they may still have been changing
    source_sha256: str = ""
    recipe: str = ""
    base: str = ""  # fingerprint
    options: str = ""
    version: str = ""
    depends_on_base: bool = False  # whatever the recipe
    bytes_before: int = 0
    bytes_after: int = 0
    output_mtime_ns: int = 0
    threshold: float | None = None
    relative_error: float = 0.0
    distortion: float | None = None
    dtype: str = ""
    seconds: float = 0.0

    def to_row(self) -> tuple[Any, ...]:
        """Its values as SQLite stores them, in the order of the fields."""
        return tuple({**asdict(self), "stamps": json.dumps(self.stamps)}.values())

    @classmethod
    def from_row(cls, row: Sequence[Any]) -> Entry:
        """The entry of a stored row. Raises ValueError or TypeError if a cell holds something else."""
        values = dict(zip(_COLUMNS, row, strict=True))
        for field in fields(cls):
            if not isinstance(values[field.name], _STORED[str(field.type)]):
                raise TypeError(f"{field.name} is {values[field.name]!r}")
        read = tuple(Stamp(*numbers) for numbers in json.loads(values["stamps"]))
        return cls(**{**values, "stamps": read, "depends_on_base": bool(values["depends_on_base"])})


_COLUMNS = tuple(field.name for field in fields(Entry))

# Type of a field -> what SQLite gives back of it.
_STORED: dict[str, type | tuple[type, ...]] = {
    "str": str,
    "int": int,
    "bool": int,
    "float": (float, int),
    "float | None": (float, int, type(None)),
    "tuple[Stamp, ...]": str,
}


def stamps(paths: Iterable[Path]) -> tuple[Stamp, ...]:
    """The stamps of files as they are now, () if one of them is missing or was changed just now."""
    result = []
    for path in map(os.path.abspath, paths):
        try:
            stat = os.stat(path)
        except OSError:
            return ()
        if time.time() - max(stat.st_mtime, stat.st_ctime) < SETTLED_SECONDS:
            return ()
        result.append(Stamp(path, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino))
    return tuple(result)


class Journal:
    """The journal of a folder; safe to use from many threads, and by several runs at once."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._lock = threading.Lock()
        self._database: sqlite3.Connection | None = None
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._database = _open(folder / NAME)
        except (OSError, *_DAMAGE) as error:
            self._give_up(error)

    def finished(self, output: Path, source: Path) -> Entry | None:
        """The entry of an output that was made from this source, if neither file has changed since.

        Reads neither of them.
        """
        entry = next(iter(self._select("WHERE output = ?", self._key(output))), None)
        if entry is None or entry.state != DONE or entry.source != _source(source) or not entry.stamps:
            return None
        try:
            stat = os.stat(output)
        except OSError:
            return None
        same = (stat.st_size, stat.st_mtime_ns) == (entry.bytes_after, entry.output_mtime_ns)
        return entry if same and entry.stamps == stamps(Path(stamp.path) for stamp in entry.stamps) else None

    def entry(self, output: Path, source: Path, **facts: Any) -> Entry:
        """An entry of this journal; `facts` are its other fields. Of outputs that are DONE the file is looked at."""
        if facts["state"] == DONE:
            with contextlib.suppress(OSError):  # moved on already, as watch folders do: an entry that fits no file
                stat = os.stat(output)
                facts |= {"bytes_after": stat.st_size, "output_mtime_ns": stat.st_mtime_ns}
        facts["message"] = _text(facts.get("message", ""))
        return Entry(self._key(output), _source(source), **facts)

    def write(self, entries: Sequence[Entry]) -> None:
        """Put entries in place of earlier ones for the same outputs."""
        rows = [entry.to_row() for entry in entries]
        values = ", ".join("?" * len(_COLUMNS))
        with self._lock:
            for _ in range(2):  # again, if it turns out to be damaged
                if self._database is None:
                    return
                try:
                    with self._database:
                        self._database.executemany(f"INSERT OR REPLACE INTO outputs VALUES ({values})", rows)
                    return
                except _DAMAGE as error:
                    self._mend(error)

    def entries(self) -> list[Entry]:
        """All entries, by output."""
        return self._select("ORDER BY output")

    def close(self) -> None:
        """Close the file."""
        if self._database is not None:
            self._database.close()
            self._database = None

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _select(self, which: str, *values: str) -> list[Entry]:
        with self._lock:
            if self._database is None:
                return []
            try:
                rows = self._database.execute(f"SELECT {', '.join(_COLUMNS)} FROM outputs {which}", values)
                return [Entry.from_row(row) for row in rows]
            except _DAMAGE as error:
                self._mend(error)
                return []

    def _key(self, output: Path) -> str:
        return _text(Path(os.path.relpath(output, self.folder)).as_posix())

    def _mend(self, error: Exception) -> None:
        """Begin anew if the journal is damaged; give up if it is in order, but cannot be had."""
        if isinstance(error, sqlite3.OperationalError):
            self._give_up(error)
            return
        self.close()
        try:
            _set_aside(self.folder / NAME, error)
            self._database = _open(self.folder / NAME)
        except (OSError, *_DAMAGE) as failure:
            self._give_up(failure)

    def _give_up(self, error: Exception) -> None:
        log.warning("%s: cannot be used (%s); the run goes on without it", self.folder / NAME, error)
        self.close()


def _source(path: Path) -> str:
    return _text(os.path.abspath(path))


def _text(text: str) -> str:
    """As SQLite can hold it: not every name of a file is Unicode."""
    return text.encode(errors="backslashreplace").decode()


def _open(path: Path) -> sqlite3.Connection:
    """The database, made anew if it is damaged or another version's."""
    try:
        return _with_table(path)
    except sqlite3.OperationalError:  # it may be in order, but cannot be had: locked, read-only, a full disk
        raise
    except _DAMAGE as error:
        _set_aside(path, error)
        return _with_table(path)


def _set_aside(path: Path, error: Exception) -> None:
    """Give a damaged journal another name. Raises OSError."""
    aside = path.with_name(f"{NAME}.damaged")
    log.warning("%s: is damaged (%s); it is now %s, and a new one is begun", path, error, aside.name)
    os.replace(path, aside)
    path.with_name(f"{NAME}-journal").unlink(missing_ok=True)  # SQLite would roll it back into the new one


def _with_table(path: Path) -> sqlite3.Connection:
    database = sqlite3.connect(path, timeout=_PATIENCE, check_same_thread=False)
    try:
        # Not a write-ahead log, because that needs memory which hosts on a network share do not have in common.
        database.execute("PRAGMA journal_mode=DELETE")
        database.execute("PRAGMA synchronous=NORMAL")
        (version,) = database.execute("PRAGMA user_version").fetchone()
        with database:
            if version != _VERSION:
                database.execute("DROP TABLE IF EXISTS outputs")
                database.execute(f"PRAGMA user_version={_VERSION}")
            names = ", ".join(_COLUMNS[1:])
            database.execute(f"CREATE TABLE IF NOT EXISTS outputs (output TEXT PRIMARY KEY, {names}) WITHOUT ROWID")
        database.text_factory = bytes  # a damaged name may be no text
        columns = [name for _, name, *_ in database.execute("PRAGMA table_info(outputs)")]
        database.text_factory = str
        if columns != [name.encode() for name in _COLUMNS]:
            raise ValueError("its table has other columns")
    except BaseException:
        with contextlib.suppress(sqlite3.Error):
            database.close()
        raise
    return database
