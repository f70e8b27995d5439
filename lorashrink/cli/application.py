"""The program around the commands: its own options, and how it starts and ends."""

from __future__ import annotations

import contextlib
import gc
import io
import os
import sys
from typing import Annotated

import typer

from lorashrink._version import __version__
from lorashrink.cli.help import CONTEXT, ProgramHelp

app = typer.Typer(
    cls=ProgramHelp,
    context_settings=CONTEXT,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # rich takes a fifth of a second to import, and help should not wait for it
)


def print_version(requested: bool) -> None:
    """The callback of `--version`."""
    if requested:
        typer.echo(f"lorashrink {__version__}")
        raise typer.Exit


@app.callback()
def main_options(
    version: Annotated[
        bool, typer.Option("--version", callback=print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Look inside LoRA adapters, shrink them, and see what that does to their pictures.

    Example: lorashrink resize -r energy=0.99 lora.safetensors
    """


def main() -> None:
    """Entry point of the `lorashrink` command."""
    # Importing torch makes objects by the hundred thousand, and headers by the ten thousand; none of them is garbage.
    gc.set_threshold(100_000)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # not every terminal and pipe can show every sign
            stream.reconfigure(errors="backslashreplace")
    status: object = 0
    failure: OSError | None = None  # of printing: the command itself turns its own into messages
    try:
        app()
    except SystemExit as stop:
        status = stop.code
    except OSError as error:
        failure = error
    try:
        sys.stdout.flush()
    except OSError as error:
        failure = failure or error
    if failure:
        status = 2
    with contextlib.suppress(OSError):
        if failure and not isinstance(failure, BrokenPipeError):  # a closed pipe, such as to `head`, is no mistake
            reason = f"the results could not be printed ({failure.strerror or failure})"
            sys.stderr.write(f"lorashrink: {reason}; files are written all the same\n")
        sys.stderr.flush()
    # Every file is closed by now; taking torch apart would only take up to half a second.
    os._exit(status if isinstance(status, int) else 0)
