"""`sweep`: shrink an adapter by many recipes and compare sizes and errors."""

from __future__ import annotations

import logging
import math
import statistics
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from lorashrink.adapters import peft
from lorashrink.errors import InputError, NonFinite, Progress, UsageError
from lorashrink.linking.inputs import find_adapters
from lorashrink.pictures.prompts import OWN, read_prompts
from lorashrink.recipes.grammar import Recipe, parse_recipes
from lorashrink.results.shrinking import FileResult, Report
from lorashrink.results.sweep import Drawn, Pictures, Point, Suggestion, Sweep
from lorashrink.shrinking.ledger import Targets
from lorashrink.shrinking.outputs import shown
from lorashrink.sweeping.ranges import curve, expanded_range

if TYPE_CHECKING:
    from lorashrink.pictures.drawing import Studio
    from lorashrink.pictures.likeness import Compare

_log = logging.getLogger(__name__)


# Without recipes of the user's: what guides recommend, sizes reached exactly, and what needs no base.
_GUIDES, _USUAL = "fro_ckpt=1,thr=-4.5..-2/11", ("energy=0.5..0.999/9", "rank=1..64/7")

_SIZES = "fro_ckpt,bytes,size={:.4g}..{:.4g}/7"

# Shares of the adapter's size, and the smallest adapter for which the least of them is more than names and metadata.
_LEAST, _MOST, _WORTH_IT = 0.15, 0.8, 500_000

# Mean PSNR in dB from which pictures count as the same, where half precision does not change them more anyway.
SAME_PICTURES = 35.0


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
    progress: Progress | None = None,
) -> Sweep:
    """What many recipes would make of one adapter; no adapter is written.

    recipes: as in `resize`, where one number may be a range `low..high/count`; default are ranges of the usual recipes.
    sizes: sizes in MiB; each score in `recipes` that has no selection (default `fro_ckpt,bytes` with a base, `bytes`
    without) is tried at each.
    calibration: as in `resize`.
    images: a model that draws the `prompts` (a file as in `read_prompts`), each with every one of `seeds` on top of its
    own, into the folder `pictures` (default in the user's cache). It is a folder as diffusers saves it, of SDXL, SD 1
    and 2, SD 3 or FLUX.1, or a single file; settings: for a single file, such a folder that tells what it does not say.
    Pictures that are there already are not drawn again. clip: a folder of a CLIP model, which compares them too.

    Recipes that keep nothing, or cannot reach their size, have no point.

    Raises RecipeError, UsageError or InputError as `resize` does; what fails there for one file is an error here, as
    is an adapter without layers.
    """
    from lorashrink.shrinking.options import ResizeOptions
    from lorashrink.shrinking.request import check_calibration, check_needs
    from lorashrink.shrinking.run import shrink

    given = [recipes] if isinstance(recipes, str) else list(recipes)
    parse_recipes(expanded_range(given, sizes, base is not None))  # a typo is answered before any file is looked at
    if (images is None) != (prompts is None):
        raise UsageError("pictures need both --images, the model that draws, and --prompts, what it draws.")
    if not seeds:
        raise UsageError("pictures need at least one of --seeds; 0 means those of the prompts alone.")
    sources = find_adapters([adapter])
    if len(sources) != 1:
        raise UsageError(f"{adapter}: {len(sources)} adapters; a sweep takes one, `resize --dry-run` takes many.")
    source = sources[0]
    if not given and not sizes:
        given = _usual(source, base is not None)
    wanted = parse_recipes(expanded_range(given, sizes, base is not None))
    check_needs(wanted, base, source)
    check_calibration(wanted, calibration)
    options = ResizeOptions(base=base, calibration=calibration, dtype=dtype, device=device, jobs=jobs)

    def run(targets: Targets, *, dry_run: bool) -> Report:
        return shrink(targets, replace(options, dry_run=dry_run), lenient=True, progress=progress)

    if images is None or prompts is None:
        results = _results(run, source, wanted, None)
        return _sweep([_point(result) for result in results], results[0])
    from lorashrink.pictures.drawing import Studio, shots_of
    from lorashrink.pictures.likeness import comparisons
    from lorashrink.pictures.pipelines import KINDS, check_model, check_packages

    check_packages()
    from lorashrink.pictures.samplers import check_samplers

    companion = None if settings is None else Path(settings)
    kind = KINDS[check_model(Path(images), companion)]
    asked = read_prompts(Path(prompts), sampler=OWN, scale=kind.scale)
    check_samplers(asked, flow=kind.title if kind.flow else "")
    place = None if pictures is None else Path(pictures)
    with Studio(images, shots_of(asked, seeds), folder=place, device=device, settings=companion) as studio:
        compare = comparisons(None if clip is None else Path(clip), studio.device)
        studio.check(source)
        results = _results(run, source, wanted, None)
        whole = _draw(studio, source, "whole", progress)
        alike = partial(_alike, compare, whole)
        made = dict(zip(map(str, map(shown, _places(source, source.parent, wanted))), wanted, strict=True))
        points = [
            replace(_point(result), pictures=alike(_draw_shrunk(studio, run, source, made[result.output], progress)))
            for result in results
        ]
        none = alike(_draw(studio, None, "none", progress))
        floor = _floor(studio, source, alike, progress)
        files = tuple(map(str, whole))
        drawn = Drawn(
            str(images), studio.device, studio.dtype, asked, tuple(seeds), files, none, floor, studio.other_dtype
        )
    return _sweep(points, results[0], drawn)


def _results(
    run: Callable[..., Report], source: Path, recipes: Sequence[Recipe], folder: Path | None
) -> Sequence[FileResult]:
    """What each recipe makes of the adapter, written into `folder` if there is one."""
    places = _places(source, folder or source.parent, recipes)
    report = run({source: dict(zip(places, recipes, strict=True))}, dry_run=folder is None)
    if report.failed:
        raise InputError(report.failed[0].error)
    if not report.results[0].layers:
        raise InputError(
            f"{source}: holds no layer that a recipe could make smaller, only other tensors (norms, biases or "
            "embeddings), which every recipe keeps as they are."
        )
    return report.results


def _places(source: Path, folder: Path, recipes: Sequence[Recipe]) -> list[Path]:
    """A file for each recipe; each has a folder of its own, because those of PEFT bring settings along."""
    name = peft.WEIGHTS_FILE if peft.is_folder(source) else "adapter.safetensors"
    return [folder / str(number) / name for number in range(len(recipes))]


def _sweep(points: Sequence[Point], one: FileResult, drawn: Drawn | None = None) -> Sweep:
    ordered = _with_front(points)
    return Sweep(one.source, one.bytes_before, ordered, suggest(ordered, one.bytes_before, drawn), drawn)


def _draw(
    studio: Studio, adapter: Path | None, label: str, progress: Progress | None, dtype: str | None = None
) -> list[Path]:
    report = partial(progress, f"pictures: {label}") if progress else None
    return studio.draw(adapter, label, dtype=dtype, progress=report)


def _draw_shrunk(
    studio: Studio, run: Callable[..., Report], source: Path, recipe: Recipe, progress: Progress | None
) -> list[Path]:
    # One file at a time: all of them together may be larger than the disk for temporary files.
    with tempfile.TemporaryDirectory(prefix="lorashrink-") as folder:
        _results(run, source, [recipe], Path(folder))
        (path,) = _places(source, Path(folder), [recipe])
        return _draw(studio, path, recipe.file_items(), progress)


def _floor(
    studio: Studio, source: Path, alike: Callable[[Sequence[Path]], Pictures], progress: Progress | None
) -> Pictures | None:
    try:
        return alike(_draw(studio, source, studio.other_dtype, progress, studio.other_dtype))
    except NonFinite as error:
        _log.warning("how much pictures differ by precision alone stays unknown: %s", error)
        return None


def _alike(comparisons: Mapping[str, Compare], whole: Sequence[Path], others: Sequence[Path]) -> Pictures:
    from lorashrink.pictures.drawing import read_picture

    pairs = [(read_picture(one), read_picture(other)) for one, other in zip(whole, others, strict=True)]
    values = {name: tuple(compare(*pair) for pair in pairs) for name, compare in comparisons.items()}
    means = {name: statistics.fmean(each) for name, each in values.items()}
    deviations = {f"{name}_deviation": statistics.pstdev(each) for name, each in values.items()}
    return Pictures(files=tuple(map(str, others)), values=values, **means, **deviations)


def _usual(source: Path, has_base: bool) -> list[str]:
    bytes_before = source.stat().st_size if source.is_file() else 0
    megabytes = bytes_before / 2**20
    sizes = [_SIZES.format(_LEAST * megabytes, _MOST * megabytes)] if bytes_before > _WORTH_IT else []
    return [*([_GUIDES, *sizes] if has_base else []), *_USUAL]


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


def _with_front(points: Sequence[Point]) -> tuple[Point, ...]:
    """By size, with the points marked than which none is both smaller and closer (the Pareto front)."""
    ordered = sorted(points, key=lambda point: (point.bytes, point.relative_error))
    marked, least = [], math.inf
    for point in ordered:
        marked.append(replace(point, best=point.relative_error < least))
        least = min(least, point.relative_error)
    return tuple(marked)


def suggest(points: Sequence[Point], before: int, drawn: Drawn | None = None) -> Suggestion | None:
    """With pictures the smallest point whose pictures are the whole adapter's; else the knee of the front.

    Pictures are the same if their mean PSNR is `SAME_PICTURES` or more, or their mean PSNR or SSIM no lower than where
    the model draws in half precision.
    """
    if drawn is None:
        return _knee(points, before, "")
    same = [(point, point.pictures) for point in points if point.pictures and _same(point.pictures, drawn.floor)]
    if not same:
        return _knee(points, before, "no recipe leaves the pictures as they are; ")
    chosen, pictures = min(same, key=lambda pair: pair[0].bytes)
    limit = f" (half precision alone: {drawn.floor.psnr:.1f} dB, {drawn.floor.ssim:.4f})" if drawn.floor else ""
    reason = (
        f"the smallest whose pictures are those of the whole adapter: PSNR {pictures.psnr:.1f} dB, SSIM "
        f"{pictures.ssim:.4f}{limit}; {chosen.bytes / before:.0%} of the bytes"
    )
    return Suggestion(chosen.recipe, chosen.bytes, chosen.relative_error, reason)


def _same(pictures: Pictures, floor: Pictures | None) -> bool:
    return pictures.psnr >= SAME_PICTURES or (
        floor is not None and (pictures.psnr >= floor.psnr or pictures.ssim >= floor.ssim)
    )


def _knee(points: Sequence[Point], before: int, preface: str) -> Suggestion | None:
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
        f"{preface}the bend of the curve: {chosen.bytes / before:.0%} of the bytes at "
        f"{chosen.relative_error:.1%} error; "
        f"the next smaller one, {smaller.bytes / before:.0%}, has {smaller.relative_error:.1%}"
    )
    return Suggestion(chosen.recipe, chosen.bytes, chosen.relative_error, reason)
