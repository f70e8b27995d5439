"""`report`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lorashrink._version import __version__
from lorashrink.cli.application import session, split_base
from lorashrink.cli.options import (
    Base,
    Calibration,
    Debug,
    Device,
    Force,
    Jobs,
    Json,
    Quiet,
    Recipes,
    Verbose,
    numbers_of,
    whole_number,
)
from lorashrink.cli.printing import new_console, plain, print_json, size_text
from lorashrink.errors import UsageError


def report(
    adapter: Annotated[list[str], typer.Argument(metavar="[BASE] ADAPTER", help="One adapter: a file or PEFT folder.")],
    recipe: Recipes = None,
    sizes: Annotated[str | None, typer.Option("--sizes", help="Sizes to try, in MiB: 4,8,16,32.")] = None,
    base: Base = None,
    device: Device = "auto",
    jobs: Jobs = None,
    calibration: Calibration = None,
    images: Annotated[
        Path | None, typer.Option("--images", help="Model that draws pictures with each recipe, as for sweep.")
    ] = None,
    images_config: Annotated[
        Path | None,
        typer.Option("--images-config", help="For --images in one file: a model folder with settings and tokenizers."),
    ] = None,
    prompts: Annotated[
        Path | None, typer.Option("--prompts", help="What to draw: .txt, .toml or .json as for training.")
    ] = None,
    seeds: Annotated[str, typer.Option("--seeds", help="Seeds of each prompt, on top of its own: 0,1,2.")] = "0",
    images_out: Annotated[
        Path | None, typer.Option("--images-out", help="Folder of the pictures; those there are not drawn again.")
    ] = None,
    clip: Annotated[
        Path | None, typer.Option("--clip", help="Folder of a CLIP model that compares pictures too; optional.")
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="The page, a .html; default ADAPTER_report.html beside it.")
    ] = None,
    force: Force = False,
    as_json: Json = False,
    verbose: Verbose = 0,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Write one HTML page about an adapter: what is inside, how small it can get, and its pictures before and after.

    Example: lorashrink report -o report.html model.safetensors lora.safetensors
    """
    with session(verbose, quiet, debug, as_json) as progress:
        base, adapters = split_base(adapter, base)
        if len(adapters) > 1:
            raise UsageError(f"{adapters[1]}: a report is about one adapter.")
        from lorashrink.reports.report import report as run

        result = run(
            adapters[0],
            base=base,
            recipes=recipe or (),
            sizes=numbers_of("--sizes", sizes),
            calibration=calibration,
            images=images,
            prompts=prompts,
            seeds=[whole_number("--seeds", seed) for seed in numbers_of("--seeds", seeds)],
            pictures=images_out,
            settings=images_config,
            clip=clip,
            output=output,
            force=force,
            device=device,
            jobs=jobs,
            progress=progress,
        )
    if as_json:
        print_json({"version": __version__, **plain(result)})
    elif not quiet:
        console = new_console()
        if result.sweep and result.sweep.suggestion:
            suggestion = result.sweep.suggestion
            console.print(f"begin with -r {suggestion.recipe}: {suggestion.reason}", markup=False)
        console.print(f"{result.path}: {size_text(result.bytes)}, open it in a browser", markup=False)
