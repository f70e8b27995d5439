"""Options that several commands share, and how their texts are read."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from lorashrink.cli.hints import check_names, line
from lorashrink.errors import UsageError
from lorashrink.text import bytes_in

_ADAPTERS = "LoRA files, folders, or patterns such as 'loras/*.safetensors'. A base model may stand before them."

Adapters = Annotated[list[str], typer.Argument(metavar="[BASE] ADAPTER...", help=_ADAPTERS)]
Adapter = Annotated[
    list[str],
    typer.Argument(metavar="[BASE] ADAPTER", help="One LoRA: a file or PEFT folder. Its base may stand before it."),
]
Recipes = Annotated[
    list[str] | None,
    typer.Option(
        *("--recipe", "-r"),
        metavar="RECIPE",
        help="What to keep: energy=0.99, or fro_ckpt=1,thr=-3.55 with a base. Repeat it for several.",
    ),
]
Sizes = Annotated[str | None, typer.Option("--sizes", help="Sizes to try, such as 4MB,8MB,16MB; bare numbers are MiB.")]
Output = Annotated[Path | None, typer.Option("--output", "-o", help="Folder for the results, or one file name.")]
Dtype = Annotated[str, typer.Option("--dtype", "-t", help="same, fp8, mixed (fp8 and fp16), auto, fp16, bf16 or fp32.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print what would be written, and write nothing.")]
Base = Annotated[
    Path | None, typer.Option("--base", help="Base model: checkpoint, model folder, or table by base-norms.")
]
Calibration = Annotated[
    Path | None, typer.Option("--calibration", help="Table that calibrate wrote, for recipes with calib.")
]
Naming = Annotated[
    str | None,
    typer.Option("--naming", help="Tensor names of the result: kohya, diffusers, comfy or peft (needs a base)."),
]
Recursive = Annotated[bool, typer.Option("--recursive", help="Search subfolders for adapters too.")]
Device = Annotated[str, typer.Option("--device", "-d", help="Where to compute: auto, cpu, cuda, cuda:N or mps.")]
Jobs = Annotated[int | None, typer.Option("--jobs", min=1, help="Worker threads. The default is one per core.")]
Csv = Annotated[Path | None, typer.Option("--csv", help="Write the table of layers to this file too.")]
Force = Annotated[bool, typer.Option("--force", help="Replace files that exist.")]

# Of commands that draw pictures with each recipe.
ImagesConfig = Annotated[
    Path | None,
    typer.Option("--images-config", help="For a model in one file: a folder of such a model, for its settings."),
]
Prompts = Annotated[
    str | None,
    typer.Option("--prompts", metavar="FILE|TEXT", help="What to draw: a prompt, or a .txt, .toml or .json file."),
]
Seeds = Annotated[str, typer.Option("--seeds", help="Seeds for each prompt, added to its own: 0,1,2.")]
ImagesOut = Annotated[
    Path | None, typer.Option("--images-out", help="Folder for the pictures; finished ones are not drawn again.")
]
Text = Annotated[
    Path | None,
    typer.Option("--text", help="For language models: a text that the base reads with each recipe (PEFT folders)."),
]
Images = Annotated[
    Path | None,
    typer.Option("--images", help="Model to draw pictures with each recipe: SDXL, SD 1 to 3, or FLUX.1."),
]
Clip = Annotated[Path | None, typer.Option("--clip", help="Folder of a CLIP model, which compares the pictures too.")]

# Of commands that watch or train a model while it draws.
Model = Annotated[Path | None, typer.Option("--model", help="The model that the LoRA is for: a folder or a file.")]
DrawnPrompts = Annotated[
    str | None,
    typer.Option(
        "--prompts",
        metavar="FILE|TEXT",
        help="What to draw: a prompt, or a .txt, .toml or .json file. The default is eight general prompts.",
    ),
]
ModelDtype = Annotated[str, typer.Option("--dtype", "-t", help="Of the model: auto, fp32, bf16 or fp16.")]
DrawnSeeds = Annotated[str, typer.Option("--seeds", help="Seeds for each prompt: 0,1,2.")]


def split_base(
    command: str, files: Sequence[str], base: Path | None, *, alone: bool = False
) -> tuple[Path | None, list[str]]:
    """The base and the adapters of a command: the first file is the base if it looks like one and no base is given.

    alone: whether there may be no adapters.
    """
    from lorashrink.linking.inputs import check_is_base, is_checkpoint, is_lora, looks_like_base

    check_names(files)
    adapters = list(files)
    if base is not None:
        if is_lora(base) and len(adapters) == 1 and looks_like_base(adapters[0]):
            raise UsageError(
                f"{base} is a LoRA, and {adapters[0]} is the base model. Swap them: {line(command, adapters[0], base)}"
            )
        check_is_base(base)
    if base is None and adapters and looks_like_base(adapters[0]):
        base = Path(adapters.pop(0))
    if not adapters and not alone:
        raise UsageError(
            f"{base} is a base model, not a LoRA. Give the LoRA file or folder after it: "
            f"{line(command, str(base), 'lora.safetensors')}"
        )
    if base is None and len(adapters) > 1 and looks_like_base(adapters[-1]):
        raise UsageError(
            f"{adapters[-1]} is a base model, not a LoRA. Give it first: "
            f"{line(command, adapters[-1], *adapters[:-1][:2])}{' ...' if len(adapters) > 3 else ''}"
        )
    if base is not None and len(adapters) == 1 and is_checkpoint(adapters[0]):
        raise UsageError(
            f"{adapters[0]} is a base model, not a LoRA, and so is {base}. To make a LoRA of their difference: "
            f"{line('extract', adapters[0], base, '-o', 'new.safetensors')}"
        )
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
