"""How small can an adapter get? One decomposition and many recipes: size against error, and what to choose."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from lorashrink.adapters import Adapter, open_adapter
from lorashrink.bases import Base
from lorashrink.errors import InputError, RecipeError, UsageError
from lorashrink.inputs import find_adapters
from lorashrink.recipe import SELECTIONS, parse_recipes
from lorashrink.results import FileResult

Progress = Callable[[str, int, int], None]

# Without recipes of the user's: what guides recommend, sizes reached exactly, and what needs no base.
_GUIDES, _USUAL = "fro_ckpt=1,thr=-4.5..-2/11", ("energy=0.5..0.999/9", "rank=1..64/7")
_SIZES = "fro_ckpt,bytes,size={:.4g}..{:.4g}/7"
# Shares of the adapter's size, and the smallest adapter for which the least of them is more than names and metadata.
_LEAST, _MOST, _WORTH_IT = 0.15, 0.8, 500_000

_NUMBER = r"-?\d+(?:\.\d+)?"
_RANGE = re.compile(rf"(?P<key>\w+)=(?P<low>{_NUMBER})\.\.(?P<high>{_NUMBER})/(?P<count>\d+)")
_WHOLE = ("rank", "conv_rank", "max_rank", "min_rank", "multiple")
_SHARES = ("energy", "sv_fro", "sv_cumulative")
_DIGITS = 4  # of the numbers that ranges are expanded to


@dataclass(frozen=True, slots=True)
class Point:
    """What one recipe would make of the adapter."""

    recipe: str
    curve: str  # the recipe without its selection's number: points of one curve belong together
    bytes: int
    relative_error: float  # sqrt(Σ‖lost‖² / Σ‖ΔW‖²)
    energy: float
    mean_rank: float  # over all layers, removed ones count as 0
    layers: int  # that are left
    best: bool = False  # no other point is both smaller and closer


@dataclass(frozen=True, slots=True)
class Suggestion:
    """The point to begin with, and why."""

    recipe: str
    bytes: int
    relative_error: float
    reason: str


@dataclass(frozen=True, slots=True)
class Sweep:
    """Size against error for one adapter; points by size, smallest first."""

    source: str
    bytes: int
    points: tuple[Point, ...]
    suggestion: Suggestion | None


def sweep(
    adapter: str | Path,
    *,
    base: str | Path | None = None,
    recipes: str | Sequence[str] = (),
    sizes: Sequence[float] = (),
    dtype: str = "same",
    device: str = "auto",
    jobs: int | None = None,
    progress: Progress | None = None,
) -> Sweep:
    """What many recipes would make of one adapter; nothing is written.

    recipes: as in `resize`, where one number may be a range `low..high/count`; default are ranges of the usual recipes.
    sizes: sizes in MiB; each score in `recipes` that has no selection (default `fro_ckpt,bytes` with a base, `bytes`
    without) is tried at each.

    Raises RecipeError, UsageError or InputError as `resize` does; what fails there for one file is an error here.
    """
    from lorashrink.batch import check_needs, shrink

    given = [recipes] if isinstance(recipes, str) else list(recipes)
    parse_recipes(_expanded(given, sizes, base is not None))  # a typo is answered before any file is looked at
    sources = find_adapters([adapter])
    if len(sources) != 1:
        raise UsageError(f"{adapter}: {len(sources)} adapters; a sweep takes one, `resize --dry-run` takes many.")
    source = sources[0]
    if not given and not sizes:
        given = _usual(source, base is not None)
    wanted = parse_recipes(_expanded(given, sizes, base is not None))
    check_needs(wanted, base, source)
    unwritten = {source.with_name(f"{place}.safetensors"): recipe for place, recipe in enumerate(wanted)}
    report = shrink(
        {source: unwritten}, _open, base=base, dtype=dtype, device=device, jobs=jobs, dry_run=True, progress=progress
    )
    if report.failed:
        raise InputError(report.failed[0].error)
    points = _with_front([_point(result) for result in report.results])
    before = report.results[0].bytes_before
    return Sweep(report.results[0].source, before, points, suggest(points, before))


def _open(source: Path, base: Base | None) -> Adapter:
    return open_adapter(source)


def _usual(source: Path, has_base: bool) -> list[str]:
    bytes_before = source.stat().st_size if source.is_file() else 0
    megabytes = bytes_before / 2**20
    sizes = [_SIZES.format(_LEAST * megabytes, _MOST * megabytes)] if bytes_before > _WORTH_IT else []
    return [*([_GUIDES, *sizes] if has_base else []), *_USUAL]


def _expanded(given: Sequence[str], sizes: Sequence[float], has_base: bool) -> list[str]:
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


def _point(result: FileResult) -> Point:
    ranks = [layer.rank_after for layer in result.layers]
    return Point(
        recipe=result.recipe,
        curve=curve(result.recipe),
        bytes=result.bytes_after,
        relative_error=result.relative_error,
        energy=result.energy,
        mean_rank=sum(ranks) / len(ranks) if ranks else 0.0,
        layers=sum(rank > 0 for rank in ranks),
    )


def curve(recipe: str) -> str:
    """The recipe with its selection but without the selection's number, such as `fro_ckpt=1,thr`."""
    items = recipe.split(",")
    return ",".join(item.split("=")[0] if item.split("=")[0] in SELECTIONS else item for item in items)


def _with_front(points: Sequence[Point]) -> tuple[Point, ...]:
    """By size, with the points marked than which none is both smaller and closer (the Pareto front)."""
    ordered = sorted(points, key=lambda point: (point.bytes, point.relative_error))
    marked, least = [], math.inf
    for point in ordered:
        marked.append(replace(point, best=point.relative_error < least))
        least = min(least, point.relative_error)
    return tuple(marked)


def suggest(points: Sequence[Point], before: int) -> Suggestion | None:
    """The knee of the front: the point furthest below the straight line between its ends.

    Axes are the logarithm of the size and the error, each from 0 to 1 (Satopaa et al. 2011, "Kneedle"). None with fewer
    than three points on the front, or if all are equally large or close.
    """
    front = [point for point in points if point.best]
    if len(front) < 3:
        return None
    sizes = [math.log(point.bytes) for point in front]
    errors = [point.relative_error for point in front]
    wide, tall = sizes[-1] - sizes[0], errors[0] - errors[-1]
    if wide <= 0 or tall <= 0:
        return None
    below = [
        1 - (size - sizes[0]) / wide - (error - errors[-1]) / tall for size, error in zip(sizes, errors, strict=True)
    ]
    place = max(range(len(front)), key=below.__getitem__)
    chosen = front[place]
    smaller = front[max(place - 1, 0)]
    reason = (
        f"the bend of the curve: {chosen.bytes / before:.0%} of the bytes at {chosen.relative_error:.1%} error; "
        f"the next smaller one, {smaller.bytes / before:.0%}, has {smaller.relative_error:.1%}"
    )
    return Suggestion(chosen.recipe, chosen.bytes, chosen.relative_error, reason)
