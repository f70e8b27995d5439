"""The commands `extract`, `convert` and `norms`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lorashrink.cli.command import Terminal, command
from lorashrink.cli.options import (
    Adapters,
    Base,
    Device,
    DryRun,
    Dtype,
    Force,
    Jobs,
    Naming,
    Output,
    Recipes,
    Recursive,
    split_base,
)
from lorashrink.cli.printing import say
from lorashrink.cli.resizing import print_report
from lorashrink.text import count_text, size_text

if TYPE_CHECKING:
    from lorashrink.bases.norms import NormTable
    from lorashrink.results.shrinking import ConversionReport


@command(print_report)
def extract(
    terminal: Terminal,
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
) -> object:
    """Make an adapter of what fine-tuning changed in a checkpoint.

    Example: lorashrink extract tuned.safetensors model.safetensors -r rank=64 -o new.safetensors
    """
    from lorashrink.recipes import grammar

    texts = recipe or [grammar.DEFAULT]
    grammar.parse_recipes(texts)
    from lorashrink.making.extraction import extract as run

    return run(
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
        quantiles=terminal.verbose > 0,
        progress=terminal.progress,
    )


def _print_conversion(report: ConversionReport, terminal: Terminal) -> None:
    for result in report.results:
        for warning in result.warnings:
            say(f"{result.output}: {warning}", errors=True)
        kept = f", {count_text(len(result.kept), 'tensor')} under old names" if result.kept else ""
        exact = "bit by bit" if result.exact else "rounded"
        size = f"{size_text(result.bytes_before)} -> {size_text(result.bytes_after)}"
        say(f"{result.output}: {count_text(result.layers, 'layer')}, {size}, {exact}{kept}")
        only = len(report.results) == 1
        # of many files those that nothing loads
        for line in result.loads.lines if only or terminal.verbose or result.loads.loads_in == () else ():
            say(line)
        for tensor in result.kept if terminal.verbose else ():
            say(f"kept {tensor.key}: {tensor.reason}")


@command(_print_conversion, done=lambda report: bool(report.results))
def convert(
    terminal: Terminal,
    files: Adapters,
    base: Base = None,
    naming: Naming = None,
    dtype: Dtype = "same",
    output: Output = None,
    recursive: Recursive = False,
    force: Force = False,
) -> object:
    """Write adapters in another naming, container or dtype, without shrinking them.

    Example: lorashrink convert --naming diffusers model.safetensors lora.safetensors
    """
    from lorashrink.making.conversion import convert as run

    base, adapters = split_base(files, base)
    return run(
        adapters,
        base=base,
        naming=naming,
        dtype=dtype,
        output=output,
        recursive=recursive,
        force=force,
        progress=terminal.progress,
    )


def _print_norms(table: NormTable, terminal: Terminal) -> None:
    say(f"{table.path}: norms of {table.weights} weights of {table.base} ({table.family}), {size_text(table.bytes)}")


@command(_print_norms)
def norms(
    terminal: Terminal,
    base: Annotated[Path, typer.Argument(metavar="BASE", help="Checkpoint or diffusers folder.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The table to write, a .json file.")],
    force: Force = False,
    device: Device = "auto",
    jobs: Jobs = None,
) -> object:
    """Write a small table that stands in for a base wherever only norms are needed.

    Example: lorashrink norms model.safetensors -o model-norms.json
    """
    from lorashrink.bases.norms import norms as run

    return run(base, output, force=force, device=device, jobs=jobs, progress=terminal.progress)
