"""`merge`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lorashrink.cli.application import session, split_base
from lorashrink.cli.options import (
    Base,
    Csv,
    Debug,
    Device,
    DryRun,
    Dtype,
    Force,
    Jobs,
    Json,
    Naming,
    Quiet,
    Verbose,
)
from lorashrink.cli.printing import check_result, plain, print_json, write_csv
from lorashrink.cli.resizing import print_report


def merge(
    files: Annotated[
        list[str],
        typer.Argument(
            metavar="[BASE] A[:WEIGHT] B[:WEIGHT]", help="Adapters, each with its weight; 1 if none is given."
        ),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="File name, or a folder.")],
    recipe: Annotated[
        list[str] | None,
        typer.Option("--recipe", "-r", help="What to keep of the sum, e.g. rank=32; default is all of it."),
    ] = None,
    base: Base = None,
    naming: Naming = None,
    as_base_delta: Annotated[
        bool, typer.Option("--as-base-delta", help="Merge DoRA as what it adds to the weights of the base.")
    ] = False,
    dtype: Dtype = "same",
    device: Device = "auto",
    jobs: Jobs = None,
    force: Force = False,
    dry_run: DryRun = False,
    as_json: Json = False,
    as_csv: Csv = None,
    verbose: Verbose = 0,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Write the weighted sum of adapters as one adapter, exactly, or shrunk by a recipe.

    Example: lorashrink merge style.safetensors:0.7 hero.safetensors:0.5 -r rank=32 -o both.safetensors
    """
    with session(verbose, quiet, debug, as_json) as progress:
        from lorashrink.recipes import grammar as recipes

        recipes.parse_recipes(recipe or [])  # before torch is imported: a typo is answered at once
        check_result(as_csv, files, force)
        base, adapters = split_base(files, base)
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
            quantiles=verbose > 0,
            progress=progress,
        )
        if as_csv:
            write_csv(as_csv, [{"output": each.output, **plain(row)} for each in report.results for row in each.layers])
    if as_json:
        print_json(plain(report))
    elif not quiet:
        print_report(report, verbose, dry_run)
