"""The engine on a GPU beside the CPU: the same layers in memory, decomposed together, truncated and compared.

    python benchmarks/bench_gpu.py --rank 64 --files 4

Ends with 0 and a sentence where there is no GPU, and with 1 if the singular values differ by more than 1e-9.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Sequence
from concurrent.futures import Executor
from functools import partial

import torch
from rates import cores
from sdxl_data import factors, shapes

from lorashrink.delta import Delta
from lorashrink.machine import worker_pool
from lorashrink.spectrum import Item, Spectrum, decompose, truncate

TOLERANCE = 1e-9  # relative, of singular values down to a thousandth of the layer's largest
_STRENGTH = 1.0  # ‖ΔW‖_F of every layer
_ALPHA = 32.0


def deltas(rank: int, files: int, *, small: bool) -> list[Delta]:
    """The layers of several SDXL LoRAs, random fp16 factors in memory."""
    generator = torch.Generator().manual_seed(0)
    made = []
    for shape in [*shapes(small=small)[1].values()] * files:
        up, down = factors(shape, rank, _STRENGTH, generator)
        made.append(Delta(up, down, _ALPHA / rank, shape))
    return made


def shrink(layers: Sequence[Delta], device: str, pool: Executor) -> tuple[float, list[Spectrum]]:
    """(seconds, spectra) of decomposing all layers and forming the factors of half of their dimensions."""
    start = time.perf_counter()
    items = [Item(partial(_same, layer), layer.rank) for layer in layers]
    spectra = [future.result() for future in decompose(items, device=device, pool=pool)]

    def form(index: int) -> None:
        truncate(layers[index], spectra[index], range(layers[index].rank // 2), device=device)

    for _ in pool.map(form, range(len(layers))):
        pass
    if device != "cpu":
        torch.cuda.synchronize()
    return time.perf_counter() - start, spectra


def _same(layer: Delta) -> Delta:
    return layer


def largest_difference(ours: Sequence[Spectrum], reference: Sequence[Spectrum]) -> float:
    """Largest relative difference of singular values over all layers; infinite if one is not a number."""
    worst = 0.0
    for one, other in zip(ours, reference, strict=True):
        counted = other.sigma > 1e-3 * other.sigma[0]
        difference = float(((one.sigma - other.sigma)[counted].abs() / other.sigma[counted]).max())
        worst = max(worst, difference if math.isfinite(difference) else math.inf)
    return worst


def compare(layers: Sequence[Delta], repeats: int) -> float:
    """Time both in turn, print the ratio, and return the largest relative difference."""
    times: dict[str, float] = {"cpu": math.inf, "cuda": math.inf}
    spectra: dict[str, list[Spectrum]] = {}
    with worker_pool() as pool:
        shrink(layers[:64], "cuda", pool)  # starts the libraries
        torch.cuda.reset_peak_memory_stats()
        for _ in range(repeats):
            for device in times:
                taken, spectra[device] = shrink(layers, device, pool)
                times[device] = min(times[device], taken)
    difference = largest_difference(spectra["cuda"], spectra["cpu"])
    print(
        f"{times['cpu'] / times['cuda']:.1f}x  GPU {times['cuda']:.2f} s  CPU {times['cpu']:.2f} s  "
        f"{torch.cuda.get_device_name()}, {cores()} cores, torch {torch.__version__}, {len(layers)} layers "
        f"r{layers[0].rank}"
    )
    print(f"      peak GPU memory {torch.cuda.max_memory_allocated() / 1e9:.2f} GB")
    print(f"      largest relative difference of σ {difference:.1e}, at most {TOLERANCE:g} is right")
    return difference


def main(arguments: Sequence[str] | None = None) -> int:
    """Compare, or say that there is no GPU."""
    parser = argparse.ArgumentParser(description="Time the engine on a GPU beside the CPU.")
    parser.add_argument("--rank", type=int, nargs="+", default=[64, 128])
    parser.add_argument("--files", type=int, default=1, help="LoRAs whose layers are decomposed together")
    parser.add_argument("--repeats", type=int, default=3, help="runs of each side; the fastest counts (default 3)")
    parser.add_argument("--small", action="store_true", help="widths divided by 8: a quick look")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("no GPU: torch finds no CUDA device on this machine, nothing was compared")
        return 0
    differences = [compare(deltas(rank, options.files, small=options.small), options.repeats) for rank in options.rank]
    return int(max(differences) > TOLERANCE)


if __name__ == "__main__":
    sys.exit(main())
