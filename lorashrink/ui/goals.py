"""What a person wants of an adapter, in words, and the recipe that it stands for."""

from __future__ import annotations

import math
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorashrink.automatic.method import Method
from lorashrink.errors import UsageError
from lorashrink.files.store import MIXTURES, OUTPUT_DTYPES
from lorashrink.recipes.grammar import Recipe
from lorashrink.recipes.levels import LEVELS

# The dtypes to write, the default first and without those that are numbers.
DTYPES = ("auto", *(dtype for dtype in (*OUTPUT_DTYPES, *MIXTURES) if not dtype.isdecimal() and dtype != "auto"))


@dataclass(frozen=True, slots=True)
class Help:
    """The files that help to choose what is kept."""

    base: Path | None = None  # checkpoint, model folder or norm table
    calibration: Path | None = None  # what `calibrate` wrote

    @property
    def method(self) -> Method:
        """What `shrink` would do with these files."""
        name = "calibrated" if self.calibration else "base" if self.base else "adapter"
        return Method(name, "", self.base, self.calibration)


def recipe_of(goal: Mapping[str, Any], help: Help) -> Recipe:
    """The recipe of a goal: `{"by": "quality" | "size" | "rank" | "recipe", "value": ...}`, a size in bytes.

    Raises UsageError or RecipeError.
    """
    by, value = goal.get("by"), goal.get("value")
    if by == "recipe" and isinstance(value, str):
        return Recipe.parse(value)
    if by == "quality" and value in LEVELS:
        return Recipe.parse(help.method.of_level(LEVELS[str(value)]))
    if isinstance(value, (int, float)) and math.isfinite(value) and value > 0:
        if by == "size":
            return Recipe.parse(help.method.of_size(value))
        if by == "rank":
            return Recipe.parse(help.method.of_rank(round(value)))
    words = ", ".join(LEVELS)
    raise UsageError(f"'{by} {value}' is no goal. Give a quality ({words}), a size in bytes, a rank or a recipe.")


def dtype_of(request: Mapping[str, Any]) -> str:
    """The dtype to write, in the user's words. Raises UsageError."""
    dtype = request.get("dtype") or DTYPES[0]
    if dtype not in DTYPES:
        raise UsageError(f"dtype: '{dtype}' is not one of {', '.join(DTYPES)}.")
    return str(dtype)


def command_line(recipe: Recipe, help: Help, dtype: str, source: Path, output: Path) -> str:
    """The same in a shell."""
    words: list[object] = ["lorashrink", "resize", "-r", recipe]
    if recipe.needs_base and help.base:
        words += ["--base", help.base]
    if recipe.calibrated and help.calibration:
        words += ["--calibration", help.calibration]
    if dtype != "same":
        words += ["-t", dtype]
    return shlex.join(map(str, [*words, "-o", output, source]))
