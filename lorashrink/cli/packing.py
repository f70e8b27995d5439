"""The commands `pack` and `unpack`."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lorashrink.cli.command import Terminal, command
from lorashrink.cli.options import Adapters, Base, Calibration, Device, Force, Jobs, Recursive, split_base
from lorashrink.cli.printing import say
from lorashrink.errors import UsageError
from lorashrink.text import count_text, decibel_text, percent_text, size_text

if TYPE_CHECKING:
    from lorashrink.results.packing import PackReport, UnpackReport

_UNITS = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 2**10, "mib": 2**20, "gib": 2**30}

Out = Annotated[Path | None, typer.Option("--output", "-o", help="Folder, or file name if there is one output.")]


def _bytes_of(text: str) -> int:
    """The bytes that `--size` names: 250000, 200kB, 1.5MB, 4MiB."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([a-z]*)", text.strip().lower())
    if not match or match[2] not in _UNITS or len(match[1]) > 20:
        raise UsageError(f"--size {text}: a number of bytes, such as 250000, 200kB or 1.5MB.")
    return int(float(match[1]) * _UNITS[match[2]])


def _print_packed(report: PackReport, terminal: Terminal) -> None:
    for result in report.results:
        say(
            f"{result.output}: {size_text(result.bytes_before)} -> {size_text(result.bytes_after)}, about "
            f"{decibel_text(result.predicted_db)}, error {percent_text(result.relative_error)}; unpacks to "
            f"{size_text(result.bytes_unpacked)}"
        )
        for warning in result.warnings:
            say(f"{result.output}: {warning}", errors=True)
        for tensor in result.verbatim if terminal.verbose else ():
            say(f"kept {tensor.key}: {tensor.reason}")
        for removed in result.removed if terminal.verbose else ():
            say(f"removed {removed.name}: {removed.reason}")


@command(_print_packed, done=lambda report: bool(report.results))
def pack(
    terminal: Terminal,
    files: Adapters,
    output: Out = None,
    quality: Annotated[
        float | None, typer.Option("--quality", help="About this PSNR of pictures, in dB; default 40.")
    ] = None,
    size: Annotated[
        str | None, typer.Option("--size", help="In its place: no file is larger, such as 200kB or 1.5MB.")
    ] = None,
    base: Base = None,
    calibration: Calibration = None,
    recursive: Recursive = False,
    device: Device = "auto",
    jobs: Jobs = None,
    force: Force = False,
) -> object:
    """Write adapters with few bits per number, for keeping and sending; unpack makes ordinary files of them.

    Example: lorashrink pack lora.safetensors --calibration sdxl-table.safetensors -o packed.safetensors
    """
    if output is None:
        raise UsageError("pack: name the folder or file to write with -o.")
    nbytes = None if size is None else _bytes_of(size)
    base, adapters = split_base(files, base)
    from lorashrink.packing.pack import pack as run

    return run(
        adapters,
        output=output,
        quality=quality,
        size=nbytes,
        base=base,
        calibration=calibration,
        recursive=recursive,
        device=device,
        jobs=jobs,
        force=force,
        progress=terminal.progress,
    )


def _print_unpacked(report: UnpackReport, terminal: Terminal) -> None:
    for result in report.results:
        size = f"{size_text(result.bytes_before)} -> {size_text(result.bytes_after)}"
        say(f"{result.output}: {count_text(result.layers, 'layer')}, {size}, {result.dtype}")


@command(_print_unpacked, done=lambda report: bool(report.results))
def unpack(
    terminal: Terminal,
    files: Annotated[list[str], typer.Argument(metavar="FILE", help="Packed files, folders or globs.")],
    output: Out = None,
    dtype: Annotated[str, typer.Option("--dtype", "-t", help="fp16, bf16 or fp32 (also 16, 32).")] = "fp16",
    recursive: Recursive = False,
    force: Force = False,
) -> object:
    """Make ordinary files of packed ones, the same bits on every machine.

    Example: lorashrink unpack packed.safetensors -o lora.safetensors
    """
    if output is None:
        raise UsageError("unpack: name the folder or file to write with -o.")
    from lorashrink.packing.unpack import unpack as run

    return run(files, output=output, dtype=dtype, recursive=recursive, force=force, progress=terminal.progress)
