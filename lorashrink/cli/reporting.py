"""`report`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lorashrink.cli.command import Terminal, command
from lorashrink.cli.options import (
    Adapter,
    Base,
    Calibration,
    Clip,
    Device,
    Dtype,
    Force,
    Images,
    ImagesConfig,
    ImagesOut,
    Jobs,
    Prompts,
    Recipes,
    Seeds,
    Sizes,
    Text,
    seeds_of,
    sizes_of,
    split_base,
)
from lorashrink.cli.printing import new_console
from lorashrink.errors import UsageError
from lorashrink.text import size_text

if TYPE_CHECKING:
    from lorashrink.reports.report import ReportFile


def print_report_file(result: ReportFile, terminal: Terminal) -> None:
    """The recommended recipe, and the page."""
    console = new_console()
    if result.sweep and result.sweep.suggestion:
        suggestion = result.sweep.suggestion
        console.print(f"recommended: -r {suggestion.recipe}, {suggestion.reason}")
    what_next = "pictures are beside it" if result.path.endswith(".md") else "open it in a browser"
    console.print(f"{result.path}: {size_text(result.bytes)}, {what_next}")


@command(print_report_file)
def report(
    terminal: Terminal,
    adapter: Adapter,
    recipe: Recipes = None,
    sizes: Sizes = None,
    base: Base = None,
    dtype: Dtype = "same",
    device: Device = "auto",
    jobs: Jobs = None,
    calibration: Calibration = None,
    images: Images = None,
    images_config: ImagesConfig = None,
    prompts: Prompts = None,
    seeds: Seeds = "0",
    images_out: ImagesOut = None,
    clip: Clip = None,
    text: Text = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            help="The page: a .html (default ADAPTER_report.html), or a .md for model sites.",
        ),
    ] = None,
    paths: Annotated[bool, typer.Option("--paths", help="Show whole paths of files, not names alone.")] = False,
    force: Force = False,
) -> object:
    """Write a web page about a LoRA: contents, sizes, pictures.

    Example: lorashrink report -o report.html model.safetensors lora.safetensors
    """
    base, adapters = split_base("report", adapter, base)
    if len(adapters) > 1:
        raise UsageError(f"{adapters[1]}: a report is about one adapter. To compare two: lorashrink compare A B")
    from lorashrink.reports.report import report as run

    return run(
        adapters[0],
        base=base,
        recipes=recipe or (),
        sizes=sizes_of("--sizes", sizes),
        dtype=dtype,
        calibration=calibration,
        images=images,
        prompts=prompts,
        seeds=seeds_of(seeds),
        pictures=images_out,
        settings=images_config,
        clip=clip,
        text=text,
        output=output,
        paths=paths,
        force=force,
        device=device,
        jobs=jobs,
        progress=terminal.progress,
    )
