"""The files of the chosen folders: listed at once, their headers read in the background."""

from __future__ import annotations

import contextlib
import hashlib
import os
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from lorashrink.adapters import peft
from lorashrink.errors import InputError
from lorashrink.insight.inspection import inspect
from lorashrink.results.inspection import AdapterTable
from lorashrink.ui.facts import facts_of, is_norm_table
from lorashrink.ui.folders import Folders

_SUFFIXES = (".safetensors", ".gguf")
_MODEL_INDEX = "model_index.json"
_DROPPED = "dropped here"  # the folder that is shown for files that were dropped onto the page


@dataclass(frozen=True, slots=True)
class Saving:
    """How small an adapter could be."""

    bytes: int
    error: float  # relative, of ΔW


@dataclass(frozen=True, slots=True)
class Entry:
    """A file, PEFT folder or model folder. Facts are filled in when its header is read."""

    id: str
    path: Path
    folder: str  # below the chosen folder, with slashes; "" directly in it
    bytes: int
    modified: float  # seconds since 1970
    revision: int  # of the library when this entry changed last
    state: str = "listed"  # then "read" or "failed"
    kind: str = ""  # "adapter", "model", "norms", "statistics" or "other"
    family: str | None = None  # of models
    algo: str = ""
    dtype: str = ""
    layers: int = 0
    rank: str = ""  # `4`, or `4 to 8`
    highest_rank: int = 0
    title: str = ""
    trained_on: str = ""
    trigger: str = ""
    shrunk: bool = False  # whether lorashrink wrote it
    findings: tuple[str, ...] = ()  # what is unusual, as far as the header tells
    error: str = ""
    saving: Saving | None = None
    saving_error: str = ""  # why nobody knows how small it could be

    def row(self) -> dict[str, Any]:
        """The entry as JSON, without the folders above those that were chosen."""
        return {**asdict(self), "path": None, "name": self.path.name}


class Library:
    """All entries by their ids. Safe to use from several threads."""

    def __init__(self, folders: Folders) -> None:
        self.folders = folders
        self.outside = 0  # links that lead out of the folders, which are left out
        self._entries: dict[str, Entry] = {}
        self._removed: dict[str, int] = {}  # id -> revision
        self._revision = 0
        self._lock = threading.RLock()
        self._scanning = threading.Lock()
        self._waiting: deque[str] = deque()  # ids whose headers are to be read; some may be there twice
        self._unread = threading.Event()
        self._stopped = threading.Event()

    # --- what the page asks -----------------------------------------------------------------------

    def get(self, identity: str) -> Entry:
        """The entry of this id. Raises InputError if there is none, or its path now leads out of the folders."""
        with self._lock:
            entry = self._entries.get(identity)
        if entry is None:
            raise InputError("this file is not in the list. It was moved or deleted; read the folder again.")
        self.folders.check(entry.path)
        return entry

    def entries(self) -> list[Entry]:
        """All entries, by their names."""
        with self._lock:
            return sorted(self._entries.values(), key=lambda entry: (entry.folder, entry.path.name.lower()))

    def changes(self, since: int) -> dict[str, Any]:
        """What changed after a revision; everything for 0."""
        with self._lock:
            entries = list(self._entries.values())
            return {
                "revision": self._revision,
                "rows": [entry.row() for entry in entries if entry.revision > since],
                "removed": [identity for identity, revision in self._removed.items() if revision > since],
                "unread": sum(entry.state == "listed" for entry in entries),
                "outside": self.outside,
            }

    def table(self, identity: str) -> AdapterTable:
        """What the header of an adapter tells. Raises InputError."""
        inspection = inspect(self.get(identity).path, header=True)
        for failure in inspection.failed:
            raise InputError(failure.error)
        return inspection.files[0]

    def update(self, identity: str, **changes: Any) -> None:
        """Change facts of an entry, if it is still there."""
        with self._lock:
            if identity in self._entries:
                self._revision += 1
                self._entries[identity] = replace(self._entries[identity], **changes, revision=self._revision)

    # --- reading the disk -------------------------------------------------------------------------

    def scan(self) -> None:
        """List the folders; entries that are new or have changed are read in the background."""
        with self._scanning:
            lists = [self._list(root) for root in (*self.folders.roots, self.folders.dropped)]
            listed = {entry.id: entry for entries, _ in lists for entry in entries}
            with self._lock:
                self.outside = sum(outside for _, outside in lists)
                self._revision += 1
                for identity in self._entries.keys() - listed.keys():
                    del self._entries[identity]
                    self._removed[identity] = self._revision
                for identity, entry in listed.items():
                    before = self._entries.get(identity)
                    if before is None or (before.bytes, before.modified) != (entry.bytes, entry.modified):
                        self._entries[identity] = replace(entry, revision=self._revision)
                        self._removed.pop(identity, None)
                        self._waiting.append(identity)
        self._unread.set()

    def read_first(self, identities: Sequence[str]) -> None:
        """Read the headers of these entries before all others."""
        with self._lock:
            self._waiting.extendleft(reversed(identities))
        self._unread.set()

    def read_headers(self) -> None:
        """List the folders, and read headers whenever there are unread ones, until `stop`, in a thread of its own."""
        self.scan()
        while self._unread.wait() and not self._stopped.is_set():
            self._unread.clear()
            while self._waiting and not self._stopped.is_set():
                with self._lock:
                    entry = self._entries.get(self._waiting.popleft())
                if entry and entry.state == "listed":
                    self.update(entry.id, **facts_of(entry.path))

    def stop(self) -> None:
        """End `read_headers`."""
        self._stopped.set()
        self._unread.set()

    def _list(self, root: Path) -> tuple[list[Entry], int]:
        """The entries of a folder and of those below it, and the number of links that lead out of all folders."""
        entries: list[Entry] = []
        outside = 0
        folders = [root]
        while folders:
            folder = folders.pop()
            with contextlib.suppress(OSError):  # a folder that may not be read has no entries
                items = [item for item in os.scandir(folder) if not item.name.startswith(".")]
                names = {item.name for item in items}
                if _MODEL_INDEX in names or (peft.CONFIG_FILE in names and names & {*peft.WEIGHTS_FILES}):
                    if self.folders.holds(folder):
                        entries += self._entry(folder, root)
                    else:
                        outside += 1
                    continue
                for item in items:
                    path = Path(item.path)
                    if item.is_symlink() and self.folders.root_of(path) is None:
                        outside += 1
                    elif item.is_dir(follow_symlinks=False):
                        folders.append(path)
                    elif path.suffix in _SUFFIXES or (path.suffix == ".json" and is_norm_table(path)):
                        entries += self._entry(path, root)
        return entries, outside

    def _entry(self, path: Path, root: Path) -> Iterator[Entry]:
        with contextlib.suppress(OSError):
            stat = path.stat()
            size = stat.st_size if path.is_file() else sum(part.stat().st_size for part in path.rglob("*.safetensors"))
            folder = "" if path in (root, root / path.name) else path.parent.relative_to(root).as_posix()
            if root == self.folders.dropped:
                folder = _DROPPED
            yield Entry(identity_of(path), path, folder, size, stat.st_mtime, 0)


def identity_of(path: Path) -> str:
    """The id of the entry of this path."""
    return hashlib.blake2b(os.fsencode(path), digest_size=12).hexdigest()
