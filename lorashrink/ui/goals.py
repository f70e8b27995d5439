"""What a person wants of an adapter, in words, and the recipe that it stands for."""

from __future__ import annotations

import math
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorashrink.errors import UsageError
from lorashrink.files.store import OUTPUT_DTYPES
from lorashrink.recipes.grammar import Recipe

# Quality -> the largest error of the whole file. In docs/evidence.md such errors left pictures at about 50, 43 and
# 36 dB; half precision alone leaves them at 61.
QUALITIES: Mapping[str, float] = {"same": 0.03, "high": 0.1, "small": 0.22}

# The dtypes to write, without those that are numbers.
DTYPES = tuple(dtype for dtype in OUTPUT_DTYPES if not dtype.isdecimal())

_MIB = 2**20


@dataclass(frozen=True, slots=True)
class Help:
    """The files that help to choose what is kept."""

    base: Path | None = None  # checkpoint, model folder or norm table
    calibration: Path | None = None  # what `calibrate` wrote

    @property
    def score(self) -> str:
        """The best score for a size that these files allow, with a comma behind it."""
        return "calib,bytes," if self.calibration else self.plain_score

    @property
    def plain_score(self) -> str:
        """The best score for an error, which is one of the weights and not of what a table says of them."""
        return "fro_ckpt,bytes," if self.base else "bytes,"


def recipe_of(goal: Mapping[str, Any], help: Help) -> Recipe:
    """The recipe of a goal: `{"by": "quality" | "size" | "rank" | "recipe", "value": ...}`, a size in bytes.

    Raises UsageError or RecipeError.
    """
    by, value = goal.get("by"), goal.get("value")
    if by == "recipe" and isinstance(value, str):
        return Recipe.parse(value)
    if by == "quality" and value in QUALITIES:
        return Recipe.parse(f"{help.plain_score}error={QUALITIES[str(value)]}")
    if isinstance(value, (int, float)) and math.isfinite(value) and value > 0:
        if by == "size":
            return Recipe.parse(f"{help.score}size={value / _MIB:.6f}")
        if by == "rank":
            return Recipe.parse(f"rank={value:.0f}")
    words = ", ".join(QUALITIES)
    raise UsageError(f"'{by} {value}' is no goal. Give a quality ({words}), a size in bytes, a rank or a recipe.")


def dtype_of(request: Mapping[str, Any]) -> str:
    """The dtype to write, in the user's words. Raises UsageError."""
    dtype = request.get("dtype") or "same"
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
