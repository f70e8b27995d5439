"""What all commands share: `--json -q -v --debug`, progress, errors and exit statuses."""

from __future__ import annotations

import contextlib
import functools
import inspect
import logging
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from typing import Annotated, Any, NoReturn

import typer

from lorashrink._version import __version__
from lorashrink.cli.conditions import Condition, Measure
from lorashrink.cli.help import print_help_all
from lorashrink.cli.printing import print_json, say
from lorashrink.cli.progress import progress_bars
from lorashrink.errors import Progress, explained
from lorashrink.files.disk import count_finished, discard_unfinished
from lorashrink.results.shown import plain
from lorashrink.signals import ended_by_signals
from lorashrink.text import count_text, printable

EXIT_SOME_FAILED, EXIT_NOTHING_DONE, EXIT_CONDITION, EXIT_INTERRUPTED = 1, 2, 3, 130


@dataclass(frozen=True, slots=True)
class Terminal:
    """How a command talks to its user."""

    as_json: bool
    verbose: int  # how often -v stands in the command line
    quiet: bool
    dry_run: bool
    progress: Progress | None


def command(
    show: Callable[[Any, Terminal], None] | None = None,
    *,
    verbose_help: str = "Print more; -vv lists every layer.",
    measure: Measure | None = None,
    quantities: Collection[str] = (),
) -> Callable[[Callable[..., object]], Callable[..., None]]:
    """Make a command of a function that calls one public function and returns the result.

    The function takes a `Terminal` before its own options; the command has the options of all commands behind these.
    It prints the result as JSON or by `show`; without `show` the function prints it itself. The exit status
    follows from the `failed` of the result, and from whether it has `results` or `files` in spite of them.
    measure, quantities: what `--fail-on` compares, for functions with that option.
    """

    def decorate(function: Callable[..., object]) -> Callable[..., None]:
        @functools.wraps(function)
        def run(*, as_json: bool, verbose: int, quiet: bool, debug: bool, help_all: bool, **arguments: Any) -> None:
            name = function.__name__.replace("_", "-")
            with session(name, as_json, verbose, quiet, debug) as progress:
                conditions = [Condition.parse(text, quantities) for text in arguments.pop("fail_on", None) or ()]
                terminal = Terminal(as_json, verbose, quiet, arguments.get("dry_run", False), progress)
                result = function(terminal, **arguments)
            if show and as_json:
                print_json({"version": __version__, "command": name, **plain(result)})
            elif show and not quiet:
                show(result, terminal)
            failed = getattr(result, "failed", ())
            for failure in failed:
                _print_error(failure.error)
            if failed:
                done = getattr(result, "results", getattr(result, "files", True))
                raise typer.Exit(EXIT_SOME_FAILED if done else EXIT_NOTHING_DONE)
            faults = [
                f"{subject}: {fault}"
                for subject, measured in (measure(result) if measure else ())
                for condition in conditions
                if (fault := condition.fault(measured))
            ]
            for fault in faults:
                _print_error(fault)
            if faults:
                raise typer.Exit(EXIT_CONDITION)

        run.__annotations__ = {}  # typer reads the options of a command from its signature
        run.__signature__ = command_signature(function, verbose_help)  # type: ignore[attr-defined]
        return run

    return decorate


def command_signature(function: Callable[..., object], verbose_help: str) -> inspect.Signature:
    """The options of the function, and behind them those of all commands; `--csv` stands beside `--json`."""
    _, *own = inspect.signature(function, eval_str=True).parameters.values()
    options = {parameter.name: (parameter.annotation, parameter.default) for parameter in own}
    csv = {"as_csv": options.pop("as_csv")} if "as_csv" in options else {}
    options |= {
        "as_json": (Annotated[bool, typer.Option("--json", help="Print one JSON document and nothing else.")], False),
        **csv,
        "verbose": (
            Annotated[int, typer.Option("--verbose", "-v", count=True, show_default=False, help=verbose_help)],
            0,
        ),
        "quiet": (Annotated[bool, typer.Option("--quiet", "-q", help="Print no progress and no summary.")], False),
        "debug": (Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")], False),
        "help_all": (
            Annotated[
                bool,
                typer.Option(
                    "--help-all",
                    help="Show the options for experts too.",
                    hidden=True,
                    is_eager=True,
                    callback=print_help_all,
                    expose_value=False,
                ),
            ],
            False,
        ),
    }
    keyword = inspect.Parameter.KEYWORD_ONLY
    return inspect.Signature(
        [
            inspect.Parameter(name, keyword, annotation=annotation, default=default)
            for name, (annotation, default) in options.items()
        ]
    )


@contextlib.contextmanager
def session(name: str, as_json: bool, verbose: int, quiet: bool, debug: bool) -> Iterator[Progress | None]:
    """Progress on stderr, and the only place where errors become exit statuses."""
    logging.basicConfig(level=logging.DEBUG if debug or verbose > 1 else logging.WARNING, format="%(message)s")
    for handler in logging.getLogger().handlers:
        handler.setFormatter(_Formatter("%(message)s"))
    finished = count_finished()
    try:
        with ended_by_signals(), progress_bars(quiet) as progress:
            yield progress
    except (typer.Exit, typer.Abort):
        raise
    except Exception as error:
        if debug:
            raise
        text = str(explained("the command", error))
        if as_json:
            print_json({"version": __version__, "command": name, "error": text})
        _fail(text, EXIT_NOTHING_DONE)
    except KeyboardInterrupt:
        discard_unfinished()
        count = count_finished() - finished
        written = f" after {count_text(count, 'output')} {'was' if count == 1 else 'were'} written" if count else ""
        _fail(f"interrupted{written}; no unfinished file was left", EXIT_INTERRUPTED)


class _Formatter(logging.Formatter):
    """Messages and tracebacks in which no name can drive the terminal."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        return printable(super().formatMessage(record))

    def formatException(self, ei: Any) -> str:
        return printable(super().formatException(ei), keep="\n\t")


def _fail(message: str, status: int) -> NoReturn:
    _print_error(message)
    raise typer.Exit(status)


def _print_error(message: str) -> None:
    say(f"lorashrink: {message}", errors=True)
