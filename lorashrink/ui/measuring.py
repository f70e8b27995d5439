"""One adapter at any size: decomposed once, then asked as often as a slider moves."""

from __future__ import annotations

import contextlib
import threading
from collections import OrderedDict, defaultdict
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from lorashrink.adapters import peft
from lorashrink.errors import Progress, RecipeError
from lorashrink.names import block
from lorashrink.recipes.grammar import Recipe
from lorashrink.recipes.levels import LEVELS
from lorashrink.ui.goals import DTYPES, Help, recipe_of

if TYPE_CHECKING:
    from lorashrink.results.prepared import Outcome
    from lorashrink.shrinking.prepared import Prepared

_POINTS = 16  # of a curve; of a large adapter each takes some hundredths of a second
_KEPT = 3  # prepared adapters that answer at once

_Key = tuple[Path, int, int, Help]  # path, bytes, time of the last change


class Measurer:
    """Adapters that were looked at last, decomposed. Safe to use from several threads."""

    def __init__(self) -> None:
        self._kept: OrderedDict[_Key, Prepared] = OrderedDict()
        self._locks: dict[_Key, threading.Lock] = defaultdict(threading.Lock)
        self._lock = threading.Lock()

    def prepared(self, path: Path, help: Help, progress: Progress | None = None) -> Prepared:
        """The decomposed adapter. Raises as `lorashrink.prepare`."""
        from lorashrink.shrinking.prepared import prepare

        stat = (peft.weights_in(path) if peft.is_folder(path) else path).stat()
        key = (path, stat.st_size, stat.st_mtime_ns, help)
        with self._locks[key]:  # a second request for the same adapter waits for the first
            if key not in self._kept:
                prepared = prepare(path, base=help.base, calibration=help.calibration, progress=progress)
                with self._lock:
                    self._kept[key] = prepared
                    while len(self._kept) > _KEPT:
                        oldest, _ = self._kept.popitem(last=False)
                        self._locks.pop(oldest, None)
            return self._kept[key]

    def curve(self, path: Path, help: Help, dtype: str) -> dict[str, Any]:
        """Points of size (bytes) against error (relative, of ΔW), smallest first, and what each quality gives.

        A quality that this dtype does not reach gives None.
        """
        prepared = self.prepared(path, help)
        curve = prepared.curve(help.method.score, dtype=dtype, points=_POINTS)
        qualities: dict[str, dict[str, Any] | None] = dict.fromkeys(LEVELS)
        for name in LEVELS:
            with contextlib.suppress(RecipeError):
                recipe = recipe_of({"by": "quality", "value": name}, help)
                qualities[name] = _point(prepared.at(recipe, dtype=dtype))
        points = [{"bytes": size, "error": error} for size, error in curve.points]
        return {"points": points, "qualities": qualities}

    def at(self, path: Path, recipe: Recipe, help: Help, dtype: str) -> dict[str, Any]:
        """Size, error and mean ranks per block, before and after, that a recipe gives. Raises as `Prepared.at`."""
        prepared = self.prepared(path, help)
        outcome = prepared.at(recipe, dtype=dtype)
        ranks: dict[str, list[tuple[int, int]]] = defaultdict(list)
        for layer in prepared.adapter.layers:
            ranks[block(layer.name)].append((layer.rank, outcome.ranks.get(layer.name, 0)))
        blocks = []
        for name, pairs in sorted(ranks.items()):
            before, after = map(fmean, zip(*pairs, strict=True))
            blocks.append({"block": name, "layers": len(pairs), "before": before, "after": after})
        return {**_point(outcome), "recipe": outcome.recipe, "blocks": blocks}


def saving(path: Path) -> dict[str, Any]:
    """Size and error at high quality, of the adapter alone. Raises as `lorashrink.prepare`."""
    from lorashrink.shrinking.prepared import prepare

    outcome = prepare(path).at(recipe_of({"by": "quality", "value": "high"}, Help()), dtype=DTYPES[0])
    return {"bytes": outcome.bytes, "error": outcome.relative_error}


def _point(outcome: Outcome) -> dict[str, Any]:
    return {"bytes": outcome.bytes, "error": outcome.relative_error, "predicted_db": outcome.predicted_db}
