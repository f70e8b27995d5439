"""Ranks and dtypes by one price: against all choices of small files, and exact budgets."""

import itertools
import math

import numpy as np
import pytest

from lorashrink.errors import RecipeError
from lorashrink.recipes.grammar import Recipe
from lorashrink.recipes.pricing import fine_enough, select_in_dtypes
from lorashrink.recipes.quality import (
    ANCHOR,
    allowed_distortion,
    corrected_anchor,
    distortion,
    predicted_db,
)
from lorashrink.recipes.terms import LayerFacts

FP8, FP16 = "F8_E4M3", "F16"


def offer(*sigma: float, numbers: int = 100, noise: float = 1.5e-3, calibrated: float | None = None):
    values = np.array(sigma)
    small = LayerFacts(values, numbers, numbers, False, noise=np.full(len(values), noise), file_norm=calibrated)
    return {FP8: small, FP16: LayerFacts(values, numbers, 2 * numbers, False, file_norm=calibrated)}


def only(offers, dtype):
    return [{dtype: layer[dtype]} for layer in offers]


def size_of(offers, fixed: int = 1000):
    def size(widths, threshold, dtypes) -> int:
        return fixed + sum(
            width * layer[dtype].bytes_per_rank for width, layer, dtype in zip(widths, offers, dtypes, strict=True)
        )

    return size


def some_file(calibrated: float | None = None, seed: int = 3):
    random = np.random.default_rng(seed)
    layers = [np.sort(random.lognormal(-2, 1.5, 4))[::-1] for _ in range(3)]
    norm = math.sqrt(sum(float((sigma**2).sum()) for sigma in layers)) if calibrated is None else calibrated
    return [offer(*sigma, numbers=60 + 40 * row, calibrated=norm) for row, sigma in enumerate(layers)]


def loss(offers, counts, dtypes) -> tuple[float, float]:
    dropped = rounding = 0.0
    for layer, count, dtype in zip(offers, counts, dtypes, strict=True):
        squares = layer[dtype].sigma ** 2
        dropped += float(squares[count:].sum())
        if layer[dtype].noise is not None:
            rounding += float((layer[dtype].noise * squares)[:count].sum())
    return dropped, rounding


def all_choices(offers):
    for counts in itertools.product(range(5), repeat=3):
        for dtypes in itertools.product((FP8, FP16), repeat=3):
            yield counts, dtypes


def counts_of(selection) -> list[int]:
    return [len(kept) for kept in selection.kept]


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("quality", [25, 30, 40, 50])
def test_quality_is_reached_with_few_bytes(quality: int, seed: int) -> None:
    offers = some_file(seed=seed)
    selection = select_in_dtypes(Recipe.parse(f"quality={quality}"), offers, "mixed", size_of(offers))
    counts = counts_of(selection)
    reached = predicted_db(distortion(*loss(offers, counts, selection.dtypes)))
    assert reached is None or reached >= quality - 1e-9
    used = size_of(offers)(counts, None, selection.dtypes)
    least = min(
        size_of(offers)(some, None, dtypes)
        for some, dtypes in all_choices(offers)
        if distortion(*loss(offers, some, dtypes)) <= allowed_distortion(quality)
    )
    # a price leaves out what lies between two corners of the hull: here less than one rank of the widest layer
    assert least <= used <= least + 2 * 140


@pytest.mark.parametrize("dtype", ["mixed", "auto"])
@pytest.mark.parametrize("budget", [1100, 1300, 1800, 2600, 9000])
def test_a_budget_of_several_dtypes_is_kept(budget: int, dtype: str) -> None:
    offers = some_file()
    recipe = Recipe.parse(f"calib,bytes,size={budget / 2**20!r}")
    selection = select_in_dtypes(recipe, offers, dtype, size_of(offers))
    used = size_of(offers)(counts_of(selection), None, selection.dtypes)
    assert used <= budget
    if budget == 9000:
        assert counts_of(selection) == [4, 4, 4]
        assert set(selection.dtypes) == {FP16}


def test_all_bytes_are_in_8_bits_where_much_is_dropped() -> None:
    offers = some_file()
    for dtype in ("mixed", "auto"):
        selection = select_in_dtypes(Recipe.parse("quality=20"), offers, dtype, size_of(offers))
        kept = [name for name, kept in zip(selection.dtypes, selection.kept, strict=True) if kept]
        assert set(kept) == {FP8}


def test_dtypes_follow_a_decided_rank() -> None:
    offers = [offer(3.0, 2.0, 1e-4), offer(3.0, 2.9, 2.8)]
    everything = select_in_dtypes(Recipe.parse("energy=1"), offers, "mixed", size_of(offers))
    few = select_in_dtypes(Recipe.parse("rank=1"), offers, "mixed", size_of(offers))
    assert counts_of(few) == [1, 1]
    assert set(few.dtypes) == {FP8}
    assert counts_of(everything) == [3, 3]
    assert set(everything.dtypes) == {FP16}  # nothing is dropped, so that rounding would be the only harm


@pytest.mark.parametrize("recipe", ["energy=0.9", "energy=0.999", "rank=3", "thr=-1"])
@pytest.mark.parametrize("seed", range(4))
def test_rounding_harms_no_more_than_what_a_recipe_drops(recipe: str, seed: int) -> None:
    """Without calibration rounding weighs half as much as dropping."""
    offers = some_file(seed=seed)
    selection = select_in_dtypes(Recipe.parse(recipe), offers, "mixed", size_of(offers))
    dropped, rounding = loss(offers, counts_of(selection), selection.dtypes)
    assert rounding / 2 <= dropped
    in_8_bits = loss(offers, counts_of(selection), [FP8] * 3)[1]
    assert (set(selection.dtypes) == {FP8}) == (in_8_bits / 2 <= dropped)


def test_one_dtype_is_taken_where_it_is_named() -> None:
    offers = some_file()
    for dtype in (FP8, FP16):
        selection = select_in_dtypes(Recipe.parse("quality=30"), only(offers, dtype), "fp8", size_of(offers))
        assert set(selection.dtypes) == {dtype}


def test_quality_out_of_reach_names_what_can_be_had() -> None:
    offers = only(some_file(), FP8)
    with pytest.raises(RecipeError, match=r"about \d\d\.\d dB is the most that this dtype gives. Use -t mixed"):
        select_in_dtypes(Recipe.parse("quality=70"), offers, "fp8", size_of(offers))


def test_a_size_below_the_fixed_part_names_the_smallest() -> None:
    offers = some_file()
    with pytest.raises(RecipeError, match="the smallest possible is size="):
        select_in_dtypes(Recipe.parse("calib,size=0.0001"), offers, "mixed", size_of(offers))


def test_limits_of_ranks_hold_for_quality() -> None:
    offers = some_file()
    recipe = Recipe.parse("quality=30,min_rank=2,max_rank=3")
    counts = counts_of(select_in_dtypes(recipe, offers, "mixed", size_of(offers)))
    assert set(counts) <= {2, 3}


def test_layers_that_8_bits_would_spoil_are_not_offered_in_8_bits() -> None:
    assert list(fine_enough(offer(1.0, 0.5, noise=0.1))) == [FP16]
    assert list(fine_enough(offer(1.0, 0.5))) == [FP8, FP16]
    assert list(fine_enough({FP8: offer(1.0, noise=0.1)[FP8]})) == [FP8]


# --- the prediction -------------------------------------------------------------------------------


def test_the_prediction_and_its_inverse_agree() -> None:
    for quality in (20.0, 35.0, 55.0):
        assert predicted_db(allowed_distortion(quality)) == pytest.approx(quality)
    assert predicted_db(0.0) is None
    assert predicted_db(1.0) == ANCHOR


def test_one_drawing_corrects_the_anchor() -> None:
    anchor = corrected_anchor(4e-3, 37.5)
    assert predicted_db(4e-3, anchor) == pytest.approx(37.5)
    assert predicted_db(4e-4, anchor) == pytest.approx(37.5 + 8.4)


def test_rounding_weighs_far_less_than_what_is_dropped() -> None:
    assert distortion(0.0, 1.0) == pytest.approx(10**-2.1)
    assert distortion(1.0, 0.0) == 1.0
