"""What the norms of an SDXL base cost on one core, by the shapes of its weights.

python benchmarks/bench_norms.py --out FILE      random weights of the shapes that are a hundredth of the base or more

Beside σ_1 stands one decomposition that gives the same number, all eigenvalues of W·Wᵀ in float32, and beside ‖W‖_F
the conversion of the weight to float32. Times are those of the processor. The error is that of σ_1 against a float64
decomposition, for shapes where that takes seconds only.
"""

from __future__ import annotations

import argparse
import math
import os
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import sdxl_data
import torch
from torch import Tensor

from lorashrink.engine.norms import frobenius, spectral

SMALLEST_SHARE = 0.01
REPEATS = 2
EXACT_SIDE = 1280  # shorter sides up to this are decomposed in float64


def best(function: Callable[[], object]) -> float:
    """The least processor seconds."""
    least = math.inf
    for _ in range(REPEATS):
        start = time.process_time()
        function()
        least = min(least, time.process_time() - start)
    return least


def all_eigenvalues(weight: Tensor, dtype: torch.dtype = torch.float32) -> float:
    """σ_1 without an iteration."""
    wide = (weight if weight.shape[0] <= weight.shape[1] else weight.mT).to(dtype)
    return math.sqrt(float(torch.linalg.eigvalsh(wide @ wide.mT)[-1]))


def bench() -> list[str]:
    """A line for each shape, and the sums for the whole base."""
    torch.set_num_threads(1)
    base, _ = sdxl_data.shapes(small=False)
    counts = Counter((shape[0], math.prod(shape[1:])) for shape in base.values() if len(shape) > 1)
    total = sum(math.prod(shape) * count for shape, count in counts.items())
    generator = torch.Generator().manual_seed(0)
    lines, sums, covered = [], [0.0] * 4, 0
    for shape, count in sorted(counts.items(), key=lambda item: -math.prod(item[0]) * item[1]):
        if math.prod(shape) * count < SMALLEST_SHARE * total:
            continue
        weight = (torch.randn(shape, generator=generator) * 0.02).half()
        functions = (spectral, all_eigenvalues, frobenius, Tensor.float)
        times = [best(lambda function=function, weight=weight: function(weight)) for function in functions]
        sums = [before + count * seconds for before, seconds in zip(sums, times, strict=True)]
        covered += math.prod(shape) * count
        line = f"{times[1] / times[0]:.1f}x  {count} of {shape[0]}×{shape[1]}: σ_1 {times[0] * 1e3:.0f} ms"
        if min(shape) <= EXACT_SIDE:
            line += f", relative error {abs(spectral(weight) / all_eigenvalues(weight, torch.float64) - 1):.0e}"
        lines.append(line)
    ours, eigenvalues, fro, convert = sums
    return [
        *lines,
        f"{eigenvalues / ours:.1f}x  all of these, {covered / total:.0%} of the base: σ_1 {ours:.1f} CPU s  "
        f"all eigenvalues {eigenvalues:.1f} s",
        f"{fro / convert:.1f}x  ‖W‖_F {fro:.2f} CPU s, {2 * covered / fro / 1e9:.1f} GB/s  to float32 {convert:.2f} s",
        f"load {os.getloadavg()[0]:.1f} at {time.strftime('%H:%M')}, torch {torch.__version__}",
    ]


def main() -> None:
    """Print the times, and write them to a file if asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="write the printed text to this file too")
    options = parser.parse_args()
    lines = bench()
    print("\n".join(lines))
    if options.out:
        options.out.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
