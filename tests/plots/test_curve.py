"""The curve of a prepared adapter as a figure."""

import pytest

import lorashrink as ls
from lorashrink.plots.curve import size_and_choice


def test_the_curve_has_the_points_of_its_outcomes_and_the_choice(adapter):
    prepared = ls.prepare(adapter)
    curve, chosen = prepared.curve(), prepared.at("rank=2")
    (axes,) = size_and_choice(curve, chosen).axes
    line, ring = axes.lines
    expected = [(size / 1e6, error) for size, error in curve.points if error > 0]
    assert list(zip(*line.get_data(), strict=True)) == expected
    (size,), (error,) = ring.get_data()
    assert (size * 1e6, error) == pytest.approx((chosen.bytes, chosen.relative_error))
    assert len(size_and_choice(curve).axes[0].lines) == 1
