"""How alike two pictures are. A picture is uint8 [height, width, 3]."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from lorashrink.errors import InputError, UsageError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor

    Picture = NDArray[np.uint8]
    Compare = Callable[[Picture, Picture], float]

# Equal pictures have an infinite PSNR, which neither a mean nor JSON can hold. A single number of a picture of 96 × 96
# that is off by one gives 92 dB.
MOST_PSNR = 99.0

_WINDOW = 7  # pixels; where a picture is narrower, the largest odd number that fits

# Exponents of MS-SSIM's scales, from the finest to the coarsest, and the window that SSIM was published with.
_WEIGHTS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)

_GAUSSIAN, _SIGMA = 11, 1.5  # pixels

# Added to the quotients of MS-SSIM, which keeps them finite: the published shares of 255, squared.
_C1, _C2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2


def psnr(a: Picture, b: Picture) -> float:
    """Peak signal-to-noise ratio in dB, 10·log10(255² / mean squared difference), `MOST_PSNR` at most.

    Raises ValueError if the shapes differ.
    """
    if a.shape != b.shape:
        raise ValueError(f"pictures of {a.shape} and {b.shape}")
    difference = a.astype(float) - b
    error = float((difference * difference).mean())
    return MOST_PSNR if error == 0 else min(MOST_PSNR, 10 * math.log10(255**2 / error))


def ssim(a: Picture, b: Picture) -> float:
    """Structural similarity, 1 for equal pictures: the mean over channels and windows of 7 × 7 pixels.

    Wang et al. 2004, "Image quality assessment: from error visibility to structural similarity", as scikit-image
    computes it. Raises ValueError if the shapes differ or a side is shorter than 3.
    """
    from skimage.metrics import structural_similarity

    shortest = min(a.shape[:2])
    window = min(_WINDOW, shortest if shortest % 2 else shortest - 1)
    if window < 3:
        raise ValueError(f"a picture of {a.shape} is too small")
    return float(structural_similarity(a, b, win_size=window, channel_axis=-1, data_range=255))


def ms_ssim(a: Picture, b: Picture) -> float:
    """Multi-scale structural similarity, from 0 to 1 for equal pictures: the mean over channels.

    Wang, Simoncelli, Bovik 2003, "Multi-scale structural similarity for image quality assessment": five scales, each
    half as wide as the one before, and windows of 11 × 11 pixels. Where a side is under 176 pixels there are only the
    scales that hold a window, their weights scaled to a sum of 1. Negative terms count as 0. Raises ValueError if the
    shapes differ or a side is shorter than 11.
    """
    import torch
    from torch.nn.functional import avg_pool2d, conv2d

    if a.shape != b.shape:
        raise ValueError(f"pictures of {a.shape} and {b.shape}")
    if min(a.shape[:2]) < _GAUSSIAN:
        raise ValueError(f"a picture of {a.shape} is too small")
    count = min(len(_WEIGHTS), int(math.log2(min(a.shape[:2]) / _GAUSSIAN)) + 1)
    total = 1.0 if count == len(_WEIGHTS) else sum(_WEIGHTS[:count])  # all five published weights add up to 1
    x, y = (torch.tensor(picture, dtype=torch.float64).permute(2, 0, 1)[:, None] for picture in (a, b))  # [3, 1, h, w]
    distances = torch.arange(_GAUSSIAN, dtype=torch.float64) - _GAUSSIAN // 2
    bell = torch.exp(-(distances**2) / (2 * _SIGMA**2))
    bell /= bell.sum()

    def mean(pixels: Tensor) -> Tensor:
        return conv2d(conv2d(pixels, bell[None, None, :, None]), bell[None, None, None])

    product = torch.ones(len(x), dtype=torch.float64)
    for scale, weight in enumerate(_WEIGHTS[:count]):
        mean_x, mean_y = mean(x), mean(y)
        variance_x, variance_y = mean(x**2) - mean_x**2, mean(y**2) - mean_y**2
        covariance = mean(x * y) - mean_x * mean_y
        luminance = (2 * mean_x * mean_y + _C1) / (mean_x**2 + mean_y**2 + _C1)
        structure = (2 * covariance + _C2) / (variance_x + variance_y + _C2)  # contrast times structure
        term = luminance * structure if scale == count - 1 else structure
        product *= term.mean(dim=(1, 2, 3)).clamp(min=0) ** (weight / total)
        x, y = avg_pool2d(x, 2), avg_pool2d(y, 2)
    return float(product.mean())


# --- the table ----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Measure:
    """A number for how alike two pictures are; more is more alike."""

    name: str  # of the fields of results, and in JSON
    title: str
    unit: str  # with the space before it
    form: str  # how its numbers are printed
    compare: Compare | None = None  # None: it needs a model, see `comparisons`

    def text(self, value: float) -> str:
        """The number with its unit."""
        return f"{value:{self.form}}{self.unit}"


MEASURES = (
    Measure("psnr", "PSNR", " dB", ".1f", psnr),
    Measure("ssim", "SSIM", "", ".4f", ssim),
    Measure("ms_ssim", "MS-SSIM", "", ".4f", ms_ssim),
    Measure("clip", "CLIP", "", ".4f"),
)


def comparisons(clip: Path | None, device: str) -> dict[str, Compare]:
    """Name of a measure -> its function, for all that can be had; clip: as for `clip_similarity`."""
    compares = {measure.name: measure.compare for measure in MEASURES if measure.compare}
    return compares | ({"clip": clip_similarity(clip, device)} if clip else {})


def clip_similarity(folder: Path, device: str) -> Compare:
    """The cosine between what a CLIP model sees in two pictures: 1 for the same contents, 0 for unrelated ones.

    folder: a CLIPModel as transformers saves it, with its preprocessor_config.json. Nothing is downloaded.

    Raises:
        UsageError: there is no such folder.
        InputError: it holds no CLIP model.
    """
    if not (folder / "config.json").is_file():
        raise UsageError(
            f"--clip {folder}: no folder of a CLIP model as transformers saves it; config.json is missing."
        )
    import torch
    from transformers import CLIPImageProcessorPil, CLIPModel

    try:
        model, report = CLIPModel.from_pretrained(folder, local_files_only=True, output_loading_info=True)
        processor = CLIPImageProcessorPil.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise InputError(f"--clip {folder}: transformers cannot load it ({str(error).splitlines()[0]}).") from error
    if report["missing_keys"]:
        raise InputError(f"--clip {folder}: is no CLIP model, it lacks {sorted(report['missing_keys'])[0]}.")
    model.eval().to(device)

    def similarity(a: Picture, b: Picture) -> float:
        with torch.no_grad():
            pixels = processor(images=[a, b], return_tensors="pt")["pixel_values"].to(model.device)
            seen_in_a, seen_in_b = model.visual_projection(model.vision_model(pixel_values=pixels).pooler_output)
            return float(torch.cosine_similarity(seen_in_a, seen_in_b, dim=0))

    return similarity
