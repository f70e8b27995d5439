"""The folders that the page may see, and nothing outside of them."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lorashrink.errors import InputError, UsageError


@dataclass(frozen=True, slots=True)
class Folders:
    """Folders with all links resolved."""

    roots: tuple[Path, ...]
    dropped: Path  # where files are kept that were dropped onto the page

    def root_of(self, path: Path) -> Path | None:
        """The folder that a path lies in once its links are resolved; None if that is none of them."""
        real = Path(os.path.realpath(path))
        return next((root for root in (*self.roots, self.dropped) if real == root or root in real.parents), None)

    def holds(self, path: Path) -> bool:
        """Whether a path, and of a folder everything below it, lies in the folders once links are resolved."""
        below = (os.path.join(parent, name) for parent, *names in os.walk(path) for name in (*names[0], *names[1]))
        links = (Path(inner) for inner in below if os.path.islink(inner))
        return self.root_of(path) is not None and all(self.root_of(link) is not None for link in links)

    def check(self, path: Path) -> Path:
        """The path itself. Raises InputError if it leads outside the folders, for example through a link."""
        if not self.holds(path):
            raise InputError(f"{path}: lies outside the folders of this page. Start lorashrink ui with its folder too.")
        return path


def open_roots(paths: Sequence[str | Path]) -> tuple[Path, ...]:
    """The folders of these names, links resolved. Raises UsageError if one does not exist or may not be read."""
    roots: dict[Path, None] = {}
    for path in map(Path, paths):
        if not os.path.isdir(path):
            kind = "is a file" if os.path.exists(path) else "does not exist"
            raise UsageError(f"{path}: {kind}; name the folder that your LoRAs are in.")
        try:
            os.listdir(path)
        except OSError as error:
            raise UsageError(f"{path}: cannot be read ({error.strerror or error}).") from error
        roots[Path(os.path.realpath(path))] = None
    return tuple(roots)
