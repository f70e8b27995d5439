"""The commands `extract`, `convert` and `norms`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lorashrink.cli.application import exit_with, session, split_base
from lorashrink.cli.options import (
    Base,
    Debug,
    Device,
    DryRun,
    Dtype,
    Force,
    Jobs,
    Json,
    Naming,
    Output,
    Quiet,
    Recipes,
    Recursive,
    Verbose,
)
from lorashrink.cli.printing import plain, print_json, size_text
from lorashrink.cli.resizing import print_report

if TYPE_CHECKING:
    from lorashrink.results.shrinking import ConversionReport


def extract(
    tuned: Annotated[Path, typer.Argument(metavar="TUNED", help="The fine-tuned checkpoint or folder.")],
    base: Annotated[Path, typer.Argument(metavar="BASE", help="The checkpoint that it was tuned from.")],
    recipe: Recipes = None,
    output: Output = None,
    naming: Annotated[str, typer.Option("--naming", help="Names of the output: kohya, diffusers or comfy.")] = "kohya",
    vectors: Annotated[
        bool, typer.Option("--vectors", help="Differences of biases and normalisation layers too.")
    ] = False,
    dtype: Annotated[str, typer.Option("--dtype", "-t", help="fp16, bf16 or fp32 (also 16, 32).")] = "fp16",
    device: Device = "auto",
    jobs: Jobs = None,
    force: Force = False,
    dry_run: DryRun = False,
    as_json: Json = False,
    verbose: Verbose = 0,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Make an adapter of what fine-tuning changed in a checkpoint.

    Example: lorashrink extract tuned.safetensors model.safetensors -r rank=64 -o new.safetensors
    """
    with session(verbose, quiet, debug, as_json) as progress:
        from lorashrink.recipes import grammar as recipes

        texts = recipe or [recipes.DEFAULT]
        recipes.parse_recipes(texts)
        from lorashrink.making.extraction import extract as run

        report = run(
            tuned,
            base,
            recipes=texts,
            output=output,
            naming=naming,
            vectors=vectors,
            dtype=dtype,
            device=device,
            jobs=jobs,
            force=force,
            dry_run=dry_run,
            quantiles=verbose > 0,
            progress=progress,
        )
    if as_json:
        print_json(plain(report))
    elif not quiet:
        print_report(report, verbose, dry_run)


def convert(
    files: Annotated[list[str], typer.Argument(metavar="[BASE] ADAPTER", help="Adapters: files, folders or globs.")],
    base: Base = None,
    naming: Naming = None,
    dtype: Dtype = "same",
    output: Output = None,
    recursive: Recursive = False,
    force: Force = False,
    as_json: Json = False,
    verbose: Verbose = 0,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Write adapters in another naming, container or dtype, without shrinking them.

    Example: lorashrink convert --naming diffusers model.safetensors lora.safetensors
    """
    with session(verbose, quiet, debug, as_json) as progress:
        from lorashrink.making.conversion import convert as run

        base, adapters = split_base(files, base)
        report = run(
            adapters,
            base=base,
            naming=naming,
            dtype=dtype,
            output=output,
            recursive=recursive,
            force=force,
            progress=progress,
        )
    if as_json:
        print_json(plain(report))
    elif not quiet:
        _print_conversion(report, verbose)
    exit_with([failure.error for failure in report.failed], done=bool(report.results))


def norms(
    base: Annotated[Path, typer.Argument(metavar="BASE", help="Checkpoint or diffusers folder.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The table to write, a .json file.")],
    force: Force = False,
    jobs: Jobs = None,
    as_json: Json = False,
    verbose: Verbose = 0,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Write a small table that stands in for a base wherever only norms are needed.

    Example: lorashrink norms model.safetensors -o model-norms.json
    """
    with session(verbose, quiet, debug, as_json) as progress:
        from lorashrink.bases.norms import norms as run

        table = run(base, output, force=force, jobs=jobs, progress=progress)
    if as_json:
        print_json(plain(table))
    elif not quiet:
        typer.echo(
            f"{table.path}: norms of {table.weights} weights of {table.base} ({table.family}), {size_text(table.bytes)}"
        )


def _print_conversion(report: ConversionReport, verbose: int) -> None:
    for result in report.results:
        kept = f", {len(result.kept)} tensors under their old names" if result.kept else ""
        exact = "bit by bit" if result.exact else "rounded"
        typer.echo(f"{result.output}: {result.layers} layers, {size_text(result.bytes_after)}, {exact}{kept}")
        for tensor in result.kept if verbose else ():
            typer.echo(f"kept {tensor.key}: {tensor.reason}")
