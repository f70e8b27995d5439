"""How many bits each dimension is worth: what is kept, how exactly, and what that does to pictures.

A dimension costs bytes and leaves an error: all of S² if it is dropped, or the noise of rounding its two vectors. At a
price per byte, exactness follows from water-filling, and a dimension is kept if it is worth its price. Numbers only.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np

from lorashrink.files.packed import CLASSES

if TYPE_CHECKING:
    from collections.abc import Callable

    Values = np.ndarray[Any, np.dtype[np.float64]]
    Indices = np.ndarray[Any, np.dtype[np.int64]]
    Flags = np.ndarray[Any, np.dtype[np.bool_]]

# How much less noise harms pictures than dropped dimensions of the same size, which act together.
NOISE_WEIGHT = 0.1

_SIDE_BYTES = 2.0  # of the index, per dimension

# Bisection of the price begins this far below the largest, in powers of e, and ends within a part in 10⁶.
_LOWEST, _ROUNDS = 60, 26


@dataclass(frozen=True, eq=False, slots=True)
class Dimensions:
    """All dimensions of a file, layer after layer, best first within each."""

    squares: Values  # [d] S²: what dropping it adds to the error
    counts: Values  # [d, 2] numbers in its two vectors
    spread: Values  # [d, 2] error of noise in each vector, by that of noise along the vector itself
    needed: Flags  # [d] whether it stays in any case
    rest: float = 0.0  # S² of what cannot be kept at all

    @property
    def total(self) -> float:
        """ΣS² of the file."""
        return float(self.squares.sum()) + self.rest


@dataclass(frozen=True, eq=False, slots=True)
class Allocation:
    """What is kept, and how exactly."""

    kept: Flags  # [d]
    classes: Indices  # [d, 2] class of each vector, also of dropped dimensions
    nbytes: float  # about, of the code and the dimensions' part of the index
    dropped: float  # T: S² that is dropped, as part of the total
    noise: float  # N: noise of what is kept, as part of the total


@cache
def gaussian_rates() -> tuple[Values, Values]:
    """[classes] each: entropy in bits, and squared error in units of the variance, of a rounded Gaussian number."""
    entropies, errors = [], []
    for class_ in CLASSES:
        width = 2.0 ** (-class_ / 2)
        edges = (np.arange(math.ceil(8 / width) + 2) - 0.5) * width
        edges = np.concatenate([-edges[:0:-1], edges[1:]])
        weights = np.diff([math.erf(edge / math.sqrt(2)) / 2 for edge in edges])
        weights = weights[weights > 0]
        entropies.append(float(-(weights * np.log2(weights)).sum()))
        # E(x - q)² by the density at 64 points of each interval
        points = np.linspace(-8, 8, 1 << 15)
        density = np.exp(-(points**2) / 2)
        errors.append(float((density * (points - np.round(points / width) * width) ** 2).sum() / density.sum()))
    return np.array(entropies), np.array(errors)


def allocate(dimensions: Dimensions, price: float) -> Allocation:
    """The best choice at a price, in error per byte."""
    entropies, errors = gaussian_rates()
    squares = dimensions.squares[:, None]
    level = price / (8 * 2 * math.log(2) * NOISE_WEIGHT)
    with np.errstate(divide="ignore"):
        noise = level * dimensions.counts / (dimensions.spread * squares)
        classes = np.clip(np.round(-np.log2(12 * noise)), CLASSES.start, CLASSES.stop - 1).astype(np.int64)
    index = classes - CLASSES.start
    nbytes = (dimensions.counts * entropies[index]).sum(1) / 8 + _SIDE_BYTES
    harm = (squares * dimensions.spread * errors[index]).sum(1)
    kept = (price * nbytes + NOISE_WEIGHT * harm < dimensions.squares) | dimensions.needed
    total = dimensions.total or 1.0
    return Allocation(
        kept=kept,
        classes=classes,
        nbytes=float(nbytes[kept].sum()),
        dropped=(float(dimensions.squares[~kept].sum()) + dimensions.rest) / total,
        noise=float(harm[kept].sum()) / total,
    )


def cheapest(dimensions: Dimensions, enough: Callable[[Allocation], bool]) -> Allocation:
    """The smallest allocation that is good enough, where a lower price never is worse; the best if none is."""
    low, _ = _bisected(dimensions, lambda choice: not enough(choice))
    return allocate(dimensions, low)


def largest_within(dimensions: Dimensions, nbytes: float) -> Allocation:
    """The best allocation of no more than so many bytes, but with one dimension at least."""
    _, high = _bisected(dimensions, lambda choice: choice.nbytes <= nbytes)
    choice = allocate(dimensions, high)
    if not choice.kept.any() and len(dimensions.squares):
        choice.kept[dimensions.squares.argmax()] = True
    return choice


def _bisected(dimensions: Dimensions, low_enough: Callable[[Allocation], bool]) -> tuple[float, float]:
    """Two neighbouring prices: at the upper one an allocation is `low_enough`, at the lower one it is not."""
    high = math.log(float((dimensions.squares / dimensions.counts.sum(1)).max(initial=0.0)) * 8 or 1.0)
    low = high - _LOWEST
    for _ in range(_ROUNDS):
        middle = (low + high) / 2
        low, high = (low, middle) if low_enough(allocate(dimensions, math.exp(middle))) else (middle, high)
    return math.exp(low), math.exp(high)


# --- what it does to pictures -------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Prediction:
    """PSNR ≈ level − slope · log10(unit · (T + weight · N)), T and N as parts of the adapter's whole effect."""

    level: float  # dB
    slope: float
    weight: float = 0.08
    unit: float = 1.0

    def psnr(self, allocation: Allocation) -> float:
        """About how near pictures are to those of the original adapter, in dB."""
        error = self.unit * (allocation.dropped + self.weight * allocation.noise)
        return self.level - self.slope * math.log10(max(error, 1e-30))


# Fitted to pictures of the example model by benchmarks/shapes/packed.py. What decides -> the prediction. Statistics
# predict better by the change of a pixel than by the part of the adapter's effect, where they know pixels.
_PREDICTIONS = {
    "calibration": Prediction(7.5, 9.0),
    "base": Prediction(19.6, 8.2),
    "weights": Prediction(18.9, 8.7),
}
_BY_PIXELS = Prediction(-17.1, 8.8)


def prediction_for(decided_by: str, total: float, pixels: float | None) -> Prediction:
    """total: ΣS² of the file. pixels: of the pictures that statistics were gathered with, None if that is not known."""
    if decided_by == "calibration" and pixels:
        return replace(_BY_PIXELS, unit=total / pixels)
    return _PREDICTIONS[decided_by]
