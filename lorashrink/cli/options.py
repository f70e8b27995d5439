"""Options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lorashrink.errors import UsageError

Recipes = Annotated[
    list[str] | None,
    typer.Option("--recipe", "-r", help="What to keep, e.g. fro_ckpt=1,thr=-3.55; several give several files."),
]
Output = Annotated[Path | None, typer.Option("--output", "-o", help="Folder, or file name if there is one output.")]
Dtype = Annotated[str, typer.Option("--dtype", "-t", help="same, fp16, bf16 or fp32 (also 16, 32).")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Report what would be written, and write nothing.")]
Base = Annotated[Path | None, typer.Option("--base", help="Base checkpoint, diffusers folder or norm table.")]
Calibration = Annotated[
    Path | None, typer.Option("--calibration", help="Statistics that calibrate wrote, for recipes with calib.")
]
Naming = Annotated[
    str | None, typer.Option("--naming", help="Names of the output: kohya, diffusers, comfy or peft; needs a base.")
]
Recursive = Annotated[bool, typer.Option("--recursive", help="Look for adapters in subfolders too.")]
Device = Annotated[str, typer.Option("--device", "-d", help="auto, cpu, cuda, cuda:N or mps.")]
Jobs = Annotated[int | None, typer.Option("--jobs", min=1, help="Worker threads; default one per core.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document and nothing else.")]
Csv = Annotated[Path | None, typer.Option("--csv", help="Also write the table of layers to this file.")]
Force = Annotated[bool, typer.Option("--force", help="Replace files that exist.")]
Verbose = Annotated[int, typer.Option("--verbose", "-v", count=True, help="Say more; -vv lists every layer.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress and no summary.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]


def numbers_of(option: str, text: str | None) -> list[float]:
    try:
        return [float(part) for part in text.split(",")] if text else []
    except ValueError:
        raise UsageError(f"{option} {text}: numbers with commas between them, such as 4,8,16.") from None


def whole_number(option: str, number: float) -> int:
    if not 0 <= number < 2**53 or number != int(number):
        raise UsageError(f"{option} {number:g}: a seed is a whole number of at least 0.")
    return int(number)
