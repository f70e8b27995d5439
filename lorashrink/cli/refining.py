"""`refine`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lorashrink.cli.command import Terminal, command
from lorashrink.cli.hints import check_names
from lorashrink.cli.options import Device, DrawnPrompts, DrawnSeeds, Force, ImagesConfig, Model, ModelDtype, seeds_of
from lorashrink.cli.printing import say
from lorashrink.errors import UsageError
from lorashrink.text import count_text

if TYPE_CHECKING:
    from lorashrink.calibration.refine import Refined


def print_refined(result: Refined, terminal: Terminal | None = None) -> None:
    """What the training gained, in a sentence."""
    effort = f"{count_text(result.steps, 'step')} on {count_text(result.layers, 'layer')} in {result.seconds:.0f} s"
    if result.improved:
        share = result.loss_after / result.loss_before
        scaled = (
            "" if result.loss_scaled is None else f", {result.loss_scaled / result.loss_before:.0%} by factors alone"
        )
        say(
            f"{result.path}: {effort}; on pictures that it was not trained on, the squared error is {share:.0%} of "
            f"what it was{scaled}"
        )
    else:
        say(f"{result.path}: {effort} did not help; the file has the tensors of {result.source}")


@command(print_refined)
def refine(
    terminal: Terminal,
    shrunk: Annotated[Path, typer.Argument(metavar="SHRUNK", help="A LoRA file that resize has written.")],
    like: Annotated[Path | None, typer.Option("--like", help="The original LoRA, before resize.")] = None,
    model: Model = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="The .safetensors file to write.")] = None,
    images_config: ImagesConfig = None,
    prompts: DrawnPrompts = None,
    seeds: DrawnSeeds = "0",
    steps: Annotated[int, typer.Option("--steps", min=0, help="Largest number of training steps.")] = 120,
    batch: Annotated[int, typer.Option("--batch", min=1, help="Denoising steps per training step.")] = 8,
    closed_form: Annotated[
        bool,
        typer.Option(
            "--closed-form/--no-closed-form",
            help="First give each dimension a factor by regression; enough with --steps 0.",
        ),
    ] = True,
    dtype: ModelDtype = "auto",
    device: Device = "auto",
    force: Force = False,
) -> object:
    """Train a shrunk LoRA briefly to match the original better; its size stays.

    Example: lorashrink refine small.safetensors --like lora.safetensors --model sdxl/ -o better.safetensors
    """
    from lorashrink.linking.inputs import check_is_base

    if like is None or model is None or output is None:
        raise UsageError(
            "name the original LoRA, the model, and the file to write: "
            f"lorashrink refine {shrunk} --like lora.safetensors --model sdxl/ -o better.safetensors"
        )
    check_names([str(shrunk), str(like), str(model)])
    check_is_base(model)
    from lorashrink.calibration.refine import refine as run

    return run(
        shrunk,
        like=like,
        model=model,
        output=output,
        settings=images_config,
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
