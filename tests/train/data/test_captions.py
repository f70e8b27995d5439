"""Caption files and every rule by which a showing varies them."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorashrink.errors import InputError
from lorashrink.train.data.captions import draw_caption, read_caption, tag_counts, varies
from lorashrink.train.flags.options import Options


def shown(caption: str, rules: Options, seed: int = 0, *, epoch: int = 1) -> str:
    return draw_caption(caption, rules, Random(seed), epoch=epoch)


def write(tmp_path: Path, content: bytes, name: str = "cat.caption") -> Path:
    (tmp_path / name).write_bytes(content)
    return tmp_path / "cat.png"


# --- reading


def test_lines_are_stripped_and_blank_ones_after_the_first_vanish(tmp_path: Path) -> None:
    assert read_caption(write(tmp_path, b"  a cat, sitting \r\n\n second line\n"), Options()) == [
        "a cat, sitting",
        "second line",
    ]


def test_the_extension_says_which_file_is_read(tmp_path: Path) -> None:
    write(tmp_path, b"of caption")
    picture = write(tmp_path, b"of txt", "cat.txt")
    assert read_caption(picture, Options(caption_extension=".txt")) == ["of txt"]
    assert read_caption(picture, Options(caption_extension=".tags.txt")) is None


def test_a_name_with_dots_loses_its_last_ending_only(tmp_path: Path) -> None:
    (tmp_path / "cat.v2.caption").write_text("a cat")
    assert read_caption(tmp_path / "cat.v2.png", Options()) == ["a cat"]


def test_letters_beyond_ascii_and_a_byte_order_mark_are_understood(tmp_path: Path) -> None:
    assert read_caption(write(tmp_path, "\ufeffein Kätzchen, 猫".encode()), Options()) == ["ein Kätzchen, 猫"]


def test_a_blank_line_is_an_empty_caption(tmp_path: Path) -> None:
    assert read_caption(write(tmp_path, b" \n"), Options()) == [""]


@pytest.mark.parametrize("content", [b"", "\ufeff".encode()])
def test_an_empty_file_is_an_error_that_names_it(tmp_path: Path, content: bytes) -> None:
    with pytest.raises(InputError, match=r"cat\.caption is empty"):
        read_caption(write(tmp_path, content), Options())


def test_other_encodings_are_an_error_that_names_the_file(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"cat\.caption is no UTF-8 text"):
        read_caption(write(tmp_path, "Kätzchen".encode("latin-1")), Options())


# --- which captions vary


@pytest.mark.parametrize(
    ("rules", "fixed"),
    [
        (Options(), True),
        (
            Options(
                caption_prefix="a",
                caption_suffix="b",
                keep_tokens=2,
                keep_tokens_separator="|||",
                secondary_separator=";",
            ),
            True,
        ),
        (Options(shuffle_caption=True), False),
        (Options(caption_dropout_rate=0.1), False),
        (Options(caption_dropout_every_n_epochs=2), False),
        (Options(caption_tag_dropout_rate=0.1), False),
    ],
)
def test_fixed_rules_are_those_without_chance_and_time(rules: Options, fixed: bool) -> None:
    assert varies(rules) is not fixed


def test_without_varying_rules_a_caption_is_shown_as_written() -> None:
    rules = Options(keep_tokens=1, keep_tokens_separator="|||")
    assert shown("a ,b||| c,,  {d|e}, ", rules) == "a ,b||| c,,  {d|e}, "


def test_prefix_and_suffix_are_joined_with_a_blank() -> None:
    assert shown("a cat", Options(caption_prefix="photo of", caption_suffix=", best")) == "photo of a cat , best"
    assert shown("", Options(caption_prefix="photo of")) == "photo of"


# --- shuffling

TAGS = st.lists(st.text("abcde ", max_size=4), min_size=1, max_size=9)


@given(tags=TAGS, kept=st.integers(0, 12), seed=st.integers(0, 999))
def test_shuffling_keeps_the_first_tags_in_place_and_loses_none(tags: list[str], kept: int, seed: int) -> None:
    rules = Options(shuffle_caption=True, keep_tokens=kept)
    captions = shown(",".join(tags), rules, seed).split(", ")
    stripped = [tag.strip() for tag in tags]
    assert captions[:kept] == stripped[:kept]
    assert Counter(captions) == Counter(stripped)


def test_shuffling_reaches_every_order() -> None:
    orders = {shown("a, b, c", Options(shuffle_caption=True), seed) for seed in range(60)}
    assert orders == {"a, b, c", "a, c, b", "b, a, c", "b, c, a", "c, a, b", "c, b, a"}


def test_the_same_generator_draws_the_same_caption() -> None:
    rules = Options(shuffle_caption=True, caption_tag_dropout_rate=0.3, caption_dropout_rate=0.2)
    captions = [shown("a, b, c, d, e", rules, seed) for seed in range(30)]
    assert captions == [shown("a, b, c, d, e", rules, seed) for seed in range(30)]
    assert len(set(captions)) > 10


@pytest.mark.parametrize(
    ("separator", "caption", "expected"),
    [
        (";", "a, b;c", "a, b; c"),
        (" | ", "a | b, c | d", "a | b, c | d"),
        (" ", "a b c", "a b c"),
        (",", "a,b", "a, b"),
    ],
)
def test_the_separator_splits_and_joins_tags(separator: str, caption: str, expected: str) -> None:
    assert shown(caption, Options(shuffle_caption=True, caption_separator=separator, keep_tokens=9)) == expected


def test_the_part_before_the_mark_stays_whatever_keep_tokens_says() -> None:
    rules = Options(shuffle_caption=True, keep_tokens=1, keep_tokens_separator="|||")
    captions = {shown("x, y, z ||| a, b", rules, seed) for seed in range(20)}
    assert captions == {"x, y, z, a, b", "x, y, z, b, a"}


def test_the_part_after_a_second_mark_stays_at_the_end() -> None:
    rules = Options(shuffle_caption=True, keep_tokens_separator="|||")
    captions = {shown("x, y ||| a, , b, ||| end, last,", rules, seed) for seed in range(20)}
    assert captions == {"x, y, a, b, end, last", "x, y, b, a, end, last"}


def test_without_the_mark_the_number_of_kept_tags_counts() -> None:
    rules = Options(shuffle_caption=True, keep_tokens=1, keep_tokens_separator="|||")
    assert {shown("x, a, b", rules, seed) for seed in range(20)} == {"x, a, b", "x, b, a"}


def test_tags_behind_the_secondary_separator_stay_together() -> None:
    rules = Options(shuffle_caption=True, secondary_separator=";;;")
    captions = {shown("sky;;;cloud;;;day, cat", rules, seed) for seed in range(20)}
    assert captions == {"sky,cloud,day, cat", "cat, sky,cloud,day"}


def test_the_secondary_separator_is_replaced_without_shuffling_too() -> None:
    assert shown("a;;;b, c", Options(secondary_separator=";;;")) == "a,b, c"


# --- leaving out


def test_a_share_of_captions_is_dropped_whole() -> None:
    rules = Options(caption_dropout_rate=0.25, caption_prefix="p", caption_suffix="s")
    captions = Counter(shown("a, b", rules, seed) for seed in range(2000))
    assert set(captions) == {"", "p a, b s"}
    assert captions[""] == pytest.approx(500, abs=80)  # four standard deviations of a binomial distribution


def test_rates_of_one_and_zero_drop_all_and_nothing() -> None:
    assert {shown("a", Options(caption_dropout_rate=1.0), seed) for seed in range(50)} == {""}
    assert {shown("a", Options(caption_dropout_rate=0.0), seed) for seed in range(50)} == {"a"}
    assert {shown("a, b, c", Options(caption_tag_dropout_rate=1.0, keep_tokens=1), seed) for seed in range(50)} == {"a"}


def test_every_nth_epoch_has_no_captions() -> None:
    rules = Options(caption_dropout_every_n_epochs=3)
    assert [epoch for epoch in range(1, 10) if shown("a", rules, epoch=epoch) == ""] == [3, 6, 9]


def test_a_share_of_tags_is_dropped_but_none_that_stay_in_place() -> None:
    rules = Options(caption_tag_dropout_rate=0.25, keep_tokens_separator="|||")
    captions = [shown("x, y ||| a, b, c, d ||| z", rules, seed).split(", ") for seed in range(1000)]
    assert all(tags[:2] == ["x", "y"] and tags[-1] == "z" for tags in captions)
    assert all(tags[2:-1] == sorted(tags[2:-1]) for tags in captions)  # without shuffling the order stays
    remaining = sum(len(tags) - 3 for tags in captions)
    assert remaining == pytest.approx(3000, abs=110)  # four standard deviations of a binomial distribution


# --- counting


def test_tags_are_counted_in_lower_case_between_commas() -> None:
    counts = tag_counts(["Cat, sitting", "cat ,, a dog,", "", "a;b, CAT"], Options())
    assert counts == {"cat": 3, "sitting": 1, "a dog": 1, "a;b": 1}
    assert list(counts) == ["cat", "sitting", "a dog", "a;b"]


def test_the_mark_is_in_no_tag_and_the_separator_splits_them() -> None:
    rules = Options(keep_tokens_separator="|||", caption_separator=";")
    assert tag_counts(["x; y ||| a, b; c", "x|||c"], rules) == {"x": 2, "y": 1, "a, b": 1, "c": 2}
