"""How alike two pictures are. A picture is uint8 [height, width, 3]."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

# Equal pictures have an infinite PSNR, which neither a mean nor JSON can hold. A single number of a picture of 96 × 96
# that is off by one gives 92 dB.
MOST_PSNR = 99.0
_WINDOW = 7  # pixels; where a picture is narrower, the largest odd number that fits


def psnr(a: NDArray[np.uint8], b: NDArray[np.uint8]) -> float:
    """Peak signal-to-noise ratio in dB, 10·log10(255² / mean squared difference), `MOST_PSNR` at most.

    Raises ValueError if the shapes differ.
    """
    import numpy as np

    if a.shape != b.shape:
        raise ValueError(f"pictures of {a.shape} and {b.shape}")
    error = float(np.mean((a.astype(np.float64) - b.astype(np.float64)) ** 2))
    return MOST_PSNR if error == 0 else min(MOST_PSNR, 10 * math.log10(255**2 / error))


def ssim(a: NDArray[np.uint8], b: NDArray[np.uint8]) -> float:
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
