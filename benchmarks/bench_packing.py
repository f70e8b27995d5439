"""What `pack` and `unpack` cost beside `resize`, in CPU seconds and in time: `python benchmarks/bench_packing.py`.

A LoRA of SDXL's 986 layers with random numbers, without a base. All parts run one after the other in each round, so
that other work on the machine slows down all of them; the least of the rounds counts.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from rates import cores
from sdxl_data import shapes, write_lora

import lorashrink as ls

RANK = 64
QUALITIES = (40, 50)  # dB


def seconds(run: Callable[[], object]) -> tuple[float, float]:
    """(CPU, wall)."""
    used, start = time.process_time(), time.perf_counter()
    run()
    return time.process_time() - used, time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="all widths divided by 8")
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        _, layers = shapes(small=options.small)
        write_lora(folder / "lora.safetensors", RANK, layers, {name: name for name in layers})
        lora, resized = folder / "lora.safetensors", folder / "resized.safetensors"
        packed = {quality: folder / f"packed-{quality}.safetensors" for quality in QUALITIES}
        parts: dict[str, Callable[[], object]] = {
            "resize": partial(ls.resize, lora, output=resized, dtype="fp16", force=True)
        }
        for quality, path in packed.items():
            parts[f"pack --quality {quality}"] = partial(ls.pack, lora, output=path, quality=quality, force=True)
            parts[f"unpack, {quality} dB"] = partial(ls.unpack, path, output=resized, force=True)
        rounds = [{name: seconds(run) for name, run in parts.items()} for _ in range(options.repeats)]
        megabytes = lora.stat().st_size / 1e6
        print(
            f"{megabytes:.0f} MB, {len(layers)} layers of rank {RANK}, {cores()} cores, torch {torch.__version__}, "
            f"load of the last minute {os.getloadavg()[0]:.1f}"
        )
        for name in parts:
            of_part, of_resize = ([min(times) for times in zip(*(one[key] for one in rounds), strict=True)]
                                  for key in (name, "resize"))  # fmt: skip
            cpu, wall = of_part
            print(f"{cpu / of_resize[0]:.2f}x CPU, {wall / of_resize[1]:.2f}x time  "
                  f"{name} {cpu:.2f} CPU s, {wall:.2f} s; {megabytes / cpu:.0f} MB per CPU s")  # fmt: skip
        for quality, path in packed.items():
            print(f"{quality} dB: {path.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
