"""`merge`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lorashrink.cli.command import Terminal, command
from lorashrink.cli.options import Base, Csv, Device, DryRun, Dtype, Force, Jobs, Naming, split_base
from lorashrink.cli.printing import check_outputs, write_csv
from lorashrink.cli.resizing import print_report
from lorashrink.results.shown import plain


@command(print_report)
def merge(
    terminal: Terminal,
    files: Annotated[
        list[str],
        typer.Argument(
            metavar="[BASE] A[:WEIGHT] B[:WEIGHT]...", help="LoRAs, each with its weight. The default weight is 1."
        ),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="File name, or a folder.")],
    recipe: Annotated[
        list[str] | None,
        typer.Option("--recipe", "-r", metavar="RECIPE", help="Shrink the sum too, for example by rank=32."),
    ] = None,
    base: Base = None,
    naming: Naming = None,
    as_base_delta: Annotated[
        bool, typer.Option("--as-base-delta", help="Merge DoRA by what it adds to the weights of the base.")
    ] = False,
    dtype: Dtype = "same",
    device: Device = "auto",
    jobs: Jobs = None,
    force: Force = False,
    dry_run: DryRun = False,
    as_csv: Csv = None,
) -> object:
    """Add LoRAs up into one, with a weight for each.

    Example: lorashrink merge style.safetensors:0.7 hero.safetensors:0.5 -r rank=32 -o both.safetensors
    """
    from lorashrink.recipes import grammar

    grammar.parse_recipes(recipe or [])  # before torch is imported: a typo is answered at once
    from lorashrink.linking.inputs import split_sum

    inputs = [*[path for text in files for path, _ in split_sum(text)], base]
    check_outputs(inputs, force, as_csv=as_csv, adapters=output)
    base, adapters = split_base("merge", files, base)
    from lorashrink.making.merging import EVERYTHING
    from lorashrink.making.merging import merge as run

    report = run(
        adapters,
        output=output,
        recipes=recipe or EVERYTHING,
        base=base,
        naming=naming,
        as_base_delta=as_base_delta,
        dtype=dtype,
        device=device,
        jobs=jobs,
        force=force,
        dry_run=dry_run,
        quantiles=terminal.verbose > 0,
        progress=terminal.progress,
    )
    if as_csv:
        rows = [{"output": result.output, **plain(layer)} for result in report.results for layer in result.layers]
        write_csv(as_csv, rows)
    return report
