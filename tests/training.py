"""Pictures, options and a full disk for tests of the trainer, and whole runs of the tiny model in this process."""

from __future__ import annotations

import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import tiny_sdxl
import torch
from accelerate.state import AcceleratorState, GradientState
from safetensors.torch import load_file

from lorashrink.train.flags.options import Options, parse
from lorashrink.train.run.loop import Session
from lorashrink.train.run.preparing import prepare

# Two buckets, of two pictures and of one, shown twice each in an epoch.
SIZES = {"a.png": (64, 64), "b.png": (70, 66), "c.png": (120, 40)}
CAPTIONS = {"a.png": "a cat, red, big", "b.png": "a cat, blue, small", "c.png": "a cat, green"}


def write_data(folder: Path, sizes: dict[str, tuple[int, int]] | None = None) -> Path:
    """A folder for --train_data_dir."""
    chosen = sizes or SIZES
    tiny_sdxl.write_pictures(folder / "2_cat", chosen, {name: CAPTIONS.get(name, "a cat") for name in chosen})
    return folder


SQUARE, WIDE = (64, 64), (96, 40)


def options(folder: Path, **change: Any) -> Options:
    """To scan a folder for --train_data_dir with small buckets."""
    return Options(**{"train_data_dir": str(folder), "resolution": "64", "caption_extension": ".txt"} | change)


def flags(base: Path, data: Path, output: Path, *more: str) -> list[str]:
    """A short run: rank 2 on the linear layers, five steps of one picture; later flags win."""
    return [
        f"--pretrained_model_name_or_path={base}",
        f"--train_data_dir={data}",
        f"--output_dir={output}",
        *["--resolution=64,64", "--enable_bucket", "--min_bucket_reso=32", "--max_bucket_reso=128"],
        *["--bucket_reso_steps=32", "--caption_extension=.txt", "--max_data_loader_n_workers=0"],
        *["--network_module=lycoris.kohya", "--network_dim=2", "--network_alpha=2", "--learning_rate=0.01"],
        *["--max_train_steps=5", "--seed=1", "--output_name=x"],
        *(() if "--network_args" in more else ("--network_args", "preset=attn-mlp")),
        *more,
    ]


@contextmanager
def session(arguments: list[str]) -> Iterator[Session]:
    """A run that is ready, in a process that has not trained before."""
    _forget()
    try:
        yield prepare(parse(arguments))
    finally:
        _forget()


def run(arguments: list[str]) -> dict[str, torch.Tensor]:
    """Train, and give the tensors of the final file."""
    with session(arguments) as ready:
        return load_file(ready.run())


def _forget() -> None:
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def equal(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    """Bit for bit."""
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


@contextmanager
def files_no_larger_than(size: int) -> Iterator[None]:
    """As if the disk were full: the system refuses to write behind this many bytes of any file."""
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, old[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
