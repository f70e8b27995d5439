"""`evidence`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lorashrink.cli.command import Terminal, command
from lorashrink.cli.hints import check_names
from lorashrink.cli.options import Calibration, Device, ImagesConfig, Seeds, seeds_of, sizes_of
from lorashrink.cli.printing import new_console
from lorashrink.cli.tables import table_of
from lorashrink.errors import UsageError
from lorashrink.text import count_text, decibel_text, number_text, size_text

if TYPE_CHECKING:
    from rich.console import Console

    from lorashrink.results.evidence import Difference, Evidence, Reached, Workload


def print_evidence(result: Evidence, terminal: Terminal) -> None:
    """The work, how far the methods are from each other, and the files that were written."""
    console = new_console()
    print_workload(console, result.workload)
    for note in result.notes:
        console.print(note)
    if not result.results:
        return
    differences = [item for item in result.differences if not item.adapter or len(result.adapters) == 1]
    gaps: Mapping[str, Callable[[Difference], str]] = {
        "method": lambda item: item.curve,
        "dB at equal size": lambda item: number_text(item.decibels, "+.1f"),
        "size at equal quality": lambda item: number_text(item.rate, ".0%"),
    }
    console.print(table_of(differences, gaps))
    console.print(f"against {result.against}, mean of {count_text(len(result.adapters), 'adapter')}")
    if terminal.verbose:
        sizes: Mapping[str, Callable[[Reached], str]] = {
            "adapter": lambda item: item.adapter,
            "method": lambda item: item.curve,
            f"tensors for {decibel_text(result.quality)}": lambda item: size_text(item.payload or 0),
            "file": lambda item: size_text(item.bytes or 0),
            "worst picture": lambda item: decibel_text(item.worst_db or 0),
        }
        console.print(table_of([item for item in result.reached if item.payload], sizes))
    console.print(f"page: {result.page}")
    console.print(f"to send in: {result.data}")


def print_workload(console: Console, work: Workload) -> None:
    """Numbers of files and pictures, and what is reckoned for GPUs."""
    console.print(
        f"{count_text(work.adapters, 'adapter')} × {count_text(work.curves, 'method')}: about "
        f"{count_text(work.files, 'file')} and {count_text(work.drawings, 'picture')}, {size_text(work.memory)} "
        "of memory"
    )
    for gpu in work.reckoned:
        effort = f"{gpu.seconds:.1f} s a picture, {gpu.hours:.1f} h in all" if gpu.enough else "too small for the model"
        console.print(f"reckoned, not measured: {gpu.gigabytes} GB, such as {gpu.like}: {effort}")


@command(print_evidence, verbose_help="Print the size that each method takes, too.")
def evidence(
    terminal: Terminal,
    model: Annotated[Path, typer.Argument(metavar="MODEL", help="The model that draws: SDXL, SD 1 to 3, or FLUX.1.")],
    files: Annotated[list[str], typer.Argument(metavar="ADAPTER...", help="LoRA files, folders or patterns.")],
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Folder for the page and the numbers.")] = None,
    plan: Annotated[bool, typer.Option("--plan", help="Say how much work it is, and do nothing.")] = False,
    prompts: Annotated[
        str | None,
        typer.Option(
            "--prompts",
            metavar="FILE|FOLDER|TEXT",
            help="What to draw; in a folder, NAME.txt for each LoRA. The default comes from the LoRAs' metadata.",
        ),
    ] = None,
    methods: Annotated[
        list[str] | None,
        typer.Option(
            "--methods",
            metavar="METHODS",
            help="Methods to compare, such as 'rank fp16:calib,bytes fp8'. Repeat it for more.",
        ),
    ] = None,
    dtypes: Annotated[
        str | None, typer.Option("--dtypes", help="Dtypes to compare, such as fp16,fp8; also bf16, mixed and packed.")
    ] = None,
    sizes: Annotated[
        str | None,
        typer.Option("--sizes", help="Sizes of tensors, such as 4MB,8MB. The default follows each curve."),
    ] = None,
    seeds: Seeds = "0,1,2,3",
    draws: Annotated[
        int, typer.Option("--draws", min=1, help="Files of nearly the same size to average at --quality.")
    ] = 1,
    steps: Annotated[int | None, typer.Option("--steps", min=1, help="Steps of each picture.")] = None,
    quality: Annotated[float, typer.Option("--quality", help="PSNR in dB at which sizes are compared.")] = 40.0,
    against: Annotated[
        str | None,
        typer.Option(
            "--against",
            metavar="METHOD",
            help="Method to compare the others with. The default is fro_ckpt,bytes fp16, or else the first one.",
        ),
    ] = None,
    calibration: Calibration = None,
    images_config: ImagesConfig = None,
    with_prompts: Annotated[bool, typer.Option("--with-prompts", help="Put the prompts into the results.")] = False,
    device: Device = "auto",
) -> object:
    """Measure quality over size on your own model and LoRAs.

    It writes a page, and numbers that can be sent in. A rerun with the same folder goes on where the last one stopped.

    Example: lorashrink evidence sdxl/ loras/ -o evidence --plan
    Example: lorashrink evidence sdxl/ style.safetensors --dtypes fp16,fp8 -o evidence
    """
    from lorashrink.linking.inputs import check_is_base

    if output is None:
        raise UsageError("evidence: name the folder for the page and the numbers with -o.")
    check_names([str(model), *files])
    check_is_base(model)
    from lorashrink.measuring.run import evidence as run

    return run(
        model,
        files,
        output=output,
        plan=plan,
        prompts=prompts,
        methods=methods or (),
        dtypes=[name.strip() for name in dtypes.split(",")] if dtypes else (),
        sizes=[size * 2**20 for size in sizes_of("--sizes", sizes)],
        seeds=seeds_of(seeds),
        draws=draws,
        steps=steps,
        quality=quality,
        against=against,
        calibration=calibration,
        settings=images_config,
        with_prompts=with_prompts,
        device=device,
        progress=terminal.progress,
    )
