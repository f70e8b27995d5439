"""What `overlap` of many adapters costs, beside the bare work and beside comparing the adapters two by two.

python benchmarks/bench_overlap.py --out FILE      writes 0.4 GB of random factors into a temporary folder

The adapters have 200 layers of 640×640 and rank 32, with singular values that fall as those of trained ones. The work
grows with the square of the number of adapters where pairs are concerned, and with the number where single ones are.
The bare work is to open and decompose every adapter, and for every layer the Gram matrices in float64 of all factors
side by side, which hold the inner products of all pairs. Times are those of the processor, of all threads together.
"""

from __future__ import annotations

import argparse
import math
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import sdxl_data
import torch
from bench_resize import into_memory
from rates import cores
from safetensors.torch import save_file

from lorashrink import compare, overlap
from lorashrink.adapters import open_adapter
from lorashrink.engine.devices import worker_pool
from lorashrink.engine.products import square
from lorashrink.engine.spectrum import Item, decompose

LAYERS, SIDE, RANK = 200, 640, 32
COUNTS = (2, 5, 20)
REPEATS = 3


def make_adapter(path: Path, seed: int) -> Path:
    """Random factors in fp16, in kohya's spelling; every adapter has a strength of its own."""
    generator = torch.Generator().manual_seed(seed)
    size = float(torch.empty(()).uniform_(0.5, 1.5, generator=generator))
    tensors = {}
    for number in range(LAYERS):
        name = f"lora_unet_input_blocks_{4 + number // 20}_1_transformer_blocks_{number % 20}_attn1_to_q"
        up, down = sdxl_data.factors((SIDE, SIDE), RANK, size, generator)
        tensors |= {f"{name}.lora_up.weight": up, f"{name}.lora_down.weight": down}
        tensors[f"{name}.alpha"] = torch.tensor(float(RANK))
    save_file(tensors, path)
    return path


def decompose_file(path: Path) -> None:
    """Open, read and decompose one adapter."""
    with open_adapter(path) as adapter, worker_pool() as pool:
        for pending in decompose([Item(partial(getattr, layer, "delta"), layer.width) for layer in adapter], pool):
            pending.result()


def gram_matrices(count: int) -> None:
    """Both Gram matrices of the factors of `count` adapters, for as many layers as a file has."""
    up, down = torch.ones(SIDE, count * RANK).half(), torch.ones(count * RANK, SIDE).half()
    with worker_pool() as pool:
        for _ in pool.map(lambda _: (square(up.mT.double()), square(down.double())), range(LAYERS)):
            pass


def bare(paths: Sequence[Path]) -> None:
    """The work that no way of doing it can leave out."""
    for path in paths:
        decompose_file(path)
    gram_matrices(len(paths))


def best(*functions: Callable[[], object]) -> list[float]:
    """The least processor seconds of each, taken in turns."""
    least = [math.inf] * len(functions)
    for _ in range(REPEATS):
        for index, function in enumerate(functions):
            start = time.process_time()
            function()
            least[index] = min(least[index], time.process_time() - start)
    return least


def bench(paths: Sequence[Path]) -> list[str]:
    """Lines with ratios for every number of adapters."""
    into_memory(list(paths))
    lines = []
    for count in COUNTS:
        pairs = count * (count - 1) // 2
        ours, work, pair = best(
            lambda some=paths[:count]: overlap(some),
            lambda some=paths[:count]: bare(some),
            lambda: compare(*paths[:2]),
        )
        setting = f"{cores()} cores, torch {torch.__version__}, {LAYERS} layers of {SIDE}×{SIDE} r{RANK}"
        lines += [
            f"{ours / work:.2f}x  {count} adapters {ours:.2f} CPU s  bare work {work:.2f} s  {setting}",
            f"{pairs * pair / ours:.1f}x  {count} adapters {ours:.2f} CPU s  {pairs} comparisons of two "
            f"{pairs * pair:.2f} s, from one of {pair:.2f} s",
        ]
    return [*lines, f"load {os.getloadavg()[0]:.1f} at {time.strftime('%H:%M')}"]


def main() -> None:
    """Print the comparison, and write it to a file if asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="write the printed text to this file too")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        lines = bench([make_adapter(Path(folder) / f"{seed}.safetensors", seed) for seed in range(max(COUNTS))])
    print("\n".join(lines))
    if options.out:
        options.out.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
