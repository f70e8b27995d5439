"""`help`."""

from __future__ import annotations

from typing import Annotated, Any

import typer


def help_of_command(
    context: typer.Context,
    command: Annotated[str | None, typer.Argument(metavar="[COMMAND]", help="A command, such as resize.")] = None,
) -> None:
    """Show the help of a command.

    Example: lorashrink help resize
    """
    program = context.find_root()
    if command is None:
        typer.echo(program.get_help())
        return
    group: Any = program.command
    name, resolved, _ = group.resolve_command(program, [command])
    with resolved.make_context(name, ["--help"], parent=program) as inner:  # ends here, but for parsers of their own
        resolved.invoke(inner)
