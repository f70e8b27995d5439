"""The search for the smallest size whose worst picture is good enough, on curves whose answer is known."""

from __future__ import annotations

import math

import hypothesis.strategies as st
import pytest
from hypothesis import given

from lorashrink.automatic.searching import DRAWS, smallest_size


def curve(answer: float, target: float, gain: float) -> tuple[list[float], object]:
    tried: list[float] = []

    def worst_at(size: float) -> float:
        tried.append(size)
        return target + gain * math.log2(size / answer)

    return tried, worst_at


@given(
    share=st.floats(0.05, 0.85),
    guess=st.floats(0.05, 1.0),
    gain=st.floats(6, 20),
    target=st.floats(20, 50),
)
def test_the_answer_is_accepted_and_close_to_the_smallest(
    share: float, guess: float, gain: float, target: float
) -> None:
    tried, worst_at = curve(share * 1e6, target, gain)
    size = smallest_size(worst_at, guess=guess * 1e6, most=0.9e6, target=target)
    assert size is not None
    assert worst_at(size) >= target - 1e-9
    assert size <= share * 1e6 * 1.25
    assert len(tried) <= DRAWS + 1
    assert max(tried) <= 0.9e6


def test_nothing_is_found_where_no_size_is_good_enough() -> None:
    tried, worst_at = curve(2e6, 40, 10)
    assert smallest_size(worst_at, guess=3e5, most=0.9e6, target=40) is None
    assert max(tried) == 0.9e6


def test_sizes_that_no_file_can_have_are_too_small() -> None:
    def worst_at(size: float) -> float:
        return -math.inf if size < 3e5 else 30 + 10 * math.log2(size / 4e5)

    size = smallest_size(worst_at, guess=1e5, most=0.9e6, target=33)
    assert size == pytest.approx(4e5 * 2**0.3, rel=0.25)
    assert worst_at(size) >= 33
