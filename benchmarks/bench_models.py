"""How fast the decomposition is on adapters of other models than SDXL: of the size of FLUX.1 and Qwen-Image.

python benchmarks/bench_models.py --out FILE       writes 0.8 GB of random factors into a temporary folder

The layers are those of published adapters, which the tests list; the numbers in them are random.
"""

from __future__ import annotations

import argparse
import math
import sys
import tempfile
from functools import partial
from pathlib import Path

import qr_svd
import torch
from bench_resize import WAYS, into_memory, seconds, shrink_in_process, svd_cost, svd_time
from rates import cores
from safetensors.torch import save_file

from lorashrink.adapters import open_adapter

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
import fixtures

LISTED = {"FLUX.1": "flux_lora_diffusers", "Qwen-Image": "qwen_image_lora_diffusers"}
RANK, KEPT = 32, 16
REPEATS = 3


def make_adapter(path: Path, listed: str) -> Path:
    """Random factors of rank 32 for the layers of a listed adapter, in fp16 and kohya's spelling."""
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for key, shape in fixtures.shapes(listed).items():
        name, _, factor = key.removesuffix(".weight").rpartition(".")
        ending, factor_shape = {"lora_A": ("down", (RANK, shape[1])), "lora_B": ("up", (shape[0], RANK))}[factor]
        numbers = 0.02 * torch.randn(factor_shape, generator=generator)
        tensors[f"{name.replace('.', '_')}.lora_{ending}.weight"] = numbers.half()
        tensors[f"{name.replace('.', '_')}.alpha"] = torch.tensor(float(RANK))
    save_file(tensors, path)
    return path


def bench(title: str, path: Path) -> list[str]:
    """Lines with ratios: read, decompose and truncate every layer, ours against QR and SVD per layer."""
    into_memory([path])
    with open_adapter(path) as adapter:
        shapes = {layer.name: layer.shape for layer in adapter}
        kept = dict.fromkeys(shapes, KEPT)
        largest = max(adapter, key=lambda layer: math.prod(layer.shape))
        full = svd_time(largest.delta)
    ours = math.inf
    peers = dict.fromkeys(WAYS, math.inf)
    for _ in range(REPEATS):
        ours = min(ours, sum(shrink_in_process(path, kept)))
        for way, workers in WAYS.items():
            peers[way] = min(peers[way], seconds(partial(qr_svd.truncate_file, path, kept, workers)))
    setting = f"{cores()} cores, torch {torch.__version__}, {len(shapes)} layers r{RANK}"
    lines = [
        f"{peer / ours:.1f}x  ours {ours:.2f} s  peer {peer:.2f} s  {setting}  | {title} in process, {way}"
        for way, peer in peers.items()
    ]
    dense = full / svd_cost(largest.shape[:2]) * sum(svd_cost(shape[:2]) for shape in shapes.values())
    sides = "×".join(map(str, largest.shape))
    return [
        *lines,
        f"{dense / ours:.0f}x  full SVD of every ΔW: {dense:.0f} s, from one of {sides} ({full:.1f} s)  | {title}",
    ]


def main() -> None:
    """Print the comparison, and write it to a file if asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="write the printed text to this file too")
    options = parser.parse_args()
    lines = []
    with tempfile.TemporaryDirectory() as folder:
        for title, listed in LISTED.items():
            lines += bench(title, make_adapter(Path(folder) / f"{listed}.safetensors", listed))
    print("\n".join(lines))
    if options.out:
        options.out.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
