"""The program around the commands: its own options, and how it starts and ends."""

from __future__ import annotations

import contextlib
import gc
import os
import sys
from typing import Annotated

import typer

from lorashrink._version import __version__

app = typer.Typer(
    help="Look inside LoRA adapters and shrink them against their base checkpoint.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # rich takes a fifth of a second to import, and help should not wait for it
)


def _print_version(requested: bool) -> None:
    if requested:
        typer.echo(f"lorashrink {__version__}")
        raise typer.Exit


@app.callback()
def main_options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Look inside LoRA adapters and shrink them against their base checkpoint."""


def _no_room(error: OSError) -> int:
    """Say that stdout cannot be written; return the exit status."""
    typer.echo(f"lorashrink: the output cannot be printed ({error.strerror or error})", err=True)
    return 1


def main() -> None:
    """Entry point of the `lorashrink` command."""
    # Importing torch makes objects by the hundred thousand, and headers by the ten thousand; none of them is garbage.
    gc.set_threshold(100_000)
    status: object = 0
    try:
        try:
            app()
        except SystemExit as stop:
            status = stop.code
        sys.stdout.flush()
    except BrokenPipeError:  # whoever reads has seen enough
        status = 1
    except OSError as error:
        if error.filename is not None:  # of a file, and not of stdout
            raise
        status = _no_room(error)
    with contextlib.suppress(OSError):
        sys.stderr.flush()
    # Every file is closed by now; taking torch apart would only take up to half a second.
    os._exit(status if isinstance(status, int) else 0)
