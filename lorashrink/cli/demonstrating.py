"""`demo`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lorashrink._version import __version__
from lorashrink.cli.application import session
from lorashrink.cli.options import Debug, Json, Quiet, Verbose
from lorashrink.cli.printing import plain, print_json, size_text
from lorashrink.cli.resizing import print_report
from lorashrink.cli.sweeping import print_sweep

if TYPE_CHECKING:
    from lorashrink.demonstration import Demo
    from lorashrink.results.inspection import AdapterTable


def demo(
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the results.")] = Path("demo-out"),
    as_json: Json = False,
    verbose: Verbose = 0,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Tell the whole story on a small model and a style for it, both part of the package.

    Example: lorashrink demo -o demo-out
    """
    with session(verbose, quiet, debug, as_json) as progress:
        from lorashrink.demonstration import demo as run

        outcome = run(output, progress=progress)
    if as_json:
        print_json({"version": __version__, **plain(outcome)})
    elif not quiet:
        _print_story(outcome, verbose)


def _print_story(outcome: Demo, verbose: int) -> None:
    looked, shrunk, reported = outcome.commands
    typer.echo(f"What is in it?\n$ {looked}\n")
    for table in outcome.inspection.files:
        _print_findings(table)
    typer.echo(f"\nShrink it as training guides do.\n$ {shrunk}")
    print_report(outcome.shrunk, verbose, dry_run=False)
    typer.echo(f"\nHow small can it get before one sees it?\n$ {reported}")
    if outcome.page.sweep:
        print_sweep(outcome.page.sweep)
    typer.echo(f"\nLook at\n  {outcome.page.path}: all of it on one page, {size_text(outcome.page.bytes)}")
    for picture in outcome.pictures:
        typer.echo(f"  {picture}")
    if outcome.page.sweep and not outcome.page.sweep.drawn:
        typer.echo("With pip install 'lorashrink[pictures]' the model draws with each of these recipes too.")


def _print_findings(table: AdapterTable) -> None:
    ranks = sorted({layer.rank for layer in table.layers})
    told = " and ".join(map(str, ranks))
    typer.echo(f"{size_text(table.bytes)}, {table.algo}, {len(table.layers)} layers of rank {told}")
    for finding in table.health:
        typer.echo(f"{finding.flag}: {finding.text}")
