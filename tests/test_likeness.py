"""PSNR and SSIM against their closed forms."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis.extra.numpy import arrays

from lorashrink.likeness import MOST_PSNR, psnr, ssim

PICTURES = arrays(np.uint8, (9, 11, 3))


def plain(value: int, side: int = 16) -> np.ndarray:
    return np.full((side, side, 3), value, np.uint8)


@pytest.mark.parametrize("distance", [1, 5, 255])
def test_psnr_of_plain_pictures_is_that_of_their_distance(distance: int) -> None:
    assert psnr(plain(0), plain(distance)) == pytest.approx(20 * math.log10(255 / distance))
    assert psnr(plain(distance), plain(0)) == psnr(plain(0), plain(distance))


def test_psnr_of_one_number_is_divided_by_all() -> None:
    side = 8
    other = plain(100, side)
    other[3, 4, 1] = 110
    assert psnr(plain(100, side), other) == pytest.approx(10 * math.log10(255**2 / (100 / (3 * side**2))))


def test_ssim_of_plain_pictures_is_its_luminance_term() -> None:
    """(2·a·b + C1) / (a² + b² + C1) with C1 = (0.01 · 255)²; contrast and structure are 1 without variance."""
    c1 = (0.01 * 255) ** 2
    expected = (2 * 100 * 150 + c1) / (100**2 + 150**2 + c1)
    assert ssim(plain(100), plain(150)) == pytest.approx(expected, rel=1e-9)


def test_ssim_of_an_inverted_pattern_is_negative() -> None:
    """Equal means, equal variances v, covariance −v: (C2 − 2v) / (C2 + 2v), with C2 = (0.03 · 255)²."""
    board = np.indices((8, 8)).sum(0) % 2
    one = np.repeat((64 * board + 96)[..., None], 3, -1).astype(np.uint8)
    other = np.repeat((64 * (1 - board) + 96)[..., None], 3, -1).astype(np.uint8)
    assert ssim(one, other) < -0.9


@given(PICTURES)
def test_equal_pictures_are_as_alike_as_can_be(picture: np.ndarray) -> None:
    assert psnr(picture, picture) == MOST_PSNR
    assert ssim(picture, picture) == pytest.approx(1)


@given(PICTURES, PICTURES)
def test_both_are_symmetric_and_bounded(a: np.ndarray, b: np.ndarray) -> None:
    assert 0 <= psnr(a, b) <= MOST_PSNR
    assert psnr(a, b) == psnr(b, a)
    assert -1 - 1e-9 <= ssim(a, b) <= 1 + 1e-9
    assert ssim(a, b) == pytest.approx(ssim(b, a))


@pytest.mark.parametrize("sides", [(3, 20), (4, 4), (7, 7)])
def test_small_pictures_get_smaller_windows(sides: tuple[int, int]) -> None:
    assert ssim(np.zeros((*sides, 3), np.uint8), np.zeros((*sides, 3), np.uint8)) == pytest.approx(1)


def test_pictures_of_two_sizes_and_specks_are_refused() -> None:
    for measure in (psnr, ssim):
        with pytest.raises(ValueError, match=r"pictures of|dimensions"):
            measure(plain(0, 8), plain(0, 16))
    with pytest.raises(ValueError, match="too small"):
        ssim(plain(0, 2), plain(0, 2))
