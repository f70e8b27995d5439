"""Recipes: grammar, scores and selections computed by hand, and properties of all spectra."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorashrink.errors import RecipeError
from lorashrink.recipes.choice import quantiles, score, select
from lorashrink.recipes.grammar import SELECTIONS, Recipe, parse_recipes
from lorashrink.recipes.terms import TERMS, LayerFacts

PARITY = json.loads((Path(__file__).parents[1] / "data" / "parity" / "expected.json").read_text())


def facts(*sigma: float, numbers: int = 100, kernel: bool = False, **options: object) -> LayerFacts:
    return LayerFacts(np.array(sigma), numbers, 2 * numbers, kernel, **options)  # type: ignore[arg-type]


def size_of(layers: Sequence[LayerFacts], fixed: int = 0):
    """The size of a file without a header, so that budgets can be computed by hand."""
    return lambda widths, threshold: (
        fixed + sum(w * layer.bytes_per_rank for w, layer in zip(widths, layers, strict=True))
    )


def kept(text: str, *layers: LayerFacts) -> list[int]:
    selection = select(Recipe.parse(text), layers, size_of(layers))
    return [len(dimensions) for dimensions in selection.kept]


# --- grammar ------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", PARITY["recipes"])
def test_the_strings_of_resize_lora_parse(text: str) -> None:
    assert Recipe.parse(text).select == "thr"


def test_spaces_bare_keys_and_several_recipes() -> None:
    assert parse_recipes([" fro_ckpt , thr = -3.5 :rank=4", "energy=.9"]) == [
        Recipe("thr", -3.5, (("fro_ckpt", 1.0),)),
        Recipe("rank", 4.0),
        Recipe("energy", 0.9),
    ]


def test_weights_are_divided_by_their_sum_and_bytes_is_not() -> None:
    recipe = Recipe.parse("fro_ckpt=3,spn_lora=1,bytes=1,size=32")
    assert recipe.normalised == {"fro_ckpt": 0.75, "spn_lora": 0.25}
    assert dict(recipe.weights)["bytes"] == 1


def test_a_recipe_names_what_must_be_looked_up() -> None:
    assert not Recipe.parse("spn_lora,thr=-1").needs_base
    assert Recipe.parse("fro_ckpt,spn_ckpt,thr=-1").base_norms == {"fro", "spn"}
    assert Recipe.parse("subspace,thr=-1").needs == {"weight"}
    assert Recipe.parse("calib,bytes,size=3").needs == {"calibration"}
    limited = Recipe.parse("rank=4,clip=0.5,fro_limit=0.1")
    assert (limited.needs_base, limited.judges_by_base, limited.base_norms) == (True, False, {"fro", "spn"})


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("fro_ckpt=1", "exactly one of"),
        ("fro_ckpt=1,thr=-3,size=4", "thr and size"),
        ("fro_kcpt=1,thr=-3", "Did you mean fro_ckpt"),
        ("banana,thr=-3", "unknown key 'banana'"),
        ("thr=abc", "thr= needs any number, not 'abc'"),
        ("thr=", "thr= needs"),
        ("thr", "thr= needs"),
        ("thr=nan", "thr= needs"),
        ("thr=-inf", "thr= needs"),
        ("size=0", "above 0"),
        ("size=-2", "above 0"),
        ("rank=0", "whole number of at least 1"),
        ("rank=2.5", "whole number"),
        ("energy=0", "above 0 and up to 1"),
        ("energy=1.01", "above 0 and up to 1"),
        ("sv_ratio=.5", "from 1"),
        ("rank=4,rank=5", "rank is given twice"),
        ("fro_ckpt=1,spn_ckpt=-1,thr=-3", "sum to 0"),
        ("fro_ckpt=0,thr=-3", "sum to 0"),
        ("calib,fro_ckpt,thr=-3", "no other score"),
        ("calib,thr=-3,clip=1", "clip limit singular values of ΔW, and calib goes by others"),
        ("thr=-3,fro_limit=0", "above 0"),
        ("quality=5", "from 10 and up to 80"),
        ("quality=90", "from 10 and up to 80"),
        ("fro_ckpt,bytes,quality=40", "goes with calib,bytes alone"),
        ("calib,quality=40", "goes with calib,bytes alone"),
        ("quality=40,clip=1", "clip limit singular values"),
        ("quality=40,size=3", "needs exactly one of"),
        ("energy=.9,conv_rank=4", "goes with rank="),
        ("rank=4,rescale=0", "rescale=0"),
        ("rank=4,min_rank=9,max_rank=8", "min_rank=9 is above max_rank=8"),
        ("energy=.9,multiple=16,max_rank=8", "multiple of 16"),
        ("fro_ckpt=1,,thr=-3", "empty"),
        ("", "empty"),
    ],
)
def test_errors_name_the_recipe_and_the_fault(text: str, says: str) -> None:
    with pytest.raises(RecipeError, match="recipe '" + "[^']*") as caught:
        Recipe.parse(text)
    assert says in str(caught.value)
    assert text in str(caught.value)


def test_quality_alone_goes_by_calibrated_dimensions_per_byte() -> None:
    recipe = Recipe.parse("quality=40")
    assert str(recipe) == "calib=1,bytes=1,quality=40"
    assert recipe == Recipe.parse("calib,bytes,quality=40")
    assert recipe.calibrated


def test_the_same_recipe_twice_is_an_error() -> None:
    with pytest.raises(RecipeError, match="twice"):
        parse_recipes(["rank=4:rank=4.0"])


numbers = st.floats(-50, 50).map(lambda x: round(x, 3)).filter(bool)
VALUES = {
    "thr": st.floats(-9, 9),
    "size": st.floats(0.001, 5000),
    "quality": st.floats(10, 80),
    "rank": st.integers(1, 512),
    "energy": st.floats(0.01, 1),
    "sv_fro": st.floats(0.01, 1),
    "sv_cumulative": st.floats(0.01, 1),
    "error": st.floats(0.01, 1),
    "sv_ratio": st.floats(1, 100),
}


@st.composite
def recipes(draw: st.DrawFn) -> str:
    key = draw(st.sampled_from(sorted(SELECTIONS)))
    items = [f"{key}={draw(VALUES[key])!r}"]
    if key == "quality":  # no other term predicts it, and no limit suits that
        return items[0]
    beside = sorted(key for key, term in TERMS.items() if not term.alone)
    terms = draw(st.dictionaries(st.sampled_from(beside), st.floats(0.125, 8), max_size=3))
    items += [f"{term}={weight!r}" for term, weight in terms.items()]
    if draw(st.booleans()):
        items.append(f"bytes={draw(st.floats(0.1, 2))!r}")
    if draw(st.booleans()):
        items.append(f"rescale={draw(numbers)!r}")
    items += draw(
        st.lists(
            st.sampled_from(["min_rank=2", "max_rank=64", "pow2", "uniform", "clip=0.5", "fro_limit=1e-3"]), unique=True
        )
    )
    return ",".join(draw(st.permutations(items)))


@given(recipes())
def test_the_canonical_text_parses_back_to_the_same_recipe(text: str) -> None:
    recipe = Recipe.parse(text)
    assert Recipe.parse(str(recipe)) == recipe
    assert str(Recipe.parse(str(recipe))) == str(recipe)


@pytest.mark.parametrize(("text", "expected"), [(text, entry["file"]) for text, entry in PARITY["recipes"].items()])
def test_file_names_are_those_of_resize_lora(text: str, expected: str) -> None:
    assert f"lora_{Recipe.parse(text).file_items()}.safetensors" == expected


@pytest.mark.parametrize(
    ("text", "items"),
    [
        ("energy=0.95", "energy0.95"),
        ("energy=0.999", "energy0.999"),
        ("fro_ckpt,thr=-3.125", "frockpt1_th-3.125"),
        ("rank=8,conv_rank=4", "convrank4_rank8"),
        ("fro_ckpt,bytes,size=32", "bytes1_frockpt1_size32"),
        ("rank=8,rescale=-0.5,uniform", "uniform1_scale-0.5_rank8"),
        ("energy=0.9,multiple=8", "multiple8_energy0.9"),
        ("energy=1,fro_limit=0.005,clip=0.25", "clip0.25_frolimit0.005_energy1"),
    ],
)
def test_file_names_tell_recipes_apart(text: str, items: str) -> None:
    assert Recipe.parse(text).file_items() == items


# --- scores -------------------------------------------------------------------------------------

LAYER = facts(8.0, 4.0, 0.0, base_fro=100.0, base_spn=20.0, base_alignment=np.array([2.0, 0.5, 0.0]))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("thr=0", [8, 4]),
        ("fro_ckpt,thr=0", [0.08, 0.04]),
        ("spn_ckpt,thr=0", [0.4, 0.2]),
        ("spn_lora,thr=0", [1, 0.5]),
        ("fro_lora,thr=0", [8 / math.sqrt(80), 4 / math.sqrt(80)]),
        ("subspace,thr=0", [4, 8]),
        ("params,thr=0", [0.08, 0.04]),
        ("fro_ckpt,bytes,thr=0", [0.08 / math.sqrt(200), 0.04 / math.sqrt(200)]),
        ("fro_ckpt=3,spn_ckpt=1,thr=0", [8 / (100**0.75 * 20**0.25), 4 / (100**0.75 * 20**0.25)]),
        ("fro_ckpt,thr=0,rescale=-.5", [0.04, 0.02]),
        ("spn_lora,thr=0,rescale=.1", [1, 0.5]),
        ("fro_lora,thr=0,rescale=.1", [8 / math.sqrt(80), 4 / math.sqrt(80)]),
    ],
)
def test_scores_by_hand(text: str, expected: list[float]) -> None:
    scores = score(Recipe.parse(text), LAYER)
    np.testing.assert_allclose(scores[:2], np.log10(expected), rtol=1e-12)
    assert scores[2] == -np.inf


def test_terms_of_the_adapter_move_with_rescale() -> None:
    """In resize_lora they do not, and nearly all ranks are lost."""
    assert kept("spn_lora,thr=-.9,rescale=.1", LAYER) == kept("spn_lora,thr=-.9", LAYER) == [2]


def test_quantiles_are_those_of_all_scores() -> None:
    layers = [facts(*np.logspace(0, -4, 101)), facts(*np.logspace(0, -4, 101), 0.0)]
    shares = quantiles(Recipe.parse("thr=-9"), layers)
    assert list(shares) == [0.01, 0.1, 0.25, 0.5, 0.75, 0.9, 0.99]
    assert shares[0.5] == pytest.approx(-2)


# --- selections ---------------------------------------------------------------------------------

SPECTRUM = (4.0, 3.0, 0.0)  # energies 16 and 9 of 25, norm ratio of the first 0.8, sums 4 and 7


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("thr=0.5", 1),
        (f"thr={math.log10(3)!r}", 2),
        ("rank=1", 1),
        ("rank=9", 2),
        ("energy=0.64", 1),
        ("energy=0.65", 2),
        ("energy=1", 2),
        ("sv_fro=0.8", 1),
        ("sv_fro=0.81", 2),
        ("sv_cumulative=0.57", 1),
        ("sv_cumulative=0.58", 2),
        ("sv_ratio=1", 0),
        ("sv_ratio=1.33", 1),
        ("sv_ratio=1.34", 2),
        ("rank=1,min_rank=2", 2),
        ("rank=1,min_rank=9", 2),
        ("rank=2,max_rank=1", 1),
        ("rank=1,multiple=2", 2),
        ("rank=1,multiple=8", 2),
    ],
)
def test_selections_by_hand(text: str, count: int) -> None:
    assert kept(text, facts(*SPECTRUM)) == [count]


def test_a_delta_of_rank_one_keeps_one_dimension() -> None:
    """sd-scripts keeps two, and fails on a single singular value."""
    for text in ("sv_fro=.9", "sv_cumulative=.9", "sv_ratio=10", "energy=.9"):
        assert kept(text, facts(5.0, 0.0, 0.0), facts(5.0)) == [1, 1]


def test_convolutions_have_their_own_rank() -> None:
    assert kept("rank=3,conv_rank=1", facts(3, 2, 1), facts(3, 2, 1, kernel=True)) == [3, 1]
    assert kept("rank=3", facts(3, 2, 1, kernel=True)) == [3]


def test_max_rank_caps_after_rounding_to_a_multiple() -> None:
    many = facts(*np.linspace(9, 1, 40))
    assert kept("rank=17,multiple=16,max_rank=24", many) == [16]
    assert kept("rank=17,multiple=16", many) == [32]


@pytest.mark.parametrize(("text", "widths"), [("thr=0,pow2", (4, 2)), ("thr=0,pow2,uniform", (4, 4))])
def test_pow2_writes_ranks_that_are_powers_of_two(text: str, widths: tuple[int, ...]) -> None:
    layers = [facts(5, 4, 3, 0.5, 0.4), facts(2, 1)]
    selection = select(Recipe.parse(text), layers, size_of(layers))
    assert selection.widths == widths
    assert [len(kept) for kept in selection.kept] == [4, 2]


def test_energy_counts_dimensions_outside_the_sketch() -> None:
    full, sketched = facts(3, 2, 1), replace(facts(3), tail=5.0)
    assert full.total == sketched.total == 14
    kept = select(Recipe.parse("energy=0.6,max_rank=1"), [full, sketched], size_of([full, sketched])).kept
    assert kept == ((0,), (0,))


@pytest.mark.parametrize(
    ("text", "limit"),
    [
        ("rank=8", 8),
        ("rank=8,conv_rank=12", 12),
        ("energy=0.9", None),
        ("energy=0.9,max_rank=10,pow2", 8),
        ("rank=9,pow2", 16),
        ("thr=0,max_rank=64,multiple=8", 64),
        ("sv_cumulative=0.5,max_rank=4", None),
    ],
)
def test_limit_is_the_largest_possible_rank(text: str, limit: int | None) -> None:
    assert Recipe.parse(text).limit == limit


def test_uniform_writes_one_rank_and_leaves_removed_layers_removed() -> None:
    layers = [facts(9, 8, 7), facts(9, 0.01, 0.001), facts(9, 0.0, 0.0), facts(0.01, 0.001, 0.0)]
    selection = select(Recipe.parse("thr=0,uniform"), layers, size_of(layers))
    assert selection.widths == (3, 3, 3, 0)
    assert [len(dimensions) for dimensions in selection.kept] == [3, 3, 1, 0]


def test_dimensions_aligned_with_the_base_go_first() -> None:
    layer = facts(8.0, 4.0, 2.0, base_alignment=np.array([100.0, 0.1, 0.1]))
    selection = select(Recipe.parse("subspace,thr=1"), [layer], size_of([layer]))
    assert selection.kept == ((1, 2),)


def test_a_budget_stops_at_the_first_dimension_too_many() -> None:
    layers = [facts(8.0, 1.0, numbers=1000), facts(4.0, 2.0, numbers=10)]
    selection = select(Recipe.parse(f"size={2020 / 2**20!r}"), layers, size_of(layers))
    assert [len(dimensions) for dimensions in selection.kept] == [1, 1]
    assert selection.threshold == pytest.approx(math.log10(4))


def test_a_budget_with_bytes_prefers_what_is_cheap() -> None:
    layers = [facts(8.0, numbers=100_000), facts(4.0, 2.0, numbers=10)]
    assert kept(f"bytes,size={100 / 2**20!r}", *layers) == [0, 2]


def test_a_budget_above_everything_keeps_all_without_a_threshold() -> None:
    layers = [facts(3.0, 1.0), facts(2.0, 0.0)]
    selection = select(Recipe.parse("size=1"), layers, size_of(layers))
    assert selection.threshold is None
    assert [len(dimensions) for dimensions in selection.kept] == [2, 1]


@pytest.mark.parametrize(
    ("size", "text", "name"),
    [
        ("300MB", "300MB", "size300MB"),
        ("0.4MiB", "0.4", "size0.4"),
        ("0.4", "0.4", "size0.4"),
        ("2GB", "2000MB", "size2000MB"),
    ],
)
def test_sizes_have_units_and_print_as_they_were_written(size: str, text: str, name: str) -> None:
    recipe = Recipe.parse(f"size={size}")
    assert str(recipe) == f"size={text}"
    assert recipe.file_items() == name
    assert Recipe.parse(str(recipe)) == recipe


def test_error_keeps_the_fewest_best_dimensions_of_the_file() -> None:
    layers = [facts(3.0, 1.0), facts(2.0, 0.5)]
    total = 9 + 1 + 4 + 0.25
    for lost, kept in ((0.25, [2, 1]), (1.25, [1, 1]), (5.25, [1, 0])):
        selection = select(Recipe.parse(f"error={(lost / total) ** 0.5 + 1e-9}"), layers, size_of(layers))
        assert [len(dimensions) for dimensions in selection.kept] == kept


def test_an_impossible_budget_names_the_smallest_possible() -> None:
    with pytest.raises(RecipeError, match=r"smallest possible is size=2\.0972MB"):
        select(Recipe.parse("size=1"), [facts(1.0)], size_of([facts(1.0)], fixed=2 * 2**20))


# --- properties of all spectra --------------------------------------------------------------------


@st.composite
def files(draw: st.DrawFn) -> list[LayerFacts]:
    layers = []
    for _ in range(draw(st.integers(1, 5))):
        sigma = sorted(draw(st.lists(st.floats(1e-6, 1e3), min_size=1, max_size=12)), reverse=True)
        padding = [0.0] * draw(st.integers(0, 2))
        numbers = draw(st.integers(2, 10_000))
        layers.append(facts(*sigma, *padding, numbers=numbers, base_fro=draw(st.floats(0.1, 1e3))))
    return layers


@given(files(), st.floats(-6, 3), st.floats(-6, 3))
def test_a_lower_threshold_never_keeps_less(layers: list[LayerFacts], first: float, second: float) -> None:
    low, high = (kept(f"fro_ckpt,thr={value!r}", *layers) for value in sorted((first, second)))
    assert all(a >= b for a, b in zip(low, high, strict=True))


@given(files(), st.floats(1, 5e5), st.sampled_from(["", "bytes,", "fro_ckpt,bytes,", "fro_ckpt,"]))
def test_a_budget_is_met_to_within_one_dimension(layers: list[LayerFacts], limit: float, terms: str) -> None:
    recipe = Recipe.parse(f"{terms}size={limit / 2**20!r}")
    selection = select(recipe, layers, size_of(layers))
    size = size_of(layers)
    used = size(selection.widths, None)
    assert used <= limit
    if selection.threshold is not None or not any(selection.widths):
        assert used + max(layer.bytes_per_rank for layer in layers) > limit


@given(files(), st.floats(1, 5e5), st.sampled_from(["min_rank=1", "multiple=4", "uniform", "max_rank=3"]))
def test_a_budget_holds_with_every_modifier(layers: list[LayerFacts], limit: float, modifier: str) -> None:
    size = size_of(layers)
    if modifier == "min_rank=1":
        limit += size([1] * len(layers), None)
    selection = select(Recipe.parse(f"size={limit / 2**20!r},{modifier}"), layers, size)
    assert size(selection.widths, selection.threshold) <= limit


@given(files(), st.floats(0.05, 1))
def test_energy_keeps_enough_and_not_one_too_many(layers: list[LayerFacts], share: float) -> None:
    for layer, count in zip(layers, kept(f"energy={share!r}", *layers), strict=True):
        energy = layer.sigma**2
        assert energy[:count].sum() >= share * energy.sum() * (1 - 1e-12)
        assert energy[: count - 1].sum() < share * energy.sum() * (1 + 1e-12)


@given(files(), st.permutations(range(5)))
def test_the_order_of_the_layers_does_not_matter(layers: list[LayerFacts], order: list[int]) -> None:
    order = [index for index in order if index < len(layers)]
    straight = kept("fro_ckpt,thr=-1", *layers)
    assert kept("fro_ckpt,thr=-1", *(layers[index] for index in order)) == [straight[index] for index in order]
