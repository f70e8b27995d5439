"""Ranges of recipe values, and the points of a sweep."""

from __future__ import annotations

import re
from collections.abc import Sequence

from lorashrink.errors import RecipeError
from lorashrink.recipes.grammar import SELECTIONS

_NUMBER = r"-?\d+(?:\.\d+)?"

_RANGE = re.compile(rf"(?P<key>\w+)=(?P<low>{_NUMBER})\.\.(?P<high>{_NUMBER})/(?P<count>\d+)")

_WHOLE = ("rank", "conv_rank", "max_rank", "min_rank", "multiple")

_SHARES = ("energy", "sv_fro", "sv_cumulative")

_DIGITS = 4  # of the numbers that ranges are expanded to


def expanded_range(given: Sequence[str], sizes: Sequence[float], has_base: bool) -> list[str]:
    """One recipe string per point."""
    texts = [text for each in given for text in each.split(":")]
    if sizes:
        scores = [text for text in texts if not _selects(text)] or (["fro_ckpt,bytes"] if has_base else ["bytes"])
        texts = [text for text in texts if _selects(text)] + [
            f"{score},size={size:g}" for score in scores for size in sizes
        ]
    every = [recipe for text in texts for recipe in expand(text)]
    return list(dict.fromkeys(every))


def _selects(text: str) -> bool:
    return any(item.split("=")[0].strip() in SELECTIONS for item in text.split(","))


def expand(text: str) -> list[str]:
    """The recipes that a recipe with a range `key=low..high/count` stands for; one without stands for itself.

    Steps are equal, for ranks and sizes equal ratios, for shares such as energy equal ratios of what is lost.

    Raises:
        RecipeError: two ranges, fewer than two points, or limits that a range of this key cannot have.
    """
    found = list(_RANGE.finditer(text))
    if ".." in text and len(found) != 1:
        raise RecipeError(
            f"recipe '{text}': a range is written key=low..high/count, once in a recipe; e.g. thr=-4..-3/5."
        )
    if not found:
        return [text]
    low, high, count = float(found[0]["low"]), float(found[0]["high"]), int(found[0]["count"])
    if count < 2:
        raise RecipeError(f"recipe '{text}': a range has at least 2 points.")
    start, end = found[0].span()
    numbers = _spaced(found[0]["key"], low, high, count, text)
    return [f"{text[:start]}{found[0]['key']}={number:.{_DIGITS}g}{text[end:]}" for number in numbers]


def _spaced(key: str, low: float, high: float, count: int, text: str) -> list[float]:
    shares = [place / (count - 1) for place in range(count)]
    if key in _SHARES and 0 < low < 1 and 0 < high < 1:
        return [1 - (1 - low) ** (1 - share) * (1 - high) ** share for share in shares]
    if key in (*_WHOLE, "size"):
        if not (low > 0 and high > 0):
            raise RecipeError(f"recipe '{text}': {key} is above 0.")
        numbers = [low ** (1 - share) * high**share for share in shares]
        return [float(round(number)) for number in numbers] if key in _WHOLE else numbers
    return [low + (high - low) * share for share in shares]


def curve(recipe: str) -> str:
    """The recipe with its selection but without the selection's number, such as `fro_ckpt=1,thr`."""
    items = recipe.split(",")
    return ",".join(item.split("=")[0] if item.split("=")[0] in SELECTIONS else item for item in items)
