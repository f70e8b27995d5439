"""`shrink`."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lorashrink.cli.command import Terminal, command
from lorashrink.cli.conditions import FailOn
from lorashrink.cli.options import Base, Calibration, Device, Force, ImagesConfig, Jobs, Model, split_base
from lorashrink.cli.printing import new_console, say, some_names
from lorashrink.cli.tables import table_of
from lorashrink.text import count_text, share_text, size_text

if TYPE_CHECKING:
    from lorashrink.results.automatic import ShrinkReport, Shrunk

_MOST_ROWS = 40  # without -v


def print_shrunk(report: ShrinkReport, terminal: Terminal) -> None:
    """How the files were shrunk, a table of them, and their sum."""
    console = new_console()
    shrunk = report.written
    for line in dict.fromkeys(result.why for result in shrunk):
        console.print(line)
    for line in report.notes:
        console.print(line)
    warned: dict[str, list[str]] = defaultdict(list)
    for result in report.results:
        # What was written now; -v repeats what an earlier run said, and what concerns files that are not written.
        for warning in result.warnings if terminal.verbose or not result.skipped else ():
            warned[warning].append(result.input)
        for detail in result.details if terminal.verbose else ():
            console.print(f"{Path(result.input).name}: {detail}")
    for warning, inputs in warned.items():
        files = inputs[0] if len(inputs) == 1 else f"{len(inputs)} files ({some_names(inputs, terminal.verbose)})"
        say(f"{files}: {warning}", errors=True)
    if shrunk:
        root = os.path.commonpath([Path(result.input).absolute().parent for result in shrunk])
        drawn = any(result.worst_picture_db is not None for result in shrunk)
        columns: Mapping[str, Callable[[Shrunk], str]] = {
            "file": lambda result: os.path.relpath(os.path.abspath(result.input), root).removesuffix(".safetensors"),
            "before": lambda result: size_text(result.bytes_before),
            "after": lambda result: size_text(result.bytes_after),
            "share": lambda result: f"{result.share:.0%}",
            "worst picture" if drawn else "quality": lambda result: (
                result.quality_text or f"error {share_text(result.relative_error)}"
            ),
        }
        listed = shrunk if terminal.verbose else shrunk[:_MOST_ROWS]
        console.print(table_of(listed, columns))
        if more := len(shrunk) - len(listed):
            console.print(f"and {more} more; -v lists them")
    for reason, names in report.not_written.items():
        console.print(f"not written, {reason}: {some_names(names, terminal.verbose)}")
    if shrunk:
        before, after = sum(result.bytes_before for result in shrunk), sum(result.bytes_after for result in shrunk)
        new = sum(not result.skipped for result in shrunk)
        earlier = f", {len(shrunk) - new} already there" if new < len(shrunk) else ""
        folders = {str(Path(str(result.output)).parent) for result in shrunk}
        folder = folders.pop() if len(folders) == 1 else count_text(len(folders), "folder")
        console.print(
            f"{count_text(new, 'file')} written to {folder}{earlier}: {size_text(before)} -> {size_text(after)}, "
            f"{1 - after / before:.0%} saved"
        )
    elif not report.failed:
        console.print("nothing to shrink")
    if report.page:
        console.print(f"before and after: {report.page}")


@command(
    print_shrunk,
    measure=lambda report: [
        (result.output, {"error": result.relative_error, "psnr": result.quality, "size": result.bytes_after})
        for result in report.written
    ],
    quantities=("error", "psnr", "size"),
)
def shrink(
    terminal: Terminal,
    files: Annotated[
        list[str], typer.Argument(metavar="FILE|FOLDER...", help="LoRA files, or folders with all that is below them.")
    ],
    model: Model = None,
    base: Base = None,
    calibration: Calibration = None,
    quality: Annotated[str, typer.Option("--quality", help="same, high, small, or a PSNR in dB such as 40.")] = "high",
    size: Annotated[
        str | None, typer.Option("--size", help="Size of each file, such as 50MB, in place of a quality.")
    ] = None,
    rank: Annotated[
        int | None, typer.Option("--rank", min=1, help="One rank for all layers, in place of a quality.")
    ] = None,
    dtype: Annotated[
        str, typer.Option("--dtype", "-t", help="auto (fp8 where it is good enough), fp8, mixed, fp16, bf16 or same.")
    ] = "auto",
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="Folder for the results. The default is 'shrunk' beside the input."),
    ] = None,
    prompts: Annotated[
        str | None,
        typer.Option(
            "--prompts",
            metavar="FILE|TEXT",
            help="What to draw: a prompt or a file. The default comes from the LoRA's metadata.",
        ),
    ] = None,
    images_config: ImagesConfig = None,
    force: Force = False,
    device: Device = "auto",
    jobs: Jobs = None,
    fail_on: FailOn = None,
) -> object:
    """Make LoRAs smaller by the best method at hand. No recipe is needed.

    Example: lorashrink shrink loras/
    Example: lorashrink shrink --model sdxl/ --quality same lora.safetensors
    """
    base, adapters = (base, files) if model else split_base("shrink", files, base)
    from lorashrink.automatic.run import shrink as run

    return run(
        adapters,
        model=model,
        base=base,
        calibration=calibration,
        quality=quality,
        size=size,
        rank=rank,
        dtype=dtype,
        output=output,
        prompts=prompts,
        settings=images_config,
        force=force,
        device=device,
        jobs=jobs,
        progress=terminal.progress,
    )
