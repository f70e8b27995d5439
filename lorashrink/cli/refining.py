"""`refine`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lorashrink.cli.command import Terminal, command
from lorashrink.cli.options import Device, DrawnPrompts, DrawnSeeds, Force, Model, seeds_of
from lorashrink.cli.printing import say
from lorashrink.errors import UsageError

if TYPE_CHECKING:
    from lorashrink.calibration.refine import Refined


def print_refined(result: Refined, terminal: Terminal | None = None) -> None:
    """What the training gained, in a sentence."""
    effort = f"{result.steps} steps on {result.layers} layers in {result.seconds:.0f} s"
    if result.improved:
        share = result.loss_after / result.loss_before
        scaled = (
            "" if result.loss_scaled is None else f", {result.loss_scaled / result.loss_before:.0%} by factors alone"
        )
        say(
            f"{result.path}: {effort}; the squared error of predictions that were not trained on is {share:.0%} of "
            f"before{scaled}"
        )
    else:
        say(f"{result.path}: {effort} made nothing better; its tensors are those of {result.source}")


@command(print_refined)
def refine(
    terminal: Terminal,
    shrunk: Annotated[Path, typer.Argument(metavar="SHRUNK", help="A LoRA file, as resize wrote it.")],
    like: Annotated[Path | None, typer.Option("--like", help="The adapter that it was made of.")] = None,
    model: Model = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="The adapter to write, a .safetensors file.")
    ] = None,
    prompts: DrawnPrompts = None,
    seeds: DrawnSeeds = "0",
    steps: Annotated[int, typer.Option("--steps", min=0, help="Training steps, at most.")] = 120,
    batch: Annotated[int, typer.Option("--batch", min=1, help="Sampling steps of pictures in each of them.")] = 8,
    closed_form: Annotated[
        bool, typer.Option("--closed-form", help="First give each dimension a factor; enough with --steps 0.")
    ] = False,
    dtype: Annotated[str, typer.Option("--dtype", "-t", help="Of the model: auto, fp32, bf16 or fp16.")] = "auto",
    device: Device = "auto",
    force: Force = False,
) -> object:
    """Train a shrunk LoRA for a short while, to draw more like the whole one. Its size stays.

    Example: lorashrink refine small.safetensors --like lora.safetensors --model sdxl/ -o better.safetensors
    """
    if like is None or model is None or output is None:
        raise UsageError("refine: name the whole adapter with --like, its --model, and the file to write with -o.")
    from lorashrink.calibration.refine import refine as run

    return run(
        shrunk,
        like=like,
        model=model,
        output=output,
        prompts=prompts,
        seeds=seeds_of(seeds),
        steps=steps,
        batch=batch,
        closed_form=closed_form,
        device=device,
        dtype=dtype,
        force=force,
        progress=terminal.progress,
    )
