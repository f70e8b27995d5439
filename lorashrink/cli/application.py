"""The program around the commands: its options, its errors, its progress bars."""

from __future__ import annotations

import contextlib
import gc
import logging
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from lorashrink._version import __version__
from lorashrink.cli.printing import print_json
from lorashrink.errors import LorashrinkError, UsageError

app = typer.Typer(
    help="Look inside LoRA adapters and shrink them against their base checkpoint.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # rich takes a fifth of a second to import, and help should not wait for it
)


EXIT_SOME_FAILED, EXIT_NOTHING_DONE, EXIT_INTERRUPTED = 1, 2, 130


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"lorashrink {__version__}")
        raise typer.Exit


@app.callback()
def main_options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Look inside LoRA adapters and shrink them against their base checkpoint."""


def split_base(files: Sequence[str], base: Path | None) -> tuple[Path | None, list[str]]:
    """The base and the adapters: the first file is the base if it looks like one and no base is given."""
    from lorashrink.linking.inputs import looks_like_base

    adapters = list(files)
    if base is None and looks_like_base(adapters[0]):
        base = Path(adapters.pop(0))
    if not adapters:
        raise UsageError(f"{base}: is a base checkpoint; name the adapters behind it.")
    return base, adapters


@contextlib.contextmanager
def session(verbose: int, quiet: bool, debug: bool, as_json: bool) -> Iterator[Callable[[str, int, int], None] | None]:
    """Progress on stderr, and the only place where errors become exit statuses."""
    logging.basicConfig(level=logging.DEBUG if debug or verbose > 1 else logging.WARNING, format="%(message)s")
    with contextlib.suppress(ValueError):  # not in the main thread
        signal.signal(signal.SIGTERM, _terminated)
    try:
        with _progress(quiet) as progress:
            yield progress
    except LorashrinkError as error:
        if debug:
            raise
        if as_json:
            print_json({"version": __version__, "error": str(error)})
        fail(str(error), EXIT_NOTHING_DONE)
    except KeyboardInterrupt:
        fail("interrupted; no unfinished file was left", EXIT_INTERRUPTED)


def _terminated(*_: object) -> NoReturn:
    raise KeyboardInterrupt


def fail(message: str, status: int) -> NoReturn:
    typer.echo(f"lorashrink: {message}", err=True)
    raise typer.Exit(status)


def exit_with(errors: Sequence[str], *, done: bool) -> None:
    for error in errors:
        typer.echo(f"lorashrink: {error}", err=True)
    if errors:
        raise typer.Exit(EXIT_SOME_FAILED if done else EXIT_NOTHING_DONE)


@contextlib.contextmanager
def _progress(quiet: bool) -> Iterator[Callable[[str, int, int], None] | None]:
    """A function that draws one bar per text on stderr; None if nobody would see it."""
    if quiet or not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn
    from rich.progress import TimeRemainingColumn as TimeLeft
    from rich.text import Text

    class Rate(ProgressColumn):
        def render(self, task: Task) -> Text:
            return Text(f"{task.speed:.0f}/s" if task.speed else "")

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), Rate(), TimeLeft())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bars:
        tasks: dict[str, Any] = {}
        lock = threading.Lock()

        def report(text: str, done: int, total: int) -> None:
            with lock:  # called from several threads
                if text not in tasks:
                    tasks[text] = bars.add_task(text, total=total)
                bars.update(tasks[text], completed=done)
                if done >= total:
                    bars.remove_task(tasks.pop(text))

        yield report


def main() -> None:
    """Entry point of the `lorashrink` command."""
    # Importing torch makes objects by the hundred thousand, and headers by the ten thousand; none of them is garbage.
    gc.set_threshold(100_000)
    status: object = 0
    try:
        app()
    except SystemExit as stop:
        status = stop.code
    sys.stdout.flush()
    sys.stderr.flush()
    # Every file is closed by now; taking torch apart would only take up to half a second.
    os._exit(status if isinstance(status, int) else 0)
