"""Caption files and every rule by which a showing varies them."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorashrink.errors import InputError
from lorashrink.train.data.captions import CaptionRules, draw, read_caption, tag_counts


def shown(
    caption: str | tuple[str, ...],
    rules: CaptionRules,
    seed: int = 0,
    *,
    epoch: int = 1,
    step: int = 0,
    total_steps: int = 100,
) -> str:
    lines = (caption,) if isinstance(caption, str) else caption
    return draw(lines, rules, Random(seed), epoch=epoch, step=step, total_steps=total_steps)


def write(tmp_path: Path, content: bytes, name: str = "cat.caption") -> Path:
    (tmp_path / name).write_bytes(content)
    return tmp_path / "cat.png"


# --- reading


def test_only_the_first_line_is_read_and_stripped(tmp_path: Path) -> None:
    assert read_caption(write(tmp_path, b"  a cat, sitting \r\nsecond line\n"), CaptionRules()) == ("a cat, sitting",)


def test_with_wildcards_all_lines_are_read_but_blank_ones(tmp_path: Path) -> None:
    picture = write(tmp_path, b" a cat \n\n  \na dog\r\n")
    assert read_caption(picture, CaptionRules(wildcard=True)) == ("a cat", "a dog")


def test_the_extension_says_which_file_is_read(tmp_path: Path) -> None:
    write(tmp_path, b"of caption")
    picture = write(tmp_path, b"of txt", "cat.txt")
    assert read_caption(picture, CaptionRules(extension=".txt")) == ("of txt",)
    assert read_caption(picture, CaptionRules(extension=".tags.txt")) is None


def test_a_name_with_dots_loses_its_last_ending_only(tmp_path: Path) -> None:
    (tmp_path / "cat.v2.caption").write_text("a cat")
    assert read_caption(tmp_path / "cat.v2.png", CaptionRules()) == ("a cat",)


def test_letters_beyond_ascii_and_a_byte_order_mark_are_understood(tmp_path: Path) -> None:
    assert read_caption(write(tmp_path, "\ufeffein Kätzchen, 猫".encode()), CaptionRules()) == ("ein Kätzchen, 猫",)


@pytest.mark.parametrize("wildcard", [False, True])
def test_a_blank_line_is_an_empty_caption(tmp_path: Path, wildcard: bool) -> None:
    assert read_caption(write(tmp_path, b" \n"), CaptionRules(wildcard=wildcard)) == ("",)


@pytest.mark.parametrize("content", [b"", "\ufeff".encode()])
def test_an_empty_file_is_an_error_that_names_it(tmp_path: Path, content: bytes) -> None:
    with pytest.raises(InputError, match=r"cat\.caption is empty"):
        read_caption(write(tmp_path, content), CaptionRules())


def test_other_encodings_are_an_error_that_names_the_file(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"cat\.caption is no UTF-8 text"):
        read_caption(write(tmp_path, "Kätzchen".encode("latin-1")), CaptionRules())


# --- which captions vary


@pytest.mark.parametrize(
    ("rules", "fixed"),
    [
        (CaptionRules(), True),
        (
            CaptionRules(prefix="a", suffix="b", keep_tokens=2, keep_tokens_separator="|||", secondary_separator=";"),
            True,
        ),
        (CaptionRules(token_warmup_min=3), True),
        (CaptionRules(shuffle=True), False),
        (CaptionRules(wildcard=True), False),
        (CaptionRules(dropout_rate=0.1), False),
        (CaptionRules(dropout_every_n_epochs=2), False),
        (CaptionRules(tag_dropout_rate=0.1), False),
        (CaptionRules(token_warmup_step=0.5), False),
    ],
)
def test_fixed_rules_are_those_without_chance_and_time(rules: CaptionRules, fixed: bool) -> None:
    assert rules.fixed is fixed


def test_without_varying_rules_a_caption_is_shown_as_written() -> None:
    rules = CaptionRules(keep_tokens=1, keep_tokens_separator="|||")
    assert shown("a ,b||| c,,  {d|e}, ", rules) == "a ,b||| c,,  {d|e}, "


def test_prefix_and_suffix_are_joined_with_a_blank() -> None:
    assert shown("a cat", CaptionRules(prefix="photo of", suffix=", best")) == "photo of a cat , best"
    assert shown("", CaptionRules(prefix="photo of")) == "photo of"


# --- shuffling

TAGS = st.lists(st.text("abcde ", max_size=4), min_size=1, max_size=9)


@given(tags=TAGS, kept=st.integers(0, 12), seed=st.integers(0, 999))
def test_shuffling_keeps_the_first_tags_in_place_and_loses_none(tags: list[str], kept: int, seed: int) -> None:
    rules = CaptionRules(shuffle=True, keep_tokens=kept)
    made = shown(",".join(tags), rules, seed).split(", ")
    stripped = [tag.strip() for tag in tags]
    assert made[:kept] == stripped[:kept]
    assert Counter(made) == Counter(stripped)


def test_shuffling_reaches_every_order() -> None:
    orders = {shown("a, b, c", CaptionRules(shuffle=True), seed) for seed in range(60)}
    assert orders == {"a, b, c", "a, c, b", "b, a, c", "b, c, a", "c, a, b", "c, b, a"}


def test_the_same_generator_draws_the_same_caption() -> None:
    rules = CaptionRules(shuffle=True, tag_dropout_rate=0.3, wildcard=True, dropout_rate=0.2)
    captions = [shown(("a, b, {c|d}, e", "f, g"), rules, seed) for seed in range(30)]
    assert captions == [shown(("a, b, {c|d}, e", "f, g"), rules, seed) for seed in range(30)]
    assert len(set(captions)) > 10


def test_the_separator_splits_but_tags_are_joined_with_a_comma() -> None:
    assert shown("a, b;c", CaptionRules(shuffle=True, separator=";", keep_tokens=2)) == "a, b, c"


def test_the_part_before_the_mark_stays_and_the_number_of_kept_tags_is_ignored() -> None:
    rules = CaptionRules(shuffle=True, keep_tokens=1, keep_tokens_separator="|||")
    made = {shown("x, y, z ||| a, b", rules, seed) for seed in range(20)}
    assert made == {"x, y, z, a, b", "x, y, z, b, a"}


def test_the_part_after_a_second_mark_stays_at_the_end() -> None:
    rules = CaptionRules(shuffle=True, keep_tokens_separator="|||")
    made = {shown("x, y ||| a, , b, ||| end, last,", rules, seed) for seed in range(20)}
    assert made == {"x, y, a, b, end, last", "x, y, b, a, end, last"}


def test_without_the_mark_the_number_of_kept_tags_counts() -> None:
    rules = CaptionRules(shuffle=True, keep_tokens=1, keep_tokens_separator="|||")
    assert {shown("x, a, b", rules, seed) for seed in range(20)} == {"x, a, b", "x, b, a"}


def test_tags_behind_the_secondary_separator_stay_together() -> None:
    rules = CaptionRules(shuffle=True, secondary_separator=";;;")
    made = {shown("sky;;;cloud;;;day, cat", rules, seed) for seed in range(20)}
    assert made == {"sky,cloud,day, cat", "cat, sky,cloud,day"}


def test_the_secondary_separator_is_replaced_without_shuffling_too() -> None:
    assert shown("a;;;b, c", CaptionRules(secondary_separator=";;;")) == "a,b, c"


# --- wildcards


def test_a_wildcard_becomes_each_of_its_choices() -> None:
    made = {shown("{red|dark blue|} hair, {a}", CaptionRules(wildcard=True), seed) for seed in range(60)}
    assert made == {"red hair, a", "dark blue hair, a", " hair, a"}


def test_wildcards_choose_independently_and_in_prefix_and_suffix_too() -> None:
    rules = CaptionRules(wildcard=True, prefix="{a|b}", suffix="{c|d}")
    made = {shown("{x|y}", rules, seed) for seed in range(100)}
    assert made == {f"{first} {middle} {last}" for first in "ab" for middle in "xy" for last in "cd"}


def test_double_braces_are_literal_ones() -> None:
    rules = CaptionRules(wildcard=True)
    assert shown("{{a|b}}, {c}", rules) == "{a|b}, c"
    assert {shown("{a|{{b}}}", rules, seed) for seed in range(20)} == {"a", "{b}"}


def test_one_of_the_lines_is_chosen_and_gets_prefix_and_suffix() -> None:
    rules = CaptionRules(wildcard=True, prefix="see", suffix="!")
    made = {shown(("a cat", "a dog", "a bird"), rules, seed) for seed in range(60)}
    assert made == {"see a cat !", "see a dog !", "see a bird !"}


# --- leaving out


def test_a_share_of_captions_is_dropped_whole() -> None:
    rules = CaptionRules(dropout_rate=0.25, prefix="p", suffix="s")
    made = Counter(shown("a, b", rules, seed) for seed in range(2000))
    assert set(made) == {"", "p a, b s"}
    assert made[""] == pytest.approx(500, abs=80)  # four standard deviations of a binomial distribution


def test_rates_of_one_and_zero_drop_all_and_nothing() -> None:
    assert {shown("a", CaptionRules(dropout_rate=1.0), seed) for seed in range(50)} == {""}
    assert {shown("a", CaptionRules(dropout_rate=0.0), seed) for seed in range(50)} == {"a"}
    assert {shown("a, b, c", CaptionRules(tag_dropout_rate=1.0, keep_tokens=1), seed) for seed in range(50)} == {"a"}


def test_every_nth_epoch_has_no_captions() -> None:
    rules = CaptionRules(dropout_every_n_epochs=3)
    assert [epoch for epoch in range(1, 10) if shown("a", rules, epoch=epoch) == ""] == [3, 6, 9]


def test_a_share_of_tags_is_dropped_but_none_that_stay_in_place() -> None:
    rules = CaptionRules(tag_dropout_rate=0.25, keep_tokens_separator="|||")
    made = [shown("x, y ||| a, b, c, d ||| z", rules, seed).split(", ") for seed in range(1000)]
    assert all(tags[:2] == ["x", "y"] and tags[-1] == "z" for tags in made)
    assert all(tags[2:-1] == sorted(tags[2:-1]) for tags in made)  # without shuffling the order stays
    left = sum(len(tags) - 3 for tags in made)
    assert left == pytest.approx(3000, abs=110)  # four standard deviations of a binomial distribution


# --- the warm-up of tags


@pytest.mark.parametrize("length", [10.0, 0.1])
def test_the_warm_up_adds_tags_step_by_step_until_all_are_used(length: float) -> None:
    rules = CaptionRules(token_warmup_step=length, token_warmup_min=2, keep_tokens=1)
    counts = [len(shown("k, a, b, c, d, e, f", rules, step=step).split(", ")) - 1 for step in range(12)]
    # 2 + floor(step * (6 - 2) / 10), and all 6 from step 10 on
    assert counts == [2, 2, 2, 3, 3, 4, 4, 4, 5, 5, 6, 6]


def test_the_warm_up_takes_the_first_tags_before_they_are_shuffled() -> None:
    rules = CaptionRules(shuffle=True, token_warmup_step=10, token_warmup_min=2)
    assert {shown("a, b, c, d", rules, seed) for seed in range(20)} == {"a, b", "b, a"}


def test_the_warm_up_is_exact_where_fractions_of_steps_are_not() -> None:
    rules = CaptionRules(token_warmup_step=100, token_warmup_min=0)
    tags = ", ".join(map(str, range(100)))
    # 29 / 100 * 100 is less than 29 in floating point
    assert [len(shown(tags, rules, step=step).split(", ")) for step in (1, 29, 57, 58)] == [1, 29, 57, 58]


def test_a_caption_with_fewer_tags_than_the_minimum_is_shown_whole() -> None:
    assert shown("a, b", CaptionRules(token_warmup_step=10, token_warmup_min=5), step=3) == "a, b"


def test_a_warm_up_of_one_is_one_step_and_not_the_whole_training() -> None:
    rules = CaptionRules(token_warmup_step=1)
    assert [shown("a, b, c", rules, step=step) for step in (0, 1)] == ["a", "a, b, c"]


def test_a_share_of_less_than_one_step_is_no_warm_up() -> None:
    assert shown("a, b, c", CaptionRules(token_warmup_step=0.001), total_steps=100) == "a, b, c"


# --- counting


def test_tags_are_counted_in_lower_case_between_commas() -> None:
    counts = tag_counts(["Cat, sitting", "cat ,, a dog,", "", "a;b, CAT"])
    assert counts == {"cat": 3, "sitting": 1, "a dog": 1, "a;b": 1}
    assert list(counts) == ["cat", "sitting", "a dog", "a;b"]
