"""The facts that a report page states."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from lorashrink.bases.views import BaseInfo
from lorashrink.results.inspection import AdapterTable
from lorashrink.results.shrinking import FileResult
from lorashrink.results.sweep import Pictures, Sweep


@dataclass(frozen=True, slots=True)
class Findings:
    """What a page is made of."""

    table: AdapterTable  # with singular values
    base: BaseInfo | None
    sweep: Sweep | None
    unswept: str  # why there is no sweep, else ""
    shrunk: FileResult | None  # what one recipe of the sweep would do to each layer
    hashes: Mapping[str, str]  # file -> what identifies its contents
    commands: Mapping[str, str]  # purpose -> command line

    @property
    def title(self) -> str:
        """The adapter's name."""
        return Path(self.table.path).name

    def without_folders(self) -> Findings:
        """The same with names of files in place of paths, which tell strangers about the machine."""
        table = replace(
            self.table,
            path=_name(self.table.path),
            metadata={key: _without_path(text) for key, text in self.table.metadata.items()},
            notes={label: _without_path(text) for label, text in self.table.notes.items()},
        )
        return replace(
            self,
            table=table,
            base=self.base and replace(self.base, path=_name(self.base.path)),
            sweep=self.sweep and _sweep_without_folders(self.sweep),
            unswept=self.unswept.replace(self.table.path, table.path),
            shrunk=self.shrunk
            and replace(self.shrunk, source=_name(self.shrunk.source), output=_name(self.shrunk.output)),
            hashes={_name(path): digest for path, digest in self.hashes.items()},
        )


def _sweep_without_folders(sweep: Sweep) -> Sweep:
    def named(pictures: Pictures | None) -> Pictures | None:
        return pictures and replace(pictures, files=tuple(map(_name, pictures.files)))

    read = sweep.read and replace(sweep.read, model=_name(sweep.read.model), file=_name(sweep.read.file))
    drawn = sweep.drawn
    if drawn:
        drawn = replace(
            drawn,
            model=_name(drawn.model),
            files=tuple(map(_name, drawn.files)),
            none=replace(drawn.none, files=tuple(map(_name, drawn.none.files))),
            floor=named(drawn.floor),
        )
    return replace(
        sweep,
        source=_name(sweep.source),
        read=read,
        points=tuple(replace(point, pictures=named(point.pictures)) for point in sweep.points),
        drawn=drawn,
    )


def _name(path: str) -> str:
    return Path(path).name or path


# What begins as the paths of any system do, without a line break.
_PATH = re.compile(r"(?:[A-Za-z]:)?[\\/~].*")


def _without_path(text: str) -> str:
    return re.split(r"[\\/]", text)[-1] if _PATH.fullmatch(text) else text
