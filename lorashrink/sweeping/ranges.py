"""Ranges of recipe values, and the points of a sweep."""

from __future__ import annotations

import re
from collections.abc import Sequence

from lorashrink.errors import RecipeError
from lorashrink.recipes.grammar import SELECTIONS
from lorashrink.text import bytes_in

_NUMBER = r"-?\d+(?:\.\d+)?"

_UNIT = "(?: ?(?:[kmgKMG][iI]?)?[bB])?"

_RANGE = re.compile(rf"(?P<key>\w+)=(?P<low>{_NUMBER}{_UNIT})\.\.(?P<high>{_NUMBER}{_UNIT})/(?P<count>\d+)")

_INTEGERS = ("rank", "conv_rank", "max_rank", "min_rank", "multiple")

_SHARES = ("energy", "sv_fro", "sv_cumulative", "error")

_DIGITS = 4  # of the numbers that ranges are expanded to


def expand_all(recipes: Sequence[str], sizes: Sequence[float], has_base: bool) -> list[str]:
    """The recipes of all points of a sweep; a score without a selection is tried at each of the sizes."""
    texts = [text for recipe in recipes for text in recipe.split(":")]
    if sizes:

        def selects(text: str) -> bool:
            return any(item.split("=")[0].strip() in SELECTIONS for item in text.split(","))

        scores = [text for text in texts if not selects(text)] or (["fro_ckpt,bytes"] if has_base else ["bytes"])
        texts = list(filter(selects, texts)) + [f"{score},size={size!r}" for score in scores for size in sizes]
    return list(dict.fromkeys(recipe for text in texts for recipe in expand(text)))


def expand(text: str) -> list[str]:
    """The recipes that a recipe with a range `key=low..high/count` stands for; one without stands for itself.

    Steps are equal, for ranks and sizes equal ratios, for shares such as energy equal ratios of what is lost.

    Raises:
        RecipeError: two ranges, fewer than two points, or limits that a range of this key cannot have.
    """
    ranges = list(_RANGE.finditer(text))
    if ".." in text and len(ranges) != 1:
        raise RecipeError(
            f"recipe '{text}': a range is written key=low..high/count, once in a recipe; e.g. thr=-4..-3/5."
        )
    if not ranges:
        return [text]
    match = ranges[0]
    key, count = match["key"], int(match["count"])
    limits = match["low"], match["high"]
    try:
        low, high = (bytes_in(limit) / 2**20 if key == "size" else float(limit) for limit in limits)
    except ValueError:
        raise RecipeError(f"recipe '{text}': {key}= has no unit; only sizes have one.") from None
    if count < 2:
        raise RecipeError(f"recipe '{text}': a range has at least 2 points.")
    if key in (*_INTEGERS, "size") and not (low > 0 and high > 0):
        raise RecipeError(f"recipe '{text}': {key} is above 0.")
    start, end = match.span()
    shares = [index / (count - 1) for index in range(count)]
    if key in _SHARES and 0 < low < 1 and 0 < high < 1:
        numbers = [1 - (1 - low) ** (1 - share) * (1 - high) ** share for share in shares]
    elif key in (*_INTEGERS, "size"):
        numbers = [low ** (1 - share) * high**share for share in shares]
    else:
        numbers = [low + (high - low) * share for share in shares]
    if key in _INTEGERS:
        numbers = [float(round(number)) for number in numbers]
    return [f"{text[:start]}{key}={number:.{_DIGITS}g}{text[end:]}" for number in numbers]


def curve(recipe: str) -> str:
    """The recipe with its selection but without the selection's number, such as `fro_ckpt=1,thr`."""
    items = recipe.split(",")
    return ",".join(item.split("=")[0] if item.split("=")[0] in SELECTIONS else item for item in items)
