"""Distances of curves against straight lines, whose distances follow by hand, and intervals against scipy's."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.stats import bootstrap

from lorashrink.measuring.curves import Curve, quality_gap, rate_gap


def line(sizes: list[float], at_one: list[float], per_doubling: float) -> Curve:
    """A curve whose pictures have these dB at a size of 1, and so many more with each doubling."""
    return Curve.of([(size, [level + per_doubling * math.log2(size) for level in at_one]) for size in sizes])


def test_a_line_that_is_3_db_above_needs_fewer_bytes_by_that_slope() -> None:
    """6 dB for each doubling: 3 dB are half a doubling, whatever parts of the lines were measured."""
    lower, upper = line([1, 2, 5, 8], [20, 30], 6), line([3, 4, 16], [23, 33], 6)
    quality, rate = quality_gap([(lower, upper)]), rate_gap([(lower, upper)])
    assert quality is not None
    assert rate is not None
    assert quality.value == pytest.approx(3)
    assert rate.value == pytest.approx(2**-0.5, rel=1e-4)
    assert quality.low == pytest.approx(quality.high) == pytest.approx(3)  # in every resample, too


def test_lines_of_unequal_slopes_differ_by_the_mean_over_their_overlap() -> None:
    """25 + 4·x and 20 + 8·x, x = log2(size): over x from 0 to 3 the mean distance is -5 + 4·1.5 = 1."""
    first, second = line([1, 2, 8], [25, 25], 4), line([1, 4, 8], [20, 20], 8)
    quality, rate = quality_gap([(first, second)]), rate_gap([(first, second)])
    assert quality is not None
    assert quality.value == pytest.approx(1)
    # Qualities from 25 to 37: x = (q - 25) / 4 and (q - 20) / 8, at their middle of 31 dB 1.5 and 1.375.
    assert rate is not None
    assert rate.value == pytest.approx(2 ** (1.375 - 1.5), rel=1e-4)


def test_the_mean_of_pairs_is_that_of_their_distances() -> None:
    base = line([1, 2, 4], [20, 30], 6)
    gap = quality_gap([(base, line([1, 2, 4], [21, 31], 6)), (base, line([1, 2, 4], [24, 34], 6))])
    assert gap is not None
    assert gap.value == pytest.approx(2.5)
    rate = rate_gap([(base, line([1, 2, 4], [21, 31], 6)), (base, line([1, 2, 4], [24, 34], 6))])
    assert rate is not None
    assert rate.value == pytest.approx(2 ** (-2.5 / 6), rel=1e-4)


def test_the_interval_is_that_of_scipy() -> None:
    gaps = np.random.default_rng(5).normal(2, 1.5, 40)
    levels = np.linspace(20, 30, 40)
    gap = quality_gap([(line([1, 4], list(levels), 6), line([1, 4], list(levels + gaps), 6))])
    expected = bootstrap((gaps,), np.mean, method="percentile", n_resamples=20_000).confidence_interval
    assert gap is not None
    assert gap.value == pytest.approx(gaps.mean())
    assert (gap.low, gap.high) == (pytest.approx(expected.low, abs=0.1), pytest.approx(expected.high, abs=0.1))


def test_curves_that_share_nothing_have_no_distance() -> None:
    low, high = line([1, 2], [20, 20], 6), line([4, 8], [60, 60], 6)
    assert quality_gap([(low, high)]) is None
    assert rate_gap([(low, high)]) is None
    assert quality_gap([(low, line([1], [20, 20], 6))]) is None


def test_a_quality_is_reached_between_two_sizes_or_not_at_all() -> None:
    curve = line([1, 2, 4], [26, 34], 6)
    assert curve.size_for(36) == pytest.approx(2)
    assert curve.size_for(39) == pytest.approx(2**1.5, rel=1e-3)
    assert curve.size_for(45) is None
    assert curve.worst_at(2) == pytest.approx(32)
    assert curve.slope(2) == pytest.approx(6 / math.log(2), rel=1e-3)


def test_a_fall_by_chance_counts_as_no_rise() -> None:
    curve = Curve.of([(1, [30.0]), (2, [36.0]), (4, [35.9]), (8, [41.0])])
    size = curve.size_for(40)
    assert size is not None
    assert 4 < size < 8
