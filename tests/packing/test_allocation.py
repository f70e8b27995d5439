"""How many bits a dimension gets."""

from __future__ import annotations

import math

import pytest

from lorashrink.files.packed import CLASSES
from lorashrink.packing.allocation import gaussian_rates


@pytest.mark.parametrize("class_", range(4, CLASSES.stop))
def test_fine_rounding_of_gaussian_numbers_has_its_known_cost(class_: int) -> None:
    """For a small step Δ the entropy is h - log2 Δ, and the error is Δ²/12."""
    width = 2 ** (-class_ / 2)
    entropies, errors = gaussian_rates()
    entropy, error = entropies[class_ - CLASSES.start], errors[class_ - CLASSES.start]
    assert entropy == pytest.approx(0.5 * math.log2(2 * math.pi * math.e) - math.log2(width), abs=5e-3)
    assert error == pytest.approx(width**2 / 12, rel=2e-2)
