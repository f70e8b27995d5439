"""How results become JSON, CSV and tables."""

from __future__ import annotations

import csv
import io
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from lorashrink.errors import LorashrinkError, UsageError
from lorashrink.text import names_text, printable

if TYPE_CHECKING:
    from rich.console import Console

# The second file of a PEFT folder, and the journal of an output folder.
_NAMES_OF_ADAPTERS = ("adapter_config.json", ".lorashrink-journal.sqlite3")


def say(text: str, *, errors: bool = False) -> None:
    """A line on stdout, or stderr; the names in it cannot end it or drive the terminal."""
    typer.echo(printable(text), err=errors)


def print_json(document: object) -> None:
    """One JSON document on stdout."""
    typer.echo(json.dumps(document, allow_nan=False))


def check_outputs(
    inputs: Sequence[str | Path | None],
    force: bool,
    *,
    as_csv: Path | None,
    plots: Sequence[Path | None] = (),
    adapters: Path | None = None,
    pictures: Path | None = None,
) -> None:
    """Refuse, before any work, tables and figures that cannot be written or are in the way of something.

    inputs: every file that the call reads. plots: files of figures. adapters: where adapters go, a folder or a file.
    pictures: a folder of pictures. None stands for what is not read or written.
    """
    from lorashrink.files.disk import check_apart, check_output

    files = [("--csv", as_csv), *(("--plot", plot) for plot in plots)]
    one_adapter = adapters is not None and adapters.suffix == ".safetensors"
    output, images = ("-o", adapters), ("--images-out", pictures)
    check_apart([*files, output] if one_adapter else files, [images] if one_adapter else [output, images])
    for option, path in files:
        if path is None:
            continue
        try:
            check_output(path, force=force, inputs=[Path(entry) for entry in inputs if entry is not None])
        except LorashrinkError as error:
            raise UsageError(f"{option} {error}") from error
        # Adapters end so: a table of that name could replace an output of the same call, with or without --force.
        if path.suffix.lower() == ".safetensors" or path.name.lower() in _NAMES_OF_ADAPTERS:
            raise UsageError(f"{option} {path}: is the name of an adapter. Give the table or figure another ending.")


def write_csv(path: Path, rows: Sequence[Mapping[str, Any]], columns: Sequence[str] = ()) -> None:
    """Write rows with equal keys as a table; `columns` are its head where there may be no rows."""
    from lorashrink.files.disk import write_bytes

    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, list(rows[0] if rows else columns))
    writer.writeheader()
    writer.writerows(map(cells, rows))
    write_bytes(path, text.getvalue().encode())


def cells(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row of a CSV table: lists and objects as JSON, and texts that no spreadsheet takes for a formula."""
    texts = dict(row)
    for key, value in row.items():
        if isinstance(value, (list, dict)):
            texts[key] = json.dumps(value)
        elif isinstance(value, str):
            text = printable(value)
            texts[key] = f"'{text}" if text.startswith(("=", "+", "-", "@")) else text
    return texts


def new_console() -> Console:
    """A console that prints texts as they are: names of files and layers may look like markup."""
    from rich.console import Console
    from rich.text import Text

    class PrintableConsole(Console):
        def render_str(self, text: str, **options: Any) -> Text:  # every text passes here, also those in tables
            return super().render_str(printable(text), **options)

    # A pipe has no width; lines that are cut there would be cut in the reader's file.
    terminal = sys.stdout.isatty()
    return PrintableConsole(
        highlight=False, markup=False, emoji=False, soft_wrap=not terminal, width=None if terminal else 200
    )


def some_names(names: Sequence[str], verbose: int) -> str:
    """All names if `verbose`, else the first ones and how many more there are."""
    return names_text(names, most=None if verbose else 3)
