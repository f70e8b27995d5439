"""Options that several commands share, and how their texts are read."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from lorashrink.errors import UsageError
from lorashrink.text import bytes_in

Adapters = Annotated[list[str], typer.Argument(metavar="[BASE] ADAPTER", help="Adapters: files, folders or globs.")]
Adapter = Annotated[list[str], typer.Argument(metavar="[BASE] ADAPTER", help="One adapter: a file or PEFT folder.")]
Recipes = Annotated[
    list[str] | None,
    typer.Option("--recipe", "-r", help="What to keep, e.g. fro_ckpt=1,thr=-3.55; several give several files."),
]
Sizes = Annotated[str | None, typer.Option("--sizes", help="Sizes to try, such as 4MB,8MB,16MB; bare numbers are MiB.")]
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
Csv = Annotated[Path | None, typer.Option("--csv", help="Also write the table of layers to this file.")]
Force = Annotated[bool, typer.Option("--force", help="Replace files that exist.")]

# Of commands that draw pictures with each recipe.
ImagesConfig = Annotated[
    Path | None,
    typer.Option("--images-config", help="For --images in one file: a model folder with settings and tokenizers."),
]
Prompts = Annotated[Path | None, typer.Option("--prompts", help="What to draw: .txt, .toml or .json as for training.")]
Seeds = Annotated[str, typer.Option("--seeds", help="Seeds of each prompt, on top of its own: 0,1,2.")]
ImagesOut = Annotated[
    Path | None, typer.Option("--images-out", help="Folder of the pictures; those there are not drawn again.")
]
Clip = Annotated[
    Path | None, typer.Option("--clip", help="Folder of a CLIP model that compares pictures too; optional.")
]

# Of commands that watch or train a model while it draws.
Model = Annotated[Path | None, typer.Option("--model", help="The model that the adapters are for: a folder or a file.")]
DrawnPrompts = Annotated[
    Path | None, typer.Option("--prompts", help="What is drawn: .txt, .toml or .json; default are usual pictures.")
]
DrawnSeeds = Annotated[str, typer.Option("--seeds", help="Seeds of each prompt: 0,1,2.")]


def split_base(files: Sequence[str], base: Path | None) -> tuple[Path | None, list[str]]:
    """The base and the adapters: the first file is the base if it looks like one and no base is given."""
    from lorashrink.linking.inputs import looks_like_base

    adapters = list(files)
    if base is None and looks_like_base(adapters[0]):
        base = Path(adapters.pop(0))
    if not adapters:
        raise UsageError(f"{base}: is a base checkpoint; name the adapters behind it.")
    return base, adapters


def numbers_of(option: str, text: str | None) -> list[float]:
    """Numbers with commas between them."""
    try:
        return [float(number) for number in text.split(",")] if text else []
    except ValueError:
        raise UsageError(f"{option} {text}: numbers with commas between them, such as 4,8,16.") from None


def sizes_of(option: str, text: str | None) -> list[float]:
    """Sizes in MiB, written with commas between them and with units or without."""
    try:
        return [bytes_in(size) / 2**20 for size in text.split(",")] if text else []
    except ValueError:
        raise UsageError(f"{option} {text}: sizes with commas between them, such as 4MB,8MB.") from None


def seeds_of(text: str) -> list[int]:
    """The seeds that `--seeds` names."""
    numbers = numbers_of("--seeds", text)
    for number in numbers:
        if not 0 <= number < 2**53 or number != int(number):
            raise UsageError(f"--seeds {number:g}: a seed is a whole number of at least 0.")
    return list(map(int, numbers))
