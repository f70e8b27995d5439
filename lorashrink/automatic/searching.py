"""The smallest size whose worst picture is good enough."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise
from statistics import fmean

# dB that twice the bytes gain, until two sizes have been drawn; what was measured lies between the two limits.
_GAIN, _LEAST_GAIN, _MOST_GAIN = 12.0, 4.0, 30.0

_CLOSE = 1.1  # two sizes of a smaller ratio are not told apart

_MARGIN, _ENOUGH = 0.4, 1.0  # dB above the target: what is aimed at, and what needs no further search

DRAWS = 6


def smallest_size(
    worst_at: Callable[[float], float], *, guess: float, most: float, target: float, draws: int = DRAWS
) -> float | None:
    """The smallest of the sizes tried at which `worst_at` is at least `target`, None if none is.

    worst_at: PSNR in dB of the worst picture at a size in bytes, -inf if there is no file of that size; it rises with
    the size, mostly. guess: the size that is tried first. most: no larger size is tried. The search is a bisection of
    the logarithm of the size, with steps as the pictures suggest them.
    """
    levels: dict[float, float] = {}
    low, high = 0.0, math.inf
    size = min(guess, most)
    for _ in range(draws):
        levels[size] = worst_at(size)
        if levels[size] >= target:
            high = min(high, size)
            if levels[size] <= target + _ENOUGH:
                break
        else:
            low = max(low, size)
        if low >= min(most, high / _CLOSE):
            break
        size = next_size(levels, size, low, min(high, most), target)
    return high if math.isfinite(high) else None


def next_size(levels: dict[float, float], size: float, low: float, high: float, target: float) -> float:
    """Where to look next, after `size`, between the largest size that is too small and the smallest that is not."""
    level = levels[size]
    if not math.isfinite(level):
        return math.sqrt(size * high)
    # dB for twice the bytes, between the sizes that were drawn.
    drawn = sorted((size, level) for size, level in levels.items() if math.isfinite(level))
    gains = [(upper - lower) / math.log2(large / small) for (small, lower), (large, upper) in pairwise(drawn)]
    gain = min(max(fmean(gains), _LEAST_GAIN), _MOST_GAIN) if gains else _GAIN
    step = min(max((target + _MARGIN - level) / gain, -2.0), 2.0)
    proposed = size * 2**step
    inside = low * _CLOSE < proposed < high / _CLOSE
    if inside or (high not in levels and max(proposed, low * _CLOSE) >= high):
        return proposed if inside else high
    return math.sqrt(low * high) if low else high / 2
