"""How much work a study is, and what it is reckoned to take on a GPU."""

from __future__ import annotations

import math
from pathlib import Path

from lorashrink.files.header import read_header
from lorashrink.files.store import DTYPES
from lorashrink.measuring.methods import Method
from lorashrink.pictures.pipelines import check_model, own_side, weights_variant
from lorashrink.results.evidence import Reckoned, Workload

# Files of a curve whose sizes are not given: about so many lie between the qualities of interest, with both ends.
_FILES = 5

# Of GPUs: memory in GB, one that has it, and the 10^12 operations in half precision that it does in a second of such
# work, about a third of what its maker names.
_GPUS = ((12, "RTX 3060", 18.0), (16, "RTX 4060 Ti", 35.0), (24, "RTX 4090", 90.0))

# diffusers' class -> 10^12 operations of one pass through the denoiser for a picture of 2^20 pixels, and passes a step.
_OPERATIONS = {
    "StableDiffusionXLPipeline": (6.0, 2),
    "StableDiffusionPipeline": (3.0, 2),
    "StableDiffusion3Pipeline": (17.0, 2),
    "FluxPipeline": (110.0, 1),
}

# Besides the weights: bytes for each pixel, most of it the decoder's in float32, and what the libraries take.
_BYTES_PER_PIXEL, _LIBRARIES = 4500, 0.8e9

_SCALING = 40  # drawings that the factors of one scaled file take, with their gradients

_STEPS = 20  # of a picture whose prompt says nothing


def workload(
    model: Path,
    settings: Path | None,
    methods: tuple[Method, ...],
    *,
    adapters: int,
    pictures: int,
    sizes: int,
    draws: int,
    steps: int | None,
) -> Workload:
    """The work of a study, about. pictures: of each file. sizes: of each curve, 0 if they are not given."""
    files_of_curve = (sizes or _FILES) + draws
    files = adapters * len(methods) * files_of_curve
    scaled = adapters * files_of_curve * sum(method.scaled for method in methods)
    # Each curve's plain prompts, and the original adapter and none.
    drawings = (files + adapters * (len(methods) + 3)) * pictures
    side, memory = own_side(model, settings), _weights(model) + _LIBRARIES
    memory += _BYTES_PER_PIXEL * side**2
    reckoned = []
    if operations := _OPERATIONS.get(check_model(model, settings)):
        of_a_picture = math.prod(operations) * (steps or _STEPS) * side**2 / 2**20
        for gigabytes, like, speed in _GPUS:
            seconds = of_a_picture / speed
            hours = seconds * (drawings + _SCALING * scaled) / 3600
            reckoned.append(Reckoned(gigabytes, like, memory <= gigabytes * 1e9, seconds, hours))
    return Workload(adapters, len(methods), files, drawings, int(memory), tuple(reckoned))


def _weights(model: Path) -> int:
    """Bytes of a model's weights in half precision."""
    if model.is_file():
        files = [model]
    else:
        folders = [folder for folder in sorted(model.iterdir()) if folder.is_dir()]
        files = [
            file
            for folder in folders
            for file in sorted(folder.glob("*.safetensors"))
            if (".fp16" in file.name) == (weights_variant(folder, half=True) == "fp16")
        ]
    infos = [info for file in files for info in read_header(file)[0].values()]
    return sum(2 * info.nbytes // DTYPES[info.dtype][0] for info in infos)
