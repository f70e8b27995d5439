"""Curves of quality over size, and how far apart two of them are.

Bjøntegaard's differences (VCEG-M33, 2001) are mean distances of two curves over what they share: in quality at equal
logarithms of the size, and in the logarithm of the size at equal quality. Between its points a curve is Fritsch and
Carlson's monotone cubic.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.interpolate import PchipInterpolator

Values = np.ndarray[Any, np.dtype[np.float64]]

_LEAST_RISE = 1e-6  # dB between neighbouring points, so that a curve can be read from both sides

_RESAMPLES, _LIMITS = 500, (2.5, 97.5)  # percent


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

    def distances(pair: tuple[Curve, Curve], means: tuple[Values, Values]) -> Values:
        return _mean_distances([np.log(curve.sizes) for curve in pair], means)  # dB over the logarithm of the size

    return _gap(pairs, distances)


def rate_gap(pairs: Sequence[tuple[Curve, Curve]]) -> Gap | None:
    """The size of the second curve as a share of the first one's at equal quality, the geometric mean of the pairs.

    As `quality_gap`; None if no pair has qualities in common.
    """

    def distances(pair: tuple[Curve, Curve], means: tuple[Values, Values]) -> Values:
        sizes = [np.log(curve.sizes)[:, None] for curve in pair]
        samples = zip(*(values.T for values in means), strict=True)
        return np.concatenate([_mean_distances([_rising(values) for values in sample], sizes) for sample in samples])

    gap = _gap(pairs, distances)
    return gap and Gap(*(float(np.exp(value)) for value in (gap.value, gap.low, gap.high)))


# A pair, and mean qualities [points, samples] of both curves -> [samples] distances, NaN where nothing is shared.
_Distances = Callable[[tuple[Curve, Curve], tuple[Values, Values]], Values]


def _gap(pairs: Sequence[tuple[Curve, Curve]], distances: _Distances) -> Gap | None:
    generator = np.random.default_rng(0)
    values, sampled = [], []
    for pair in pairs:
        value = distances(pair, (pair[0].means[:, None], pair[1].means[:, None]))[0]
        if np.isnan(value):
            continue
        values.append(value)
        count = pair[0].values.shape[1]
        pictures = generator.integers(count, size=(_RESAMPLES, count))
        sampled.append(distances(pair, (_means_of(pair[0], pictures), _means_of(pair[1], pictures))))
    if not values:
        return None
    # A few resamples may share nothing, where the curves hardly do.
    samples = np.array(sampled)
    shared = ~np.isnan(samples)
    met = shared.any(0)
    means = np.where(shared, samples, 0).sum(0)[met] / shared.sum(0)[met]
    low, high = np.percentile(means, _LIMITS)
    return Gap(float(np.mean(values)), float(low), float(high))


def _means_of(curve: Curve, pictures: Any) -> Values:
    result: Values = curve.values[:, pictures].mean(-1)
    return result


def _mean_distances(x: Sequence[Values], y: Sequence[Values]) -> Values:
    """[samples]: by how much the second of two curves is above the first, over the part of x [points] that they share.

    y: [points, samples] of both curves.
    """
    nothing = np.full(y[0].shape[1], np.nan)
    if min(map(len, x)) < 2:
        return nothing
    low, high = max(values[0] for values in x), min(values[-1] for values in x)
    if high <= low:
        return nothing
    first, second = (PchipInterpolator(*curve).integrate(low, high) / (high - low) for curve in zip(x, y, strict=True))
    result: Values = second - first
    return result


def _rising(values: Values) -> Values:
    """The values with no fall in them: chance makes larger files a little worse at times."""
    steps = np.arange(len(values)) * _LEAST_RISE
    result: Values = np.maximum.accumulate(values - steps) + steps
    return result
