"""Numbers as text."""

from __future__ import annotations

import pytest

from lorashrink.text import (
    bare_percent_text,
    bytes_in,
    count_text,
    decibel_text,
    names_text,
    number_text,
    percent_text,
    share_text,
    size_text,
    span_text,
)


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0.0 kB"), (999_949, "999.9 kB"), (3_740_000, "3.7 MB"), (6_938_000_000, "6.94 GB")]
)
def test_sizes_are_in_decimal_units(count: float, text: str) -> None:
    assert size_text(count) == text


@pytest.mark.parametrize(
    ("text", "count"),
    [("300MB", 300e6), ("0.4 MiB", 0.4 * 2**20), ("0.4", 0.4 * 2**20), ("1.5gb", 1.5e9), ("12kB", 12e3), ("7B", 7)],
)
def test_sizes_are_read_with_units_and_bare_numbers_are_mebibytes(text: str, count: float) -> None:
    assert bytes_in(text) == pytest.approx(count)


@pytest.mark.parametrize("text", ["MB", "3 TB", "1,5MB", "3MB2"])
def test_texts_that_are_no_sizes_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match=text):
        bytes_in(text)


def test_shares_have_two_decimals() -> None:
    assert [share_text(share) for share in (0.0, 0.96551, 1.0, None)] == ["0.00%", "96.55%", "100.00%", "-"]


def test_differences_have_three_digits() -> None:
    texts = [percent_text(share) for share in (0.0, 5e-7, 0.000312, 0.12345)]
    assert texts == ["0 %", "< 0.0001 %", "0.0312 %", "12.3 %"]


def test_percentages_without_a_unit_have_two_digits() -> None:
    assert [bare_percent_text(percent) for percent in (0.0, 0.0312, 9.94, 12.3)] == ["0", "0.031", "9.9", "12"]


def test_ranges_of_equal_numbers_are_one_number() -> None:
    assert [span_text(numbers) for numbers in ([], [4, 4.0], [8, 4.5])] == ["-", "4", "4.5 to 8"]


def test_counts_have_plurals() -> None:
    assert [count_text(count, "file") for count in (0, 1, 3)] == ["0 files", "1 file", "3 files"]


def test_numbers_may_be_missing() -> None:
    assert [number_text(1.23456), number_text(None), number_text(8, "d")] == ["1.235", "-", "8"]
    assert decibel_text(31.249) == "31.2 dB"


def test_of_many_names_the_first_are_shown() -> None:
    assert [names_text(["a"] * count) for count in (0, 1, 3)] == ["", "a", "a, a, a"]
    assert [names_text("abcd", most) for most in (3, None)] == ["a, b, c and 1 more", "a, b, c, d"]
