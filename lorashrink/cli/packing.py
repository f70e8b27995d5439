"""The commands `pack` and `unpack`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lorashrink.cli.command import Terminal, command
from lorashrink.cli.options import Adapters, Base, Calibration, Device, Force, Jobs, Output, Recursive, split_base
from lorashrink.cli.printing import say
from lorashrink.errors import InputError, UsageError
from lorashrink.files.disk import absent_text
from lorashrink.text import bytes_in, count_text, decibel_text, percent_text, size_text

if TYPE_CHECKING:
    from lorashrink.results.packing import PackReport, UnpackReport


def print_packed(report: PackReport, terminal: Terminal) -> None:
    """Sizes and errors of each file; with -v what was copied or removed."""
    for result in report.results:
        say(
            f"{result.output}: {size_text(result.bytes_before)} -> {size_text(result.bytes_after)}, about "
            f"{decibel_text(result.predicted_db)}, error {percent_text(result.relative_error)}; unpacks to "
            f"{size_text(result.bytes_unpacked)}"
        )
        for warning in result.warnings:
            say(f"{result.output}: {warning}", errors=True)
        for tensor in result.verbatim if terminal.verbose else ():
            say(f"copied {tensor.key}: {tensor.reason}")
        for removed in result.removed if terminal.verbose else ():
            say(f"removed {removed.name}: {removed.reason}")


@command(print_packed)
def pack(
    terminal: Terminal,
    files: Adapters,
    output: Output = None,
    quality: Annotated[
        float | None, typer.Option("--quality", help="PSNR of pictures to aim for, in dB. The default is 40.")
    ] = None,
    size: Annotated[
        str | None,
        typer.Option("--size", help="Largest size of each file, such as 200kB or 1.5MB, in place of a quality."),
    ] = None,
    base: Base = None,
    calibration: Calibration = None,
    recursive: Recursive = False,
    device: Device = "auto",
    jobs: Jobs = None,
    force: Force = False,
) -> object:
    """Pack LoRAs into very small files for storage; unpack restores ordinary files.

    Example: lorashrink pack lora.safetensors --calibration sdxl-table.safetensors -o packed.safetensors
    """
    try:
        largest = None if size is None else int(bytes_in(size))  # a bare number is MiB, as in recipes
    except (ValueError, OverflowError):
        raise UsageError(f"--size {size}: a size is a number with a unit, such as 200kB or 1.5MB.") from None
    base, adapters = split_base("pack", files, base)
    from lorashrink.packing.pack import pack as run

    return run(
        adapters,
        output=_named(output, "pack", adapters, recursive),
        quality=quality,
        size=largest,
        base=base,
        calibration=calibration,
        recursive=recursive,
        device=device,
        jobs=jobs,
        force=force,
        progress=terminal.progress,
    )


def print_unpacked(report: UnpackReport, terminal: Terminal) -> None:
    """Sizes and dtype of each file."""
    for result in report.results:
        size = f"{size_text(result.bytes_before)} -> {size_text(result.bytes_after)}"
        say(f"{result.output}: {count_text(result.layers, 'layer')}, {size}, {result.dtype}")


@command(print_unpacked)
def unpack(
    terminal: Terminal,
    files: Annotated[list[str], typer.Argument(metavar="FILE", help="Packed files, folders or globs.")],
    output: Output = None,
    dtype: Annotated[str, typer.Option("--dtype", "-t", help="fp16, bf16 or fp32 (also 16, 32).")] = "fp16",
    recursive: Recursive = False,
    force: Force = False,
) -> object:
    """Restore ordinary LoRA files from packed ones.

    Example: lorashrink unpack packed.safetensors -o lora.safetensors
    """
    from lorashrink.packing.unpack import unpack as run

    output = _named(output, "unpack", files, recursive)
    return run(files, output=output, dtype=dtype, recursive=recursive, force=force, progress=terminal.progress)


def _named(output: Path | None, command: str, files: Sequence[str], recursive: bool) -> Path:
    """The output. Raises UsageError without one, but first says which input does not exist."""
    from lorashrink.linking.inputs import find_adapters

    if output is None:
        for path in find_adapters(files, recursive=recursive):
            if not path.exists():
                raise InputError(f"{path}: {absent_text(path)}")
        raise UsageError(f"{command}: name the folder or file to write with -o.")
    return output
