"""Random files with the names and shapes of SDXL: a base in fp16 and LoRAs of all its 986 usual layers.

`sdxl_shapes.json.gz` lists the tensors of the SDXL 1.0 single file and the layers of a kohya LoRA with both text
encoders. The numbers are random, but sized and decaying as trained ones, so that recipes keep a part of the ranks.
"""

from __future__ import annotations

import gzip
import json
import math
import os
import random
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from lorashrink.bases import open_base
from lorashrink.files.header import write_order
from lorashrink.files.store import TensorInfo
from lorashrink.files.writing import SafetensorsWriter

Shape = tuple[int, ...]

_SHAPES = Path(__file__).with_name("sdxl_shapes.json.gz")
_SHRINK = 8  # what --small divides widths by
_KEPT_WIDTH = 64  # kernels, and the few channels of images and latents, are not divided
_BLOCK = 1 << 26  # random numbers that all weights of the base are cut from
_STD = (0.02, 0.03)  # of base weights
_ALPHA = 32.0
_DECAY = 0.8  # σ_i ∝ i^-decay
# ‖ΔW‖/‖W‖ of rank 64, drawn evenly in log. With the decay above, about half of σ_i is above 10^-3.55·‖W‖.
_STRENGTH = (0.0025, 0.015)
# A cache of norms is not written for a base that changed within the last two seconds.
_SETTLED_SECONDS = 2.5
_METADATA = {
    "ss_network_module": "networks.lora",
    "ss_network_alpha": f"{_ALPHA:g}",
    "ss_base_model_version": "sdxl_base_v1-0",
    "ss_v2": "False",
    "ss_output_name": "benchmark",
    "ss_training_comment": "random numbers",
}


@dataclass(frozen=True, slots=True)
class Data:
    """The files of a benchmark."""

    folder: Path
    base: Path
    loras: Mapping[int, Path]  # by rank
    layers: Mapping[str, Shape]  # name -> shape of the base weight


def shapes(*, small: bool) -> tuple[dict[str, Shape], dict[str, Shape]]:
    """(tensors of the base, weights that the layers of the LoRA change), by name."""
    stored = json.loads(gzip.decompress(_SHAPES.read_bytes()))
    base, layers = ({name: _shape(sides, small) for name, sides in stored[key].items()} for key in ("base", "layers"))
    return base, layers


def _shape(sides: Sequence[int], small: bool) -> Shape:
    return tuple(side // _SHRINK if small and side > _KEPT_WIDTH else side for side in sides)


def bytes_needed(ranks: Sequence[int], *, small: bool) -> int:
    """Bytes of all files that `make_data` writes, without headers."""
    base, layers = shapes(small=small)
    numbers = sum(map(math.prod, base.values()))
    return 2 * (numbers + sum(rank * numbers_per_rank(layers) for rank in ranks))


def numbers_per_rank(layers: Mapping[str, Shape]) -> int:
    """Σ(out + in·kh·kw) over layers."""
    return sum(shape[0] + math.prod(shape[1:]) for shape in layers.values())


def make_data(folder: Path, ranks: Sequence[int], *, small: bool) -> Data:
    """Write what is not there yet: base.safetensors, and lora-r64.safetensors and its like for each rank."""
    base_shapes, layers = shapes(small=small)
    base = folder / "base.safetensors"
    loras = {rank: folder / f"lora-r{rank}.safetensors" for rank in ranks}
    missing = [path for path in (base, *loras.values()) if not path.exists()]
    needed = bytes_needed(ranks, small=small)
    free = shutil.disk_usage(folder).free
    if missing and free < 2 * needed:
        raise SystemExit(
            f"{folder}: {free / 1e9:.1f} GB are free, {2 * needed / 1e9:.1f} GB are needed; use --data DIR"
        )
    if not base.exists():
        _write_base(base, base_shapes)
    names = _base_names(base, layers)
    for rank, path in loras.items():
        if not path.exists():
            write_lora(path, rank, layers, names)
    time.sleep(max(0.0, _SETTLED_SECONDS - (time.time() - base.stat().st_ctime)))
    return Data(folder, base, loras, layers)


def _std(name: str) -> float:
    return random.Random(name).uniform(*_STD)


def _write_base(path: Path, base_shapes: Mapping[str, Shape]) -> None:
    infos = {name: TensorInfo("F16", shape, 2 * math.prod(shape)) for name, shape in base_shapes.items()}
    largest = max(math.prod(shape) for shape in base_shapes.values())
    block = torch.randn(min(_BLOCK, 2 * largest), generator=torch.Generator().manual_seed(0)).half()
    with SafetensorsWriter(path, infos, {}) as writer:
        for name in write_order(infos):
            count = math.prod(infos[name].shape)
            start = random.Random(name).randrange(len(block) - count)
            writer.write({name: block[start : start + count] * _std(name)})
        writer.commit()


def _base_names(base: Path, layers: Mapping[str, Shape]) -> dict[str, str]:
    """Layer -> tensor of the base that it changes, as the product itself finds it."""
    with open_base(base) as opened:
        return {layer: opened.find(layer)[0].key for layer in layers}


def write_lora(path: Path, rank: int, layers: Mapping[str, Shape], names: Mapping[str, str]) -> None:
    infos: dict[str, TensorInfo] = {}
    for name, shape in layers.items():
        for role, sides in factor_shapes(shape, rank).items():
            infos[f"{name}.{role}"] = TensorInfo("F16", sides, 2 * math.prod(sides))
    generator = torch.Generator().manual_seed(rank)
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # for matrices as small as these, more only wait for each other
    with SafetensorsWriter(path, infos, {**_METADATA, "ss_network_dim": str(rank)}) as writer:
        for name, shape in layers.items():
            size = strength(name, rank) * _std(names[name]) * math.sqrt(math.prod(shape))
            up, down = factors(shape, rank, size, generator)
            alpha = torch.tensor(_ALPHA).half()
            writer.write({f"{name}.lora_up.weight": up, f"{name}.lora_down.weight": down, f"{name}.alpha": alpha})
        writer.commit()
    torch.set_num_threads(before)


def factor_shapes(shape: Shape, rank: int) -> dict[str, Shape]:
    """Shapes of the three tensors of a layer, by suffix."""
    ones = (1,) * len(shape[2:])
    return {"lora_up.weight": (shape[0], rank, *ones), "lora_down.weight": (rank, *shape[1:]), "alpha": ()}


def strength(name: str, rank: int) -> float:
    """‖ΔW‖/‖W‖ of a layer; grows with the rank, so that every rank keeps about the same share of its dimensions."""
    low, high = map(math.log, _STRENGTH)
    return math.exp(random.Random(name).uniform(low, high)) * (rank / 64) ** _DECAY


def factors(shape: Shape, rank: int, size: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """fp16 (up [out, r], down [r, in·kh·kw]) with σ_i ∝ i^-0.8 and ‖alpha/r · up · down‖_F = size, nearly.

    `down` is as PyTorch initialises it, evenly distributed; `up` has the decay, mixed by a random rotation.
    """
    out, fan_in = shape[0], math.prod(shape[1:])
    bound = 1 / math.sqrt(fan_in)
    down = (2 * torch.rand(rank, fan_in, generator=generator) - 1) * bound  # rows of length 1/√3, nearly orthogonal
    sigma = torch.arange(1, rank + 1) ** -_DECAY
    sigma *= size / sigma.norm() * math.sqrt(3) * rank / _ALPHA
    rotation = torch.linalg.qr(torch.randn(rank, rank, generator=generator)).Q
    up = torch.randn(out, rank, generator=generator) / math.sqrt(out) * sigma @ rotation
    return up.half(), down.half()


def copies(path: Path, folder: Path, count: int) -> list[Path]:
    """The same file under several names, without copying it where the disk allows that."""
    folder.mkdir(parents=True, exist_ok=True)
    places = [folder / f"{path.stem}-{number}.safetensors" for number in range(1, count + 1)]
    for target in places:
        target.unlink(missing_ok=True)
        try:
            os.link(path, target)
        except OSError:
            target.symlink_to(path.resolve())
    return places
