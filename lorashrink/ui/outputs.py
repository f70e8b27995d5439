"""What the page writes: beside the inputs in a folder `shrunk`, never over a file, and only that can be undone."""

from __future__ import annotations

import contextlib
import itertools
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from lorashrink.adapters import peft
from lorashrink.ui.folders import Folders

FOLDER = "shrunk"


def free_output(source: Path, folders: Folders) -> Path:
    """A name that nothing has yet, in the folder `shrunk` of the chosen one, with the tree and the name of the input.

    Of a PEFT folder it is the folder. What is made of a dropped file goes to the first chosen folder.
    """
    root = folders.root_of(source)
    if root is None or root == folders.dropped:
        root = folders.roots[0]
    relative = source.relative_to(root) if root in source.parents else Path(source.name)
    target = root / FOLDER / Path(*(part for part in relative.parts if part != FOLDER))
    folder = peft.is_folder(source)
    stem, suffix = (target.name, "") if folder else (target.stem, target.suffix)
    names = itertools.chain([target.name], (f"{stem}-{number}{suffix}" for number in itertools.count(2)))
    return next(path for name in names if not os.path.lexists(path := target.with_name(name)))


@dataclass
class Written:
    """Files that a job wrote, as they were then."""

    files: list[tuple[Path, tuple[int, int]]] = field(default_factory=list)
    folders: list[Path] = field(default_factory=list)

    def expect(self, output: Path) -> None:
        """Note which folders do not exist before an output is written."""
        missing = itertools.takewhile(lambda folder: not folder.exists(), [output.parent, *output.parent.parents])
        self.folders += [folder for folder in missing if folder not in self.folders]

    def add(self, files: Sequence[Path]) -> None:
        """Note files that were written."""
        self.files += [(path, _identity(path)) for path in files]

    def delete(self) -> int:
        """Delete the files, except those that somebody changed since, and folders that are empty then."""
        deleted = 0
        for path, identity in self.files:
            with contextlib.suppress(OSError):
                if _identity(path) == identity:
                    path.unlink()
                    deleted += 1
        for folder in sorted(self.folders, key=lambda folder: -len(folder.parts)):
            with contextlib.suppress(OSError):
                folder.rmdir()
        return deleted


def _identity(path: Path) -> tuple[int, int]:
    stat = path.stat()
    return stat.st_size, stat.st_mtime_ns
