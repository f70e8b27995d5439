"""How long `inspect --spectrum`, `sweep` and `calibrate` take, beside what they are made of.

python benchmarks/bench_pictures.py [--small] [--out FILE]      writes a LoRA of 456 MB into a temporary folder
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
from bench_overlap import best
from bench_resize import into_memory
from rates import cores
from sdxl_data import shapes, write_lora

import lorashrink as ls
import lorashrink_example
from lorashrink.adapters import open_adapter
from lorashrink.calibration.calibrate import calibrate
from lorashrink.engine.devices import worker_pool
from lorashrink.engine.spectrum import Item, decompose

RECIPES = [f"energy={share}" for share in (0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.98, 0.99, 0.999)]


def decompose_file(path: Path) -> None:
    """Read and decompose every layer."""
    with open_adapter(path) as adapter, worker_pool() as pool:
        for future in decompose([Item(partial(getattr, layer, "delta"), layer.width) for layer in adapter], pool):
            future.result()


def of_adapter(path: Path) -> list[str]:
    """`inspect --spectrum` by the decomposition, `sweep` of nine recipes by one `resize` that writes nothing."""
    into_memory([path])
    alone, looked, resized, swept = best(
        lambda: decompose_file(path),
        lambda: ls.inspect(path, spectrum=True),
        lambda: ls.resize(path, recipes="energy=0.9", dry_run=True),
        lambda: ls.sweep(path, recipes=RECIPES),
    )
    return [
        f"{looked / alone:.2f}x  inspect --spectrum {looked:.2f} s  decomposition {alone:.2f} s",
        f"{swept / resized:.2f}x  sweep of {len(RECIPES)} recipes {swept:.2f} s  resize --dry-run {resized:.2f} s",
    ]


def of_model(folder: Path) -> list[str]:
    """`calibrate` by the same steps forward and backward with no one watching."""
    from lorashrink.calibration import watching

    prompts = folder / "prompts.txt"
    prompts.write_text("a red circle on a white background --w 64 --h 64 --s 10 --l 4 --d 1\n" * 2)
    style = lorashrink_example.path("loras", "style.safetensors")
    unwatched = watching.Recorder._backward, watching.Projected.inputs, watching.Sketched.inputs

    def run(adapters: Sequence[Path], watch: bool) -> None:
        if not watch:
            watching.Recorder._backward = lambda *_: None  # type: ignore[method-assign]
            watching.Projected.inputs = watching.Sketched.inputs = lambda *_: None  # type: ignore[method-assign]
        try:
            calibrate(
                adapters,
                model=lorashrink_example.path("model"),
                output=folder / "s.safetensors",
                prompts=prompts,
                steps_used=10,
                force=True,
            )
        finally:
            watching.Recorder._backward = unwatched[0]  # type: ignore[method-assign]
            watching.Projected.inputs, watching.Sketched.inputs = unwatched[1:]  # type: ignore[method-assign]

    lines = []
    for name, adapters in (("an adapter", [style]), ("a table", [])):
        ours, bare = best(partial(run, adapters, True), partial(run, adapters, False))
        lines.append(f"{ours / bare:.2f}x  calibrate for {name} {ours:.2f} s  the same steps unwatched {bare:.2f} s")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="all widths divided by 8")
    parser.add_argument("--out", type=Path, help="write the lines to this file too")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="lorashrink-") as folder:
        path = Path(folder) / "lora.safetensors"
        layers = shapes(small=args.small)[1]
        write_lora(path, 64, layers, {name: name for name in layers})
        lines = [*of_adapter(path), *of_model(Path(folder))]
    lines.append(
        f"{cores()} cores, torch {torch.__version__}, load {os.getloadavg()[0]:.1f} at {time.strftime('%H:%M')}"
    )
    print("\n".join(lines))
    if args.out:
        args.out.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
