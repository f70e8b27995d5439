"""`refine`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lorashrink._version import __version__
from lorashrink.cli.application import session
from lorashrink.cli.options import Debug, Device, Force, Json, Quiet, Verbose, numbers_of, whole_number
from lorashrink.cli.printing import plain, print_json
from lorashrink.errors import UsageError

if TYPE_CHECKING:
    from lorashrink.calibration.refine import Refined


def refine(
    shrunk: Annotated[Path, typer.Argument(metavar="SHRUNK", help="A LoRA file, as resize wrote it.")],
    like: Annotated[Path | None, typer.Option("--like", help="The adapter that it was made of.")] = None,
    model: Annotated[
        Path | None, typer.Option("--model", help="The model that the adapters are for: a folder or a file.")
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="The adapter to write, a .safetensors file.")
    ] = None,
    prompts: Annotated[
        Path | None, typer.Option("--prompts", help="What is drawn: .txt, .toml or .json; default are usual pictures.")
    ] = None,
    seeds: Annotated[str, typer.Option("--seeds", help="Seeds of each prompt: 0,1,2.")] = "0",
    steps: Annotated[int, typer.Option("--steps", min=1, help="Training steps, at most.")] = 120,
    batch: Annotated[int, typer.Option("--batch", min=1, help="Sampling steps of pictures in each of them.")] = 8,
    dtype: Annotated[str, typer.Option("--dtype", "-t", help="Of the model: auto, fp32, bf16 or fp16.")] = "auto",
    device: Device = "auto",
    force: Force = False,
    as_json: Json = False,
    verbose: Verbose = 0,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Train a shrunk LoRA for a short while, to draw more like the whole one. Its size stays.

    Example: lorashrink refine small.safetensors --like lora.safetensors --model sdxl/ -o better.safetensors
    """
    with session(verbose, quiet, debug, as_json) as progress:
        if like is None or model is None or output is None:
            raise UsageError("refine: name the whole adapter with --like, its --model, and the file to write with -o.")
        from lorashrink.calibration.refine import refine as run

        result = run(
            shrunk,
            like=like,
            model=model,
            output=output,
            prompts=prompts,
            seeds=[whole_number("--seeds", seed) for seed in numbers_of("--seeds", seeds)],
            steps=steps,
            batch=batch,
            device=device,
            dtype=dtype,
            force=force,
            progress=progress,
        )
    if as_json:
        print_json({"version": __version__, **plain(result)})
    elif not quiet:
        _print_refined(result)


def _print_refined(result: Refined) -> None:
    told = f"{result.steps} steps on {result.layers} layers in {result.seconds:.0f} s"
    if result.improved:
        share = result.loss_after / result.loss_before
        typer.echo(
            f"{result.path}: {told}; the squared error of predictions that were not trained on is {share:.0%} of before"
        )
    else:
        typer.echo(f"{result.path}: {told} made nothing better; its tensors are those of {result.source}")
