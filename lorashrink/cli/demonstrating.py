"""`demo`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lorashrink.cli.command import Terminal, command
from lorashrink.cli.shrinking import print_shrunk
from lorashrink.cli.sweeping import print_sweep
from lorashrink.text import count_text, size_text

if TYPE_CHECKING:
    from lorashrink.demonstration import Demo


def print_story(outcome: Demo, terminal: Terminal) -> None:
    """What a user would have typed, with the results."""
    inspect_line, shrink_line, report_line = outcome.commands
    typer.echo(f"What is in it?\n$ {inspect_line}\n")
    for table in outcome.inspection.files:
        ranks = " and ".join(map(str, sorted({layer.rank for layer in table.layers})))
        typer.echo(f"{size_text(table.bytes)}, {table.algo}, {count_text(len(table.layers), 'layer')} of rank {ranks}")
        for finding in table.health:
            typer.echo(f"{finding.flag}: {finding.text}")
    typer.echo(f"\nShrink it.\n$ {shrink_line}")
    print_shrunk(outcome.shrunk, terminal)
    typer.echo(f"\nHow small can it get before one sees it?\n$ {report_line}")
    if outcome.page.sweep:
        print_sweep(outcome.page.sweep, terminal)
    typer.echo(f"\nLook at\n  {outcome.page.path}: all of it on one page, {size_text(outcome.page.bytes)}")
    for picture in outcome.pictures:
        typer.echo(f"  {picture}")
    if outcome.page.sweep and not outcome.page.sweep.drawn:
        typer.echo("With pip install 'lorashrink[pictures]' the model draws with each of these recipes too.")


@command(print_story)
def demo(
    terminal: Terminal,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the results.")] = Path("demo-out"),
) -> object:
    """Run inspect, shrink and report on a bundled toy model (about 2 minutes).

    Nothing is downloaded.

    Example: lorashrink demo -o demo-out
    """
    from lorashrink.demonstration import demo as run

    return run(output, progress=terminal.progress)
