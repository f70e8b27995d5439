"""The commands `extract`, `convert` and `base-norms`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lorashrink.cli.command import Terminal, command
from lorashrink.cli.hints import check_names, line
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
from lorashrink.errors import UsageError
from lorashrink.text import count_text, size_text

if TYPE_CHECKING:
    from lorashrink.bases.norms import NormTable
    from lorashrink.results.shrinking import ConversionReport, Report


def print_extraction(report: Report, terminal: Terminal) -> None:
    """The table of files, and which model the LoRA turns into which."""
    print_report(report, terminal)
    tuned = sorted({Path(result.source) for result in report.results})
    if report.base:  # whoever has swapped the two sees it here
        base = Path(report.base.path)
        alike = any(path.name == base.name for path in tuned)
        before, *after = (str(path) if alike else path.name for path in (base, *tuned))
        say(f"The LoRA turns {before} into {', '.join(after)}.")


@command(print_extraction)
def extract(
    terminal: Terminal,
    tuned: Annotated[Path, typer.Argument(metavar="TUNED", help="The fine-tuned checkpoint or folder.")],
    base: Annotated[Path, typer.Argument(metavar="BASE", help="The checkpoint that it was tuned from.")],
    recipe: Recipes = None,
    output: Output = None,
    naming: Annotated[str, typer.Option("--naming", help="Tensor names: kohya, diffusers or comfy.")] = "kohya",
    vectors: Annotated[bool, typer.Option("--vectors", help="Include biases and normalisation layers.")] = False,
    dtype: Dtype = "fp16",
    device: Device = "auto",
    jobs: Jobs = None,
    force: Force = False,
    dry_run: DryRun = False,
) -> object:
    """Make a LoRA of the difference between two checkpoints.

    Example: lorashrink extract tuned.safetensors model.safetensors -r rank=64 -o new.safetensors
    """
    from lorashrink.linking.inputs import check_is_base, is_lora
    from lorashrink.recipes import grammar

    for checkpoint, model in ((tuned, base), (base, tuned)):
        check_names([str(checkpoint)])
        if is_lora(checkpoint):
            instead = f"To shrink the LoRA: {line('resize', model, checkpoint)}"
            if is_lora(model):
                instead = f"To measure how two LoRAs differ: {line('compare', checkpoint, model)}"
            raise UsageError(f"{checkpoint}: is a LoRA, and a base model is needed here. {instead}")
        check_is_base(checkpoint)
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


def print_conversion(report: ConversionReport, terminal: Terminal) -> None:
    """A line for each file, and which programs load it."""
    for result in report.results:
        for warning in result.warnings:
            say(f"{result.output}: {warning}", errors=True)
        kept = f", {count_text(len(result.kept), 'tensor')} under old names" if result.kept else ""
        exact = "weights unchanged" if result.exact else "weights rounded"
        size = f"{size_text(result.bytes_before)} -> {size_text(result.bytes_after)}"
        say(f"{result.output}: {count_text(result.layers, 'layer')}, {size}, {exact}{kept}")
        # Of many files only those that nothing loads.
        if len(report.results) == 1 or terminal.verbose or result.loads.loads_in == ():
            for line in result.loads.lines:
                say(line)
        for tensor in result.kept if terminal.verbose else ():
            say(f"kept {tensor.key}: {tensor.reason}")


@command(print_conversion)
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
    """Change the tensor names, file format or dtype of a LoRA.

    Example: lorashrink convert --naming diffusers model.safetensors lora.safetensors
    """
    from lorashrink.making.conversion import convert as run

    base, adapters = split_base("convert", files, base)
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


def print_norms(table: NormTable, terminal: Terminal) -> None:
    """What the table holds."""
    weights = count_text(table.weights, "weight")
    say(f"{table.path}: norms of {weights} of {table.base} ({table.family}), {size_text(table.bytes)}")


@command(print_norms)
def base_norms(
    terminal: Terminal,
    base: Annotated[Path, typer.Argument(metavar="BASE", help="Base model: a checkpoint or a model folder.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The table to write, a .json file.")],
    force: Force = False,
    device: Device = "auto",
    jobs: Jobs = None,
) -> object:
    """Save the norms of a base model's layers in a small file.

    The file (about 0.4 MB) replaces the base in recipes, so that you can shrink without the checkpoint.

    Example: lorashrink base-norms model.safetensors -o model-norms.json
    """
    from lorashrink.bases.norms import norms as run
    from lorashrink.linking.inputs import check_is_base

    check_names([str(base)])
    check_is_base(base)
    return run(base, output, force=force, device=device, jobs=jobs, progress=terminal.progress)
