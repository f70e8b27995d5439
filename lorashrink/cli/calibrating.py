"""`calibrate`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lorashrink.cli.command import Terminal, command
from lorashrink.cli.options import (
    Device,
    DrawnPrompts,
    DrawnSeeds,
    Force,
    ImagesConfig,
    Model,
    ModelDtype,
    seeds_of,
    split_base,
)
from lorashrink.cli.printing import say
from lorashrink.errors import UsageError
from lorashrink.text import count_text, size_text

if TYPE_CHECKING:
    from lorashrink.calibration.calibrate import Calibrated, Effort


def print_calibrated(result: Calibrated, terminal: Terminal) -> None:
    """What was recorded, for which adapters, and what it took."""
    adapters = ", ".join(Path(path).name for path in result.adapters) or "all LoRAs of this model"
    peak = f", {size_text(result.peak_bytes)} of GPU memory at most" if result.peak_bytes else ""
    say(
        f"{result.path}: {count_text(result.layers, 'layer')} recorded for {adapters}, {size_text(result.bytes)}, "
        f"{count_text(result.passes, 'step')} in {result.seconds:.0f} s{peak}"
    )


def announce(effort: Effort) -> None:
    """What a run is going to do, and the memory that it needs."""
    again = f", {effort.done} of them finished earlier" if effort.done else ""
    rest = f" and draws {effort.forwards} more without" if effort.forwards else ""
    typer.echo(
        f"Running the model on {count_text(effort.runs, 'picture or text', 'pictures or texts')}{again}: records "
        f"{count_text(effort.passes, 'step')}{rest}, on {effort.device} in {effort.dtype}.\n"
        f"Memory: {size_text(effort.model_bytes)} for the model, {size_text(effort.statistics_bytes)} for "
        f"{count_text(effort.layers, 'layer')}, and what one step takes.",
        err=True,
    )


@command(print_calibrated)
def calibrate(
    terminal: Terminal,
    files: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[MODEL] [ADAPTER...]",
            help="The model, for a table that fits all its LoRAs. Add LoRAs to record exact numbers for these.",
        ),
    ] = None,
    model: Model = None,
    base_table: Annotated[
        Path | None, typer.Option("--base-table", hidden=True, help="The old name of MODEL alone.")
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output", "-o", help="The .safetensors file to write. Without it a table goes where shrink looks."
        ),
    ] = None,
    images_config: ImagesConfig = None,
    prompts: DrawnPrompts = None,
    text: Annotated[
        Path | None, typer.Option("--text", help="For language models: a text file; the model reads each line.")
    ] = None,
    seeds: DrawnSeeds = "0",
    steps_used: Annotated[int, typer.Option("--steps-used", min=1, help="Steps of each picture to record.")] = 10,
    rank: Annotated[int, typer.Option("--rank", min=1, help="Detail of the table: more is larger and better.")] = 16,
    loaded: Annotated[bool, typer.Option("--loaded", help="Record the model with the LoRA loaded.")] = False,
    dtype: ModelDtype = "auto",
    device: Device = "auto",
    force: Force = False,
) -> object:
    """Record what matters in a model, for smaller files at equal quality.

    The model draws a few pictures. For each layer this records its typical inputs and how strongly its output affects
    the picture. Recipes with calib use the result: resize -r calib,bytes,size=32 --calibration FILE.

    Example: lorashrink calibrate sdxl/ -o sdxl-table.safetensors
    """
    from lorashrink.linking.inputs import check_is_base

    if base_table and (files or model):
        raise UsageError("--base-table: takes no adapters. Give the model first: calibrate MODEL ADAPTER...")
    model, adapters = split_base("calibrate", files or (), model or base_table, alone=True)
    if model is None:
        if adapters and not Path(adapters[0]).exists():
            check_is_base(adapters[0])
        raise UsageError("name the model first: lorashrink calibrate MODEL [ADAPTER...] -o table.safetensors")
    if output is None and adapters:
        raise UsageError("name the file to write: -o statistics.safetensors")
    from lorashrink.calibration.calibrate import calibrate as run

    if output is None:
        from lorashrink.automatic.methods import table_for

        output = table_for(model)
    return run(
        adapters,
        model=model,
        output=output,
        settings=images_config,
        prompts=prompts,
        text=text,
        seeds=seeds_of(seeds),
        steps_used=steps_used,
        rank=rank,
        loaded=loaded,
        device=device,
        dtype=dtype,
        force=force,
        announce=None if terminal.quiet else announce,
        progress=terminal.progress,
    )
