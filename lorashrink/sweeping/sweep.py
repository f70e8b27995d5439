"""`sweep`: shrink an adapter by many recipes and compare sizes and errors."""

from __future__ import annotations

import logging
import math
import statistics
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from lorashrink.adapters import peft
from lorashrink.errors import InputError, NonFinite, Progress, UsageError
from lorashrink.linking.inputs import find_adapters
from lorashrink.pictures.prompts import OWN, read_prompts
from lorashrink.recipes.grammar import Recipe, parse_recipes
from lorashrink.recipes.levels import ADAPTER_LINE, BASE_LINE, LEVELS, error_for
from lorashrink.results.shrinking import FileResult, Report
from lorashrink.results.sweep import Drawn, Pictures, Point, Read, Suggestion, Sweep
from lorashrink.shrinking.ledger import Targets
from lorashrink.shrinking.outputs import shown
from lorashrink.sweeping.ranges import curve, expand_all
from lorashrink.text import decibel_text, share_text

if TYPE_CHECKING:
    from lorashrink.pictures.drawing import Studio
    from lorashrink.pictures.likeness import Compare

_log = logging.getLogger(__name__)


# Recipes of a sweep for which the user gives none: what guides recommend, sizes, and what needs no base.
_GUIDES, _USUAL = "fro_ckpt=1,thr=-4.5..-2/11", ("energy=0.5..0.999/9", "rank=1..64/7")

_SIZES = "fro_ckpt,bytes,size={:.4g}..{:.4g}/7"

# Shares of the adapter's size, and the smallest adapter for which the least of them is more than names and metadata.
_LEAST, _MOST, _WORTH_IT = 0.15, 0.8, 500_000

# The level of `shrink` from which a file is recommended; half precision alone often changes pictures more.
_HIGH = LEVELS["high"]

# Distance in the worst passage up to which a file is recommended: divergence in nats per token, or of cosines.
CLOSE_TEXTS = 0.01


def sweep(
    adapter: str | Path,
    *,
    base: str | Path | None = None,
    recipes: str | Sequence[str] = (),
    sizes: Sequence[float] = (),
    dtype: str = "same",
    device: str = "auto",
    jobs: int | None = None,
    calibration: str | Path | None = None,
    images: str | Path | None = None,
    prompts: str | Path | None = None,
    seeds: Sequence[int] = (0,),
    pictures: str | Path | None = None,
    settings: str | Path | None = None,
    clip: str | Path | None = None,
    text: str | Path | None = None,
    progress: Progress | None = None,
) -> Sweep:
    """Shrink one adapter by many recipes, and compare sizes, errors and pictures; no adapter is written.

    recipes: as in `resize`; one number may be a range `low..high/count`. Default are ranges of the usual recipes.
    sizes: sizes in MiB; each score in `recipes` that has no selection (default `fro_ckpt,bytes` with a base, `bytes`
    without) is tried at each.
    calibration: as in `resize`.
    images: a model that draws the `prompts` (as in `read_prompts`), each with every one of `seeds` on top of its own,
    into the folder `pictures` (default in the user's cache). It is a folder as diffusers saves it, of SDXL, SD 1
    and 2, SD 3 or FLUX.1, or a single file. settings: for a single file, such a folder with the settings that it lacks.
    Pictures in the folder are not drawn again. clip: a folder of a CLIP model, which compares pictures too.
    text: a file that the base, a language model of transformers, reads with each recipe; the adapter is a PEFT folder.

    Recipes that keep nothing, or cannot reach their size, have no point.

    Raises RecipeError, UsageError or InputError as `resize` does; what fails there for one file is an error here, as
    is an adapter without layers.
    """
    from lorashrink.shrinking.options import ResizeOptions
    from lorashrink.shrinking.run import shrink

    if (images is None) != (prompts is None):
        raise UsageError("pictures need both --images, the model that draws, and --prompts, what it draws.")
    if text is not None and (base is None or images is not None):
        raise UsageError("--text needs the language model that reads it as the base, and goes without --images.")
    if not seeds:
        raise UsageError("pictures need at least one of --seeds; 0 means those of the prompts alone.")
    source, parsed = _source_and_recipes(adapter, recipes, sizes, base, calibration)
    options = ResizeOptions(base=base, calibration=calibration, dtype=dtype, device=device, jobs=jobs)

    def run(targets: Targets, *, dry_run: bool) -> Report:
        return shrink(targets, replace(options, dry_run=dry_run), lenient=True, progress=progress)

    shrinker = _Shrinker(source, run)
    if text is not None and base is not None:
        return _read(shrinker, parsed, Path(base), Path(text), device, progress)
    if images is None or prompts is None:
        results = shrinker.results(parsed)
        return _sweep(results, [_point(result) for result in results])
    from lorashrink.pictures.drawing import Studio, shots_of
    from lorashrink.pictures.likeness import comparisons
    from lorashrink.pictures.pipelines import KINDS, check_model, check_packages, own_side

    check_packages()
    from lorashrink.pictures.samplers import check_samplers

    folder, companion, clip_folder = (None if path is None else Path(path) for path in (pictures, settings, clip))
    kind = KINDS[check_model(Path(images), companion)]
    drawn_prompts = read_prompts(prompts, sampler=OWN, scale=kind.scale, side=own_side(Path(images), companion))
    check_samplers(drawn_prompts, flow=kind.title if kind.flow else "")
    shots = shots_of(drawn_prompts, seeds)
    with Studio(images, shots, folder=folder, device=device, settings=companion) as studio:
        compares = comparisons(clip_folder, studio.device)
        studio.check(source)
        results = shrinker.results(parsed)
        gallery = _Gallery(studio, shrinker, compares, progress)
        points = [
            replace(_point(result), pictures=gallery.of_recipe(recipe))
            for result, recipe in zip(results, shrinker.recipes_of(results, parsed), strict=True)
        ]
        drawn = Drawn(
            model=str(images),
            device=studio.device,
            dtype=studio.dtype,
            prompts=drawn_prompts,
            seeds=tuple(seeds),
            files=tuple(map(str, gallery.reference)),
            none=gallery.without_adapter(),
            floor=gallery.in_other_dtype(),
            other_dtype=studio.other_dtype,
        )
    return _sweep(results, points, drawn)


def _read(
    shrinker: _Shrinker, recipes: Sequence[Recipe], base: Path, text: Path, device: str, progress: Progress | None
) -> Sweep:
    from lorashrink.language.reader import Reader

    with Reader(base, shrinker.source, text, device=device, progress=progress) as reader:
        results = shrinker.results(recipes)
        points = []
        for result, recipe in zip(results, shrinker.recipes_of(results, recipes), strict=True):
            with shrinker.written(recipe) as path:
                points.append(replace(_point(result), texts=reader.compare(path.parent, result.recipe)))
        return _sweep(results, points, read=reader.read())


def _source_and_recipes(
    adapter: str | Path,
    recipes: str | Sequence[str],
    sizes: Sequence[float],
    base: str | Path | None,
    calibration: str | Path | None,
) -> tuple[Path, Sequence[Recipe]]:
    from lorashrink.shrinking.request import check_calibration, check_needs

    texts = [recipes] if isinstance(recipes, str) else list(recipes)
    parse_recipes(expand_all(texts, sizes, base is not None))  # a typo is answered before any file is looked at
    sources = find_adapters([adapter])
    if len(sources) != 1:
        raise UsageError(f"{adapter}: {len(sources)} adapters; a sweep takes one, `resize --dry-run` takes many.")
    (source,) = sources
    if not texts and not sizes:
        bytes_before = source.stat().st_size if source.is_file() else 0
        megabytes = bytes_before / 2**20
        texts = [*_USUAL]
        if base is not None:
            reachable = [_SIZES.format(_LEAST * megabytes, _MOST * megabytes)] if bytes_before > _WORTH_IT else []
            texts = [_GUIDES, *reachable, *_USUAL]
    parsed = parse_recipes(expand_all(texts, sizes, base is not None))
    check_needs(parsed, base, source)
    check_calibration(parsed, calibration)
    return source, parsed


def _sweep(
    results: Sequence[FileResult], points: Sequence[Point], drawn: Drawn | None = None, read: Read | None = None
) -> Sweep:
    ordered, before = with_front(points), results[0].bytes_before
    return Sweep(results[0].source, before, ordered, suggest(ordered, before, drawn, read), drawn, read)


@dataclass(frozen=True, eq=False)
class _Shrinker:
    """Shrinks one adapter by recipes."""

    source: Path
    run: Callable[..., Report]

    def results(self, recipes: Sequence[Recipe], folder: Path | None = None) -> Sequence[FileResult]:
        """What each recipe makes of the adapter; the files are written if there is a folder. Raises InputError."""
        targets = self.targets(recipes, folder or self.source.parent)
        report = self.run({self.source: dict(zip(targets, recipes, strict=True))}, dry_run=folder is None)
        if report.failed:
            raise InputError(report.failed[0].error)
        if not report.results[0].layers:
            raise InputError(
                f"{self.source}: holds no layer that a recipe could make smaller, only other tensors (norms, biases or "
                "embeddings), which every recipe keeps as they are."
            )
        return report.results

    def recipes_of(self, results: Sequence[FileResult], recipes: Sequence[Recipe]) -> list[Recipe]:
        """The recipe of each result; one that keeps nothing has no result, but outputs tell."""
        outputs = map(str, map(shown, self.targets(recipes, self.source.parent)))
        recipe_of = dict(zip(outputs, recipes, strict=True))
        return [recipe_of[result.output] for result in results]

    @contextmanager
    def written(self, recipe: Recipe) -> Iterator[Path]:
        """The file that a recipe makes, for a moment: all of them may be larger than the disk for temporary files."""
        with tempfile.TemporaryDirectory(prefix="lorashrink-") as folder:
            self.results([recipe], Path(folder))
            yield self.targets([recipe], Path(folder))[0]

    def targets(self, recipes: Sequence[Recipe], folder: Path) -> list[Path]:
        """A file for each recipe; each has a folder of its own, because those of PEFT bring settings along."""
        name = peft.WEIGHTS_FILE if peft.is_folder(self.source) else "adapter.safetensors"
        return [folder / str(number) / name for number in range(len(recipes))]


class _Gallery:
    """Pictures of a model, compared with those that it draws with the original adapter."""

    def __init__(
        self, studio: Studio, shrinker: _Shrinker, compares: Mapping[str, Compare], progress: Progress | None
    ) -> None:
        self.studio, self.shrinker, self.compares, self.progress = studio, shrinker, compares, progress
        self.reference = self._draw(shrinker.source, "whole")

    def of_recipe(self, recipe: Recipe) -> Pictures:
        with self.shrinker.written(recipe) as path:
            return self._compared(self._draw(path, recipe.file_items()))

    def without_adapter(self) -> Pictures:
        return self._compared(self._draw(None, "none"))

    def in_other_dtype(self) -> Pictures | None:
        dtype = self.studio.other_dtype
        try:
            return self._compared(self._draw(self.shrinker.source, dtype, dtype))
        except NonFinite as error:
            _log.warning("how much pictures differ by precision alone stays unknown: %s", error)
            return None

    def _draw(self, adapter: Path | None, label: str, dtype: str | None = None) -> list[Path]:
        report = partial(self.progress, f"pictures: {label}") if self.progress else None
        return self.studio.draw(adapter, label, dtype=dtype, progress=report)

    def _compared(self, paths: Sequence[Path]) -> Pictures:
        from lorashrink.pictures.drawing import read_picture

        pairs = [tuple(map(read_picture, pair)) for pair in zip(self.reference, paths, strict=True)]
        values = {name: tuple(compare(*pair) for pair in pairs) for name, compare in self.compares.items()}
        means = {name: statistics.fmean(numbers) for name, numbers in values.items()}
        deviations = {f"{name}_deviation": statistics.pstdev(numbers) for name, numbers in values.items()}
        worst_psnr = min(values["psnr"])
        return Pictures(
            files=tuple(map(str, paths)),
            values=values,
            worst=values["psnr"].index(worst_psnr),
            worst_psnr=worst_psnr,
            **means,
            **deviations,
        )


# --- points -------------------------------------------------------------------------------------


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
        calibrated=Recipe.parse(result.recipe).calibrated,
        predicted_db=result.predicted_db,
    )


def with_front(points: Sequence[Point]) -> tuple[Point, ...]:
    """The points by size; `best` marks the Pareto front, whose points no other is both smaller and closer than.

    Closer by the worst picture or passage where there are some, else by the error of the weights, which does not rank
    calibrated recipes: they are on the front only among themselves.
    """
    ordered = sorted(points, key=lambda point: (point.bytes, _distance(point)))
    by_error = any(not (point.pictures or point.texts or point.calibrated) for point in points)
    marked, least = [], math.inf
    for point in ordered:
        best = _distance(point) < least and not (by_error and point.calibrated)
        marked.append(replace(point, best=best))
        least = _distance(point) if best else least
    return tuple(marked)


def _distance(point: Point) -> float:
    """How far a point is from the original adapter, on the scale that all points of a sweep share."""
    if point.pictures:
        return -point.pictures.worst_psnr
    return point.texts.worst_distance if point.texts else point.relative_error


def suggest(
    points: Sequence[Point], before: int, drawn: Drawn | None = None, read: Read | None = None
) -> Suggestion | None:
    """The smallest point that is close enough to the original adapter, or the closest point if none is; and why.

    Close is what `shrink` takes for its quality "high", in the worst picture or by prediction; a worst picture that is
    no worse than that of half precision is close, too. With a text, it is a distance of `CLOSE_TEXTS` at most in the
    worst passage.
    """
    if not points:
        return None
    least = min(_HIGH.worst, drawn.floor.worst_psnr if drawn and drawn.floor else math.inf)
    close = [point for point in points if _is_close(point, least)]
    if close:
        chosen, preface = min(close, key=lambda point: point.bytes), ""
    else:
        chosen = min((point for point in points if point.best), key=_distance)
        if chosen.pictures:
            shortfall = f"keeps every picture at {decibel_text(least)} or more"
        elif read:
            shortfall = f"keeps every passage within a {read.measure} of {CLOSE_TEXTS}"
        elif chosen.calibrated:
            shortfall = f"is predicted to have {decibel_text(_HIGH.mean)}"
        else:
            shortfall = f"keeps the error of the weights at {share_text(_allowed_error(chosen))}"
        preface = f"the closest, because no recipe {shortfall}: "
    reason = f"{preface}{share_text(chosen.bytes / before)} of the size; {_closeness(chosen, drawn, read)}"
    return Suggestion(chosen.recipe, chosen.bytes, chosen.relative_error, reason)


def _is_close(point: Point, least: float) -> bool:
    """Whether a point is close enough; `least` is the PSNR in dB that its worst picture needs."""
    if point.pictures:
        return point.pictures.worst_psnr >= least
    if point.texts:
        return point.texts.worst_distance <= CLOSE_TEXTS
    if point.calibrated:
        return point.predicted_db is not None and point.predicted_db >= _HIGH.mean
    return point.relative_error <= _allowed_error(point)


def _allowed_error(point: Point) -> float:
    return error_for(_HIGH, BASE_LINE if Recipe.parse(point.recipe).judges_by_base else ADAPTER_LINE)


def _closeness(point: Point, drawn: Drawn | None, read: Read | None) -> str:
    """How close a point is to the original adapter, by what was looked at."""
    if drawn and point.pictures:
        floor = f" (half precision alone: {decibel_text(drawn.floor.worst_psnr)})" if drawn.floor else ""
        return (
            f"its worst picture has {decibel_text(point.pictures.worst_psnr)} against the original adapter's{floor}, "
            f"the mean is {decibel_text(point.pictures.psnr)}; worst: {drawn.labels[point.pictures.worst]}"
        )
    if read and point.texts:
        perplexity = ""
        if point.texts.perplexity:
            perplexity = f"; perplexity {point.texts.perplexity:.4g}, with the original adapter {read.perplexity:.4g}"
        return (
            f"{read.measure} {point.texts.worst_distance:.2g} in the worst passage (without the adapter "
            f"{read.none.worst_distance:.2g}){perplexity}"
        )
    if point.calibrated:
        predicted = "" if point.predicted_db is None else f"predicted {decibel_text(point.predicted_db)}; "
        return f"{predicted}pictures not checked"
    return (
        f"{share_text(point.relative_error)} error of the weights, where {share_text(_allowed_error(point))} stands "
        "for high quality; pictures not checked"
    )
