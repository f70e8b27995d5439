"""How help looks: commands in groups, options in panels, as wide as the terminal.

rich, which typer would use, takes longer to import than all of `lorashrink --help` takes to print.
"""

from __future__ import annotations

import contextlib
import re
import textwrap
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import typer
from typer.core import TyperCommand, TyperGroup

from lorashrink._version import __version__
from lorashrink.cli.hints import option_hint
from lorashrink.cli.printing import print_json, say
from lorashrink.errors import nearest
from lorashrink.text import count_text

Command = TypeVar("Command", bound=Callable[..., None])

# Group -> its commands, in the order of help; those that this installation lacks are left out.
GROUPS: Mapping[str, Sequence[str]] = {
    "Shrink": ("shrink", "resize", "sweep", "calibrate", "refine"),
    "Look inside": ("inspect", "compare", "report", "overlap"),
    "Make": ("merge", "extract", "convert", "pack", "unpack", "base-norms", "train"),
    "Start": ("demo", "ui", "comfyui", "evidence", "help"),
}
_OTHER_COMMANDS = "Commands"

_OPTIONS, _EXPERT = "Options", "Expert options"

# Panel -> its options, in the order of help. An option that stands in none is in the first one.
_PANELS: Mapping[str, Sequence[str]] = {
    _OPTIONS: (),
    "Pictures": ("--images", "--images-config", "--prompts", "--seeds", "--images-out"),
    "Output": (
        *("--output", "--dtype", "--naming", "--as", "--force", "--skip-existing", "--dry-run", "--csv", "--plot"),
        *("--json", "--verbose", "--quiet", "--help"),
    ),
    _EXPERT: (
        *("--jobs", "--unmapped", "--target", "--clip", "--fro-limit", "--verify", "--strict", "--group-by-base"),
        *("--ray", "--ray-transfer", "--gpus-per-task", "--space-check", "--as-base-delta", "--spectrum", "--limit"),
        *("--loaded", "--rank", "--steps-used", "--batch", "--debug"),
    ),
}
_PANEL_OF = {option: panel for panel, options in _PANELS.items() for option in options}

CONTEXT: dict[str, Any] = {"help_option_names": ["-h", "--help"], "max_content_width": 10_000}

_HELP_ALL = "lorashrink.help_all"  # a key of the context's notes
_WIDEST_NAME = 26  # characters of the left column; a longer name has its text below it

# What click adds for the limits of numbers; the error of a wrong number names them.
_LIMITS = re.compile(r"; x>=?\d+(?=\])|\s*\[x>=?\d+\]")


# typer's name of a type -> what stands for a value in help.
_PLACEHOLDERS = {"path": "PATH", "int": "N", "float": "NUMBER"}
_TYPE = re.compile(r"<(?:list\[)?(\w+)[^>]*>")


def print_help_all(context: typer.Context, requested: bool) -> None:
    """The callback of `--help-all`."""
    if requested:
        context.meta[_HELP_ALL] = True
        typer.echo(context.get_help())
        raise typer.Exit


def with_section(title: str, rows: Mapping[str, str]) -> Callable[[Command], Command]:
    """A decorator of commands: their help ends with a section of these rows."""

    def decorate(function: Command) -> Command:
        function.help_section = (title, rows)  # type: ignore[attr-defined]
        return function

    return decorate


@contextlib.contextmanager
def _mistakes(text_of: Callable[[Any], str], command: str | None = None, as_json: bool = False) -> Iterator[None]:
    """What click says of a command line becomes a line on stderr, and exit status 2."""
    try:
        yield
    except Exception as error:
        if not hasattr(error, "format_message"):  # click's errors have it
            raise
        text = text_of(error)
    else:
        return
    if as_json:
        print_json({"version": __version__, "command": command, "error": text})
    say(f"lorashrink: {text}", errors=True)
    raise typer.Exit(2)


class CommandHelp(TyperCommand):
    """A command with its options in panels, which answers options of other tools with its own."""

    def make_context(self, info_name: str | None, args: list[str], parent: Any = None, **extra: Any) -> Any:
        """Read the command line. A mistake in it is a line on stderr, and exit status 2."""
        words = list(args)
        with _mistakes(lambda error: f"{info_name}: {self._mistake(error, words)}", info_name, "--json" in words):
            return super().make_context(info_name, args, parent, **extra)

    def _mistake(self, error: Any, words: Sequence[str]) -> str:
        """What is wrong with the command line, and what to type."""
        help_line = f"See lorashrink {self.name} -h."
        unknown = getattr(error, "option_name", None)
        if unknown is None or "no such option" not in error.format_message().lower():
            return f"{_message(error)}. {help_line}"
        names = [name for option in self.params for name in (*option.opts, *option.secondary_opts)]
        near = nearest(unknown, [name for name in names if name.startswith("--")], 0.7)
        hint = option_hint(unknown, words) or (f"Did you mean {near}?" if near else help_line)
        return f"there is no option {unknown}. {hint}"

    def collect_usage_pieces(self, ctx: Any) -> list[str]:
        """What follows the command: options, and its arguments as their help names them."""
        arguments = [item for item in self.get_params(ctx) if item.param_type_name == "argument"]
        return [str(self.options_metavar), *(str(item.metavar or item.name) for item in arguments)]

    def format_help_text(self, ctx: Any, formatter: Any) -> None:
        """The description, and examples in lines that can be copied."""
        _write_description(self.help or "", formatter)

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Arguments, one panel after the other, and the command's own section."""
        all_options = bool(ctx.meta.get(_HELP_ALL))
        parameters: list[Any] = [
            parameter for parameter in self.get_params(ctx) if not getattr(parameter, "hidden", False)
        ]
        arguments = [parameter for parameter in parameters if parameter.param_type_name == "argument"]
        _write_rows(formatter, "Arguments", [(str(item.metavar or item.name), item.help or "") for item in arguments])
        panels: dict[str, list[tuple[str, str]]] = {panel: [] for panel in _PANELS}
        for option in parameters:
            if option.param_type_name == "option" and (record := option.get_help_record(ctx)):
                panel = next((_PANEL_OF[name] for name in option.opts if name in _PANEL_OF), _OPTIONS)
                name = _TYPE.sub(lambda match: _PLACEHOLDERS.get(match[1], "TEXT"), record[0])
                panels[panel].append((name, _LIMITS.sub("", record[1])))
        expert = [] if all_options else panels.pop(_EXPERT)
        for panel, rows in panels.items():
            _write_rows(formatter, panel, rows)
        if section := getattr(self.callback, "help_section", None):
            _write_rows(formatter, section[0], section[1].items())
        if expert:
            formatter.write(f"\n{count_text(len(expert), 'more option')}: {ctx.command_path} --help-all\n")


class ProgramHelp(TyperGroup):
    """The program with its commands in groups."""

    def make_context(self, info_name: str | None, args: list[str], parent: Any = None, **extra: Any) -> Any:
        """Read the options before the command; without any, click prints the help by an error."""
        with _mistakes(_of_program) if args else contextlib.nullcontext():
            return super().make_context(info_name, args, parent, **extra)

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """The command of this name."""
        with _mistakes(_of_program):
            return super().resolve_command(ctx, args)

    def format_help_text(self, ctx: Any, formatter: Any) -> None:
        """The description, and lines to begin with."""
        _write_description(self.help or "", formatter)

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        """The groups, and a last one for commands that stand in none."""
        texts = {}
        for name in self.list_commands(ctx):
            if (command := self.get_command(ctx, name)) and not command.hidden:
                paragraph = " ".join((command.help or "").partition("\n\n")[0].split())
                first_sentence = re.split(r"(?<=\.)\s|:\s", paragraph, maxsplit=1)[0]
                texts[name] = first_sentence.rstrip(".")
        width = max(map(len, texts), default=0)
        for title, names in GROUPS.items():
            _write_rows(formatter, title, [(name, texts.pop(name)) for name in names if name in texts], width)
        _write_rows(formatter, _OTHER_COMMANDS, texts.items(), width)

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Commands first, because they are what a reader looks for."""
        self.format_commands(ctx, formatter)
        records = [option.get_help_record(ctx) for option in self.get_params(ctx)]
        _write_rows(formatter, _OPTIONS, filter(None, records))


def _of_program(error: Any) -> str:
    text = _message(error)
    return text if text.endswith("?") else f"{text}. lorashrink -h lists the commands."


def _message(error: Any) -> str:
    """What click or pydantic, which reads numbers for typer, says of a mistake; without a full stop."""
    text: str = error.format_message().rstrip(".")
    return re.sub(r"Input should be (.*?)(, unable to parse .*)?$", r"it should be \1", text)


def _write_description(text: str, formatter: Any) -> None:
    """Paragraphs are wrapped; a line that begins with `Example:` is not, so that it can be copied."""
    for paragraph in text.strip().split("\n\n"):
        formatter.write("\n")
        if not paragraph.startswith("Example"):
            formatter.write(textwrap.fill(" ".join(paragraph.split()), formatter.width) + "\n")
            continue
        for line in paragraph.splitlines():
            label, _, command = line.strip().partition(": ")
            formatter.write(f"{label}: {command}\n")


def _write_rows(formatter: Any, title: str, rows: Iterable[tuple[str, str]], least_width: int = 0) -> None:
    """A section of names and their texts, nothing without rows."""
    rows = list(rows)
    if not rows:
        return
    fitting = [len(name) for name, _ in rows if len(name) <= _WIDEST_NAME]
    column = max([least_width, *fitting]) + 4
    formatter.write(f"\n{title}:\n")
    for name, text in rows:
        lines = textwrap.wrap(text, max(formatter.width - column, 20), break_on_hyphens=False) or [""]
        if len(name) > column - 4:
            formatter.write(f"  {name}\n")
        else:
            formatter.write(f"  {name:<{column - 2}}{lines.pop(0)}".rstrip() + "\n")
        for line in lines:
            formatter.write(f"{'':{column}}{line}\n")
