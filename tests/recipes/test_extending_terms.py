"""A new score term is one more row of the table of terms."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open

from lorashrink.errors import RecipeError
from lorashrink.recipes.grammar import Recipe
from lorashrink.recipes.terms import TERMS, Term
from lorashrink.shrinking.run import resize


@pytest.fixture
def dummy(monkeypatch: pytest.MonkeyPatch) -> None:
    """A term that divides each σ of a layer by its position, 1, 2, 3, ..."""
    monkeypatch.setitem(TERMS, "dummy", Term("layer", lambda facts: np.arange(1.0, len(facts.sigma) + 1)))


@pytest.mark.usefixtures("dummy")
def test_a_new_row_is_a_key_of_recipes() -> None:
    recipe = Recipe.parse("dummy,thr=-2")
    assert (str(recipe), recipe.file_items(), recipe.needs) == ("dummy=1,thr=-2", "dummy1_th-2", {"layer"})
    with pytest.raises(RecipeError, match="Did you mean dummy"):
        Recipe.parse("dumy,thr=-2")


@pytest.mark.usefixtures("dummy")
def test_resize_scores_by_a_new_row(adapter: Path, tmp_path: Path) -> None:
    plain, divided = resize(adapter, recipes="thr=-1:dummy,thr=-1", output=tmp_path).results
    kept = [sum(layer.rank_after for layer in result.layers) for result in (plain, divided)]
    assert 0 < kept[1] < kept[0]
    with safe_open(divided.output, "pt") as opened:
        assert json.loads(opened.metadata()["resize_params"])["weights"]["dummy"] == 1


def test_an_unknown_term_stays_an_error() -> None:
    with pytest.raises(RecipeError, match="unknown key 'dummy'"):
        Recipe.parse("dummy,thr=-2")
