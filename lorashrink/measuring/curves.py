"""Curves of quality over size, and how far apart two of them are.

Bjøntegaard's differences (VCEG-M33, 2001) are mean distances of two curves over what they share: in quality at equal
logarithms of the size, and in the logarithm of the size at equal quality. Between its points a curve is Fritsch and
Carlson's monotone cubic.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.interpolate import PchipInterpolator

Values = np.ndarray[Any, np.dtype[np.float64]]

_LEAST_RISE = 1e-6  # dB between neighbouring points, so that a curve can be read from both sides

_RESAMPLES, _LIMITS = 400, (2.5, 97.5)  # percent


@dataclass(frozen=True, eq=False, slots=True)
class Curve:
    """Some sizes and how good pictures are at each of them."""

    sizes: Values  # [points] bytes, rising
    values: Values  # [points, pictures] dB

    @classmethod
    def of(cls, points: Sequence[tuple[float, Sequence[float]]]) -> Curve:
        """The curve of (bytes, dB of each picture); of equal sizes the last one counts."""
        ordered = dict(sorted(points, key=lambda point: point[0]))
        return cls(np.array(list(ordered), dtype=np.float64), np.array(list(ordered.values()), dtype=np.float64))

    @property
    def means(self) -> Values:
        """[points] dB."""
        result: Values = self.values.mean(1)
        return result

    def at(self, size: float) -> float:
        """The mean quality at a size within the curve."""
        return float(PchipInterpolator(np.log(self.sizes), self.means)(np.log(size)))

    def worst_at(self, size: float) -> float:
        """The quality of the worst picture at a size within the curve."""
        return float(PchipInterpolator(np.log(self.sizes), self.values.min(1))(np.log(size)))

    def size_for(self, quality: float) -> float | None:
        """The size at which the mean reaches a quality, None if it does so outside of what was measured."""
        rising = _rising(self.means)
        if len(rising) < 2 or not rising[0] <= quality <= rising[-1]:
            return None
        return float(np.exp(PchipInterpolator(rising, np.log(self.sizes))(quality)))

    def slope(self, size: float) -> float:
        """dB that a factor of e in size gains, near a size; at least 1."""
        low, high = np.log(self.sizes[[0, -1]])
        near = np.clip(np.log(size) + np.array([-0.2, 0.2]), low, high)
        lower, upper = PchipInterpolator(np.log(self.sizes), self.means)(near)
        return max(1.0, float((upper - lower) / (near[1] - near[0])))


@dataclass(frozen=True, slots=True)
class Gap:
    """A difference of two curves with its 95 % interval."""

    value: float
    low: float
    high: float


def quality_gap(pairs: Sequence[tuple[Curve, Curve]]) -> Gap | None:
    """By how many dB the second curve of each pair is above the first at equal sizes, in the mean of the pairs.

    Pictures are resampled within each pair, the same ones for both curves. None if no pair has sizes in common.
    """
    return _gap(pairs, mean_quality_gap)


def rate_gap(pairs: Sequence[tuple[Curve, Curve]]) -> Gap | None:
    """The size of the second curve as a share of the first one's at equal quality, the geometric mean of the pairs.

    As `quality_gap`; None if no pair has qualities in common.
    """
    gap = _gap(pairs, mean_rate_gap)
    return gap and Gap(*(float(np.exp(value)) for value in (gap.value, gap.low, gap.high)))


def mean_quality_gap(sizes: tuple[Values, Values], means: tuple[Values, Values]) -> float | None:
    """The mean distance of two curves in dB over the logarithm of the size."""
    return _mean_distance([np.log(values) for values in sizes], means)


def mean_rate_gap(sizes: tuple[Values, Values], means: tuple[Values, Values]) -> float | None:
    """The mean distance of two curves in the logarithm of the size over dB."""
    return _mean_distance([_rising(values) for values in means], [np.log(values) for values in sizes])


def _mean_distance(x: Sequence[Values], y: Sequence[Values]) -> float | None:
    if min(map(len, x)) < 2:
        return None
    low, high = max(values[0] for values in x), min(values[-1] for values in x)
    if high <= low:
        return None
    first, second = (
        float(PchipInterpolator(*points).integrate(low, high)) / (high - low) for points in zip(x, y, strict=True)
    )
    return float(second - first)


def _gap(pairs: Sequence[tuple[Curve, Curve]], distance: Any) -> Gap | None:
    shared = [pair for pair in pairs if distance(*_sizes_and_means(pair)) is not None]
    if not shared:
        return None
    value = float(np.mean([distance(*_sizes_and_means(pair)) for pair in shared]))
    generator = np.random.default_rng(0)
    sampled = []
    for _ in range(_RESAMPLES):
        distances = []
        for pair in shared:
            count = pair[0].values.shape[1]
            distances.append(distance(*_sizes_and_means(pair, generator.integers(count, size=count))))
        # A few resamples may share nothing, where the curves hardly do.
        if met := [each for each in distances if each is not None]:
            sampled.append(np.mean(met))
    low, high = np.percentile(sampled, _LIMITS)
    return Gap(value, float(low), float(high))


def _sizes_and_means(
    pair: tuple[Curve, Curve], pictures: Any = slice(None)
) -> tuple[tuple[Values, Values], tuple[Values, Values]]:
    first, second = pair
    return (first.sizes, second.sizes), (first.values[:, pictures].mean(1), second.values[:, pictures].mean(1))


def _rising(values: Values) -> Values:
    """The values with no fall in them: chance makes larger files a little worse at times."""
    steps = np.arange(len(values)) * _LEAST_RISE
    result: Values = np.maximum.accumulate(values - steps) + steps
    return result
