"""The method to compare with: QR of both factors, SVD of the r×r core, in float32, one layer after another.

As a command it shrinks adapters by σ / ‖W‖_F, with the norms of the base given in a JSON file:

    python qr_svd.py --norms norms.json --thr -3.55 -o out lora.safetensors...

It reads with `safe_open`, writes with `save_file`, and does nothing else: no hashes, no check, no fsync.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor


class Decomposition(NamedTuple):
    """scale · up · down = q_up · u · diag(sigma) · vh · q_downᵀ, all float32."""

    q_up: Tensor  # [out, r]
    u: Tensor  # [r, r]
    sigma: Tensor  # [r], largest first
    vh: Tensor  # [r, r]
    q_down: Tensor  # [in, r]


def decomposition(up: Tensor, down: Tensor, scale: float) -> Decomposition:
    """QR of both factors and SVD of the core of scale · up · down, with up [out, r] and down [r, in]."""
    q_up, r_up = torch.linalg.qr(up.float())
    q_down, r_down = torch.linalg.qr(down.float().mT)
    return Decomposition(q_up, *torch.linalg.svd(scale * (r_up @ r_down.mT)), q_down)


def truncated(parts: Decomposition, kept: int) -> tuple[Tensor, Tensor]:
    """(up' [out, k], down' [k, in]) of the first k dimensions, √σ on both sides."""
    root = parts.sigma[:kept].sqrt()
    return parts.q_up @ (parts.u[:, :kept] * root), (root[:, None] * parts.vh[:kept]) @ parts.q_down.mT


def layer_names(opened: Any) -> list[str]:
    """The layers of an open kohya adapter, in the order of the file."""
    return [key.removesuffix(".lora_down.weight") for key in opened.keys() if key.endswith(".lora_down.weight")]  # noqa: SIM118 - no mapping


def read_layer(opened: Any, name: str) -> tuple[Tensor, Tensor, float]:
    """(up [out, r], down [r, in·kh·kw], alpha / r) of one layer."""
    up = opened.get_tensor(f"{name}.lora_up.weight").flatten(1)
    down = opened.get_tensor(f"{name}.lora_down.weight").flatten(1)
    return up, down, float(opened.get_tensor(f"{name}.alpha")) / len(down)


@contextlib.contextmanager
def mapping(workers: int) -> Iterator[Callable[..., Iterable[Any]]]:
    """A `map` over layers: in `workers` threads on one core each, or with 0 here, with torch's own threads."""
    if not workers:
        yield map
        return
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,)) as executor:
            yield executor.map
    finally:
        torch.set_num_threads(before)


def truncate_file(path: Path, kept: Mapping[str, int], workers: int) -> None:
    """Every layer of a file to its kept rank; the results are dropped. What the benchmark times in process."""
    with safe_open(path, "pt") as opened, mapping(workers) as over:

        def work(name: str) -> None:
            truncated(decomposition(*read_layer(opened, name)), kept[name])

        for _ in over(work, layer_names(opened)):
            pass


def shrink_file(path: Path, target: Path, norms: Mapping[str, float], threshold: float, workers: int) -> None:
    """Keep the dimensions with log10(σ / ‖W‖_F) ≥ threshold; a layer without any is left out."""
    tensors: dict[str, Tensor] = {}
    with safe_open(path, "pt") as opened, mapping(workers) as over:

        def work(name: str) -> dict[str, Tensor]:
            up, down, scale = read_layer(opened, name)
            parts = decomposition(up, down, scale)
            kept = int((parts.sigma >= 10**threshold * norms[name]).sum())
            if not kept:
                return {}
            new_up, new_down = truncated(parts, kept)
            shape = opened.get_slice(f"{name}.lora_down.weight").get_shape()[1:]
            return {
                f"{name}.lora_up.weight": new_up.to(up.dtype).reshape(-1, kept, *[1] * (len(shape) - 1)).contiguous(),
                f"{name}.lora_down.weight": new_down.to(down.dtype).reshape(kept, *shape).contiguous(),
                f"{name}.alpha": torch.tensor(float(kept)),
            }

        for part in over(work, layer_names(opened)):
            tensors |= part
        metadata = opened.metadata()
    save_file(tensors, target, metadata)


def main(arguments: Sequence[str] | None = None) -> None:
    """Shrink the adapters named on the command line into a folder."""
    parser = argparse.ArgumentParser(description="Shrink LoRA files by QR and SVD in float32.")
    parser.add_argument("adapters", nargs="+", type=Path)
    parser.add_argument("--norms", type=Path, required=True, help="JSON file: layer name -> ‖W‖_F")
    parser.add_argument("--thr", type=float, default=-3.55, help="lowest log10(σ / ‖W‖_F) that is kept")
    parser.add_argument("--workers", type=int, default=0, help="layers at once; 0 = one, with torch's own threads")
    parser.add_argument("-o", "--output", type=Path, required=True, help="folder")
    options = parser.parse_args(arguments)
    norms = json.loads(options.norms.read_text(encoding="utf-8"))
    os.makedirs(options.output, exist_ok=True)
    for path in options.adapters:
        shrink_file(path, options.output / path.name, norms, options.thr, options.workers)


if __name__ == "__main__":
    main()
