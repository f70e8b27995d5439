"""Size against error, and against pictures: one curve per kind of recipe."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from statistics import fmean, pstdev
from typing import TYPE_CHECKING, Any

from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from lorashrink.pictures.likeness import MEASURES, Measure
from lorashrink.plots.axes import grid_below
from lorashrink.plots.style import COLOURS, INK, QUIET, RC
from lorashrink.text import count_text, size_text

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from lorashrink.results.sweep import Drawn, Point, Sweep

_MEGA = 1e6
_DRAWN = ("psnr", "ms_ssim")  # the measures that are drawn, from the top

# Of a curve through recipes, and of the single pictures or passages around it.
_LINE: dict[str, Any] = {"marker": "o", "markersize": 4, "linewidth": 1.6}
_DOTS: dict[str, Any] = {"s": 7, "alpha": 0.3, "linewidths": 0}


@rc_context(RC)
def size_and_error(sweep: Sweep) -> Figure:
    """Relative error of ΔW over the size in MB, both logarithmic; a point per recipe, a curve per kind of it.

    Points without error are not drawn, since they have no place on a logarithmic axis, and neither are calibrated ones,
    whose error of the weights says little about outputs. The suggested recipe is ringed.
    """
    figure = Figure(figsize=(8.0, 4.6))
    axes = figure.subplots()
    for name, colour, points in _curves(filter(has_error, sweep.points)):
        sizes, errors = [point.bytes / _MEGA for point in points], [point.relative_error for point in points]
        axes.plot(sizes, errors, **_LINE, color=colour, label=name)
    size_axis(axes)
    error_axis(axes)
    axes.set_title(f"How small can it get: {size_text(sweep.bytes)} before")
    if sweep.suggested and has_error(sweep.suggested):
        position = (sweep.suggested.bytes / _MEGA, sweep.suggested.relative_error)
        _mark_suggestion(axes, sweep.suggested.recipe, position, above=-14)
    axes.legend(frameon=False)
    return figure


def has_error(point: Point) -> bool:
    """Whether a point has a place in `size_and_error`."""
    return point.relative_error > 0 and not point.calibrated


@rc_context(RC)
def size_and_pictures(sweep: Sweep) -> Figure:
    """Likeness of the pictures over the size in MB, above in PSNR and below in MS-SSIM; for a sweep that drew pictures.

    A dot per picture, and per recipe their mean with its standard deviation. Lines show what the model draws in the
    other one of float32 and half precision with the original adapter, and without one.
    """
    assert sweep.drawn is not None
    drawn = sweep.drawn
    figure = Figure(figsize=(8.0, 6.4))
    rows = figure.subplots(len(_DRAWN), sharex=True)
    for axes, name in zip(rows, _DRAWN, strict=True):
        measure = next(measure for measure in MEASURES if measure.name == name)
        draw_likeness(axes, sweep, drawn, measure)
    rows[0].set_title(
        f"{count_text(len(drawn.files), 'picture')} against the original adapter's, {size_text(sweep.bytes)}"
    )
    rows[0].set_xlabel("")
    rows[0].legend(frameon=False)
    return figure


@rc_context(RC)
def size_and_texts(sweep: Sweep) -> Figure:
    """Distance of a language model's answers over the size in MB, both logarithmic; for a sweep that read a text.

    A curve per kind of recipe: means with dots per passage. A line shows the distance of the model without an adapter.
    """
    assert sweep.read is not None
    figure = Figure(figsize=(8.0, 4.6))
    axes = figure.subplots()
    for name, colour, points in _curves(point for point in sweep.points if point.texts and point.texts.distance > 0):
        texts = [(point.bytes / _MEGA, point.texts) for point in points if point.texts]
        means = [(size, text.distance) for size, text in texts]
        axes.plot(*zip(*means, strict=True), **_LINE, color=colour, label=name)
        dots = [(size, value) for size, text in texts for value in text.values if value > 0]
        axes.scatter(*zip(*dots, strict=True), **_DOTS, color=colour)
    size_axis(axes)
    axes.set_yscale("log")
    axes.set_ylabel("divergence (nats per token)" if sweep.read.perplexity else sweep.read.measure)
    axes.set_title(
        f"{count_text(sweep.read.passages, 'passage')} against the original adapter, {size_text(sweep.bytes)}"
    )
    none = sweep.read.none.distance
    axes.axhline(none, color=QUIET, linewidth=1.2, linestyle=":", label=f"no adapter: {none:.2g}", zorder=0)
    suggested = sweep.suggested
    if suggested and suggested.texts and suggested.texts.distance > 0:
        _mark_suggestion(axes, suggested.recipe, (suggested.bytes / _MEGA, suggested.texts.distance), above=-14)
    axes.legend(frameon=False)
    return figure


def draw_likeness(axes: Axes, sweep: Sweep, drawn: Drawn, measure: Measure) -> None:
    """One measure of the pictures over the size, with the two ends of its scale."""
    for name, colour, points in _curves(point for point in sweep.points if point.pictures):
        values = [(point.bytes / _MEGA, point.pictures.values[measure.name]) for point in points if point.pictures]
        sizes = [size for size, _ in values]
        means, deviations = ([spread(numbers) for _, numbers in values] for spread in (fmean, pstdev))
        axes.errorbar(sizes, means, deviations, **_LINE, elinewidth=0.8, capsize=2, color=colour, label=name)
        dots = [(size, number) for size, numbers in values for number in numbers]
        axes.scatter(*zip(*dots, strict=True), **_DOTS, color=colour)
    size_axis(axes)
    axes.set_ylabel(f"{measure.title}{f' ({measure.unit.strip()})' * bool(measure.unit)}")
    for pictures, label, style in (
        (drawn.floor, f"the original adapter in {drawn.other_dtype}", "--"),
        (drawn.none, "no adapter", ":"),
    ):
        if pictures:
            mean = fmean(pictures.values[measure.name])
            text = f"{label}: {measure.text(mean)}"
            axes.axhline(mean, color=QUIET, linewidth=1.2, linestyle=style, label=text, zorder=0)
    suggested = sweep.suggested
    if suggested and suggested.pictures:
        position = (suggested.bytes / _MEGA, fmean(suggested.pictures.values[measure.name]))
        _mark_suggestion(axes, suggested.recipe if measure.name == _DRAWN[0] else "", position, above=10)


def _curves(points: Iterable[Point]) -> Iterator[tuple[str, str, list[Point]]]:
    """(name, colour, points) of the recipes of one kind."""
    curves: dict[str, list[Point]] = {}
    for point in points:
        curves.setdefault(point.curve, []).append(point)
    for number, (name, members) in enumerate(curves.items()):
        yield name, COLOURS[number % len(COLOURS)], members


def error_axis(axes: Axes) -> None:
    """A logarithmic y axis of relative errors, in percent."""
    axes.set_yscale("log")
    axes.set_ylabel("error of the weights, ‖lost‖ / ‖ΔW‖")
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:.3g} %"))
    axes.yaxis.set_minor_formatter(NullFormatter())


def size_axis(axes: Axes) -> None:
    """A logarithmic x axis of sizes in MB."""
    axes.margins(0.08)
    axes.set_xscale("log")
    axes.set_xlabel("file size (MB)")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5, 7)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.3g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    grid_below(axes)


def _mark_suggestion(axes: Axes, recipe: str, position: tuple[float, float], *, above: int) -> None:
    """A ring, and the recipe if it is named, so many points above it."""
    axes.plot(*position, marker="o", markersize=11, markerfacecolor="none", markeredgecolor=INK, linestyle="none")
    if recipe:
        axes.annotate(
            f"recommended: {recipe}",
            position,
            (-10, above),
            textcoords="offset points",
            ha="right",
            fontsize=9,
            color=INK,
        )
