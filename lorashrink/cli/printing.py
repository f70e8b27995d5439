"""How results become JSON, CSV and text."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from lorashrink.errors import LorashrinkError, UsageError

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table


def plain(value: Any) -> Any:
    """Dataclasses, mappings and tuples as JSON knows them; numbers that JSON does not know as null."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): plain(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(each) for each in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def print_json(document: object) -> None:
    typer.echo(json.dumps(document, allow_nan=False))


def check_result(path: Path | None, inputs: Sequence[str], force: bool) -> None:
    from lorashrink.files.disk import check_output

    if path is not None:
        try:
            check_output(path, force=force, inputs=list(map(Path, inputs)))
        except LorashrinkError as error:
            raise UsageError(f"--csv {error}") from error


def write_csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    from lorashrink.files.disk import write_bytes

    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, list(rows[0]) if rows else [])
    writer.writeheader()
    writer.writerows(map(cells, rows))
    write_bytes(path, text.getvalue().encode())


def cells(row: Mapping[str, Any]) -> dict[str, Any]:
    return {key: json.dumps(cell) if isinstance(cell, (list, dict)) else cell for key, cell in row.items()}


def new_console() -> Console:
    from rich.console import Console

    # A pipe has no width; lines that are cut there would be cut in the reader's file.
    return Console(highlight=False, soft_wrap=not sys.stdout.isatty(), width=None if sys.stdout.isatty() else 200)


def new_table(*columns: str) -> Table:
    from rich.box import SIMPLE
    from rich.table import Table

    table = Table(box=SIMPLE, pad_edge=False)
    for name in columns:
        left = name in ("layer", "block", "file", "recipe", "algo", "flags", "kind")
        table.add_column(
            name, justify="left" if left else "right", overflow="fold" if left else "ellipsis", no_wrap=not left
        )
    return table


def size_text(count: float) -> str:
    if count < 1e6:
        return f"{count / 1e3:.1f} kB"
    return f"{count / 1e6:.1f} MB" if count < 1e9 else f"{count / 1e9:.2f} GB"


def number_text(value: float | None, form: str = ".4g") -> str:
    return "-" if value is None else format(value, form)


def share_text(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.2f}%"


def percent_text(share: float) -> str:
    """Three digits, but for what is too small to matter."""
    return "< 0.0001 %" if 0 < share < 1e-6 else f"{100 * share:.3g} %"


def some_names(names: Sequence[str], verbose: int) -> str:
    """Which, or the first ones and how many there are."""
    shown = names if verbose else names[:3]
    return ", ".join(shown) + (f" and {len(names) - len(shown)} more" if len(shown) < len(names) else "")
