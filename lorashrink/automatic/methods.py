"""The best method at hand for an adapter: a calibration table, else the base, else the adapter alone."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, suppress
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

from lorashrink.adapters import Adapter, Source, open_adapter
from lorashrink.automatic.method import Method
from lorashrink.bases import Base, open_base, use_base
from lorashrink.calibration.statistics import FORMAT, Statistics, open_statistics
from lorashrink.errors import InputError, UsageError
from lorashrink.files.disk import user_cache
from lorashrink.files.header import read_header
from lorashrink.linking.matching import match
from lorashrink.pictures.pipelines import KINDS

if TYPE_CHECKING:
    from torch import Tensor

# A file that is larger is no table, and its header need not be read.
_LARGEST_TABLE = 1 << 30

_CALIBRATE = "lorashrink calibrate MODEL"

# Families of bases that draw pictures; the pipeline of SD 1 draws with SD 2, too.
_CAN_BE_CALIBRATED = frozenset({*(kind.family for kind in KINDS.values()), "sd2"})


class Methods:
    """The base and the tables at hand, opened when the first adapter needs them. Use it as a context manager."""

    def __init__(self, base: str | Path | Mapping[str, Tensor] | Base | None, calibration: Path | None) -> None:
        self._base_path = Path(base) if isinstance(base, (str, Path)) else None
        self._base_source, self._calibration = base, calibration
        self._stack = ExitStack()

    def __enter__(self) -> Methods:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._stack.close()

    @cached_property
    def _base(self) -> Base | None:
        source = self._base_source
        return None if source is None else self._stack.enter_context(use_base(source))

    @cached_property
    def _tables(self) -> list[tuple[Statistics, str]]:
        """Tables that are tried in turn, with where they were found. Raises InputError for the one that was named."""
        tables = []
        if self._calibration is not None:
            tables.append((self._stack.enter_context(open_statistics(self._calibration)), "as --calibration says"))
        model = self._base_path
        folders = [(model.parent, "beside the model"), (model, "beside the model")] if model else []
        for folder, where in (*folders, (table_folder(), "from the user's cache")):
            tables += [(self._stack.enter_context(open_statistics(path)), where) for path in _tables_in(folder)]
        base = self._base
        # Those of the model itself before those of its relatives; Python's sort keeps the order otherwise.
        return sorted(
            tables,
            key=lambda table: (
                table[0].path != self._calibration,
                base is not None and table[0].base.fingerprint != base.fingerprint,
            ),
        )

    def check(self) -> None:
        """Open what was named, before any work. Raises InputError or NotABase."""
        _ = self._base and self._base.shapes, self._tables

    @property
    def fingerprints(self) -> tuple[str, ...]:
        """What the base and the tables are, for comparison with an earlier run."""
        return (self._base.fingerprint if self._base else "", *(table.fingerprint for table, _ in self._tables))

    def of(self, source: Source) -> Method:
        """The best method for an adapter. Raises InputError if the adapter cannot be read."""
        alone = Method(
            "adapter",
            "method: the LoRA alone. With --base MODEL files often become smaller. For models that draw, a calibration "
            f"table makes them about half as large: {_CALIBRATE}",
        )
        if self._base is None and not self._tables:
            return alone
        with open_adapter(source) as adapter:
            fits = self._base is not None and _fits(adapter, self._base)
            base = (self._base_path or self._base) if fits else None
            for table, where in self._tables:
                if _fits(adapter, table):
                    return Method("calibrated", f"method: calibrated with {table.path.name}, {where}", base, table.path)
        if base and self._base:
            why = f"method: compared with {self._base.path.name}"
            if self._base.family.name in _CAN_BE_CALIBRATED:
                why += f". With a calibration table of this model, files become smaller still: {_CALIBRATE}"
            return Method("base", why, base)
        if named := self._calibration or (self._base and self._base.path):
            return Method("adapter", f"method: the LoRA alone. {named.name} is for another model")
        return alone


def _fits(adapter: Adapter, means: Statistics | Base) -> bool:
    """Whether a table or base is for this adapter."""
    try:
        return any(means.of_layers(adapter) if isinstance(means, Statistics) else match(adapter, means))
    except (InputError, UsageError):
        return False


def table_folder() -> Path | None:
    """The folder in the user's cache where tables are looked for; None for a user without a home."""
    folder = user_cache()
    return folder and folder / "tables"


def table_for(model: str | Path) -> Path:
    """The file in the user's cache for the table of a model.

    Raises UsageError where there is no such place, and NotABase or InputError for a model that cannot be read.
    """
    folder = table_folder()
    if folder is None:
        raise UsageError("calibrate: there is no home folder to keep the table in; name a file with -o.")
    with open_base(model) as base:  # models of several sizes and makers are called "model"
        return folder / f"{Path(os.path.realpath(model)).stem}-{base.fingerprint[:8]}.safetensors"


def _tables_in(folder: Path | None) -> Iterator[Path]:
    """The calibration tables in a folder, the newest first."""
    if folder is None or not folder.is_dir():
        return
    files = [path for path in folder.glob("*.safetensors") if path.is_file()]
    for path in sorted(files, key=lambda path: -path.stat().st_mtime):
        entries: Mapping[str, str] = {}
        if path.stat().st_size < _LARGEST_TABLE:
            with suppress(InputError):
                entries = read_header(path)[1]
        if entries.get("format") == FORMAT and entries.get("kind") == "base":
            yield path
