"""One adapter at any size: the curve of size against error, and what a recipe would keep."""

from __future__ import annotations

import tempfile
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lorashrink.adapters import peft
from lorashrink.errors import InputError
from lorashrink.names import block
from lorashrink.recipes.grammar import Recipe
from lorashrink.results.shrinking import FileResult, LayerResult
from lorashrink.ui.goals import Help

_POINTS = 24
_LEAST, _MOST = 0.04, 0.98  # shares of the file


def curve(path: Path, help: Help) -> list[dict[str, float]]:
    """Points of size (bytes) against error (relative, of ΔW), smallest first; the last one is the whole adapter."""
    size = path.stat().st_size if path.is_file() else peft.weights_in(path).stat().st_size
    shares = [_LEAST * (_MOST / _LEAST) ** (index / (_POINTS - 1)) for index in range(_POINTS)]
    recipes = [Recipe.parse(f"{help.score}size={share * size / 2**20:.6f}") for share in shares]
    recipes.append(Recipe.parse("energy=1"))
    points = {result.bytes_after: result.relative_error for result in _results(path, recipes, help)}
    return [{"bytes": size, "error": error} for size, error in sorted(points.items())]


def at(path: Path, recipe: Recipe, help: Help) -> dict[str, Any]:
    """Size, error and ranks per block that a recipe gives. Raises InputError."""
    (result,) = _results(path, [recipe], help)
    return {
        "recipe": str(recipe),
        "bytes": result.bytes_after,
        "error": result.relative_error,
        "blocks": _blocks(result.layers),
    }


def _blocks(layers: Sequence[LayerResult]) -> list[dict[str, Any]]:
    """Mean ranks per block, before and after."""
    rows: dict[str, list[LayerResult]] = defaultdict(list)
    for layer in layers:
        rows[block(layer.name)].append(layer)
    return [
        {
            "block": name,
            "layers": len(members),
            "before": sum(layer.rank_before for layer in members) / len(members),
            "after": sum(layer.rank_after for layer in members) / len(members),
        }
        for name, members in sorted(rows.items())
    ]


def _results(path: Path, recipes: Sequence[Recipe], help: Help) -> Sequence[FileResult]:
    from lorashrink.shrinking.options import ResizeOptions
    from lorashrink.shrinking.run import shrink

    name = peft.WEIGHTS_FILE if peft.is_folder(path) else "a.safetensors"
    targets = {Path(tempfile.gettempdir(), str(index), name): recipe for index, recipe in enumerate(recipes)}
    options = ResizeOptions(base=help.base, calibration=help.calibration, dry_run=True)
    report = shrink({path: targets}, options, lenient=len(recipes) > 1)
    for failure in report.failed:
        raise InputError(failure.error)
    return report.results
