"""Size against error, and against pictures: one curve per kind of recipe."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean, pstdev
from typing import TYPE_CHECKING

from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from lorashrink.pictures.likeness import MEASURES, Measure
from lorashrink.plots.style import COLOURS, INK, QUIET, RC

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from lorashrink.results.sweep import Point, Suggestion, Sweep

_MEGA = 1e6
_DRAWN = ("psnr", "ms_ssim")  # the measures that are drawn, from the top


def size_and_error(sweep: Sweep) -> Figure:
    """Relative error of ΔW over the size in MB, both logarithmic; a point per recipe, a curve per kind of it.

    Points without error are not drawn, since they have no place on a logarithmic axis. The suggested recipe is ringed.
    """
    curves: dict[str, list[Point]] = {}
    for point in sweep.points:
        if point.relative_error > 0:
            curves.setdefault(point.curve, []).append(point)
    with rc_context(RC):
        figure = Figure(figsize=(8.0, 4.6))
        axes = figure.subplots()
        for number, (name, points) in enumerate(curves.items()):
            _curve(axes, name, points, COLOURS[number % len(COLOURS)])
        _sizes(axes)
        axes.set_yscale("log")
        axes.set_ylabel("error of the weights, ‖lost‖ / ‖ΔW‖")
        axes.set_title(f"How small can it get: {sweep.bytes / _MEGA:.3g} MB before")
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:.3g} %"))
        axes.yaxis.set_minor_formatter(NullFormatter())
        if sweep.suggestion:
            place = (sweep.suggestion.bytes / _MEGA, sweep.suggestion.relative_error)
            _suggestion(axes, sweep.suggestion, place, below=True)
        axes.legend(frameon=False)
        return figure


def size_and_pictures(sweep: Sweep) -> Figure:
    """Likeness of the pictures over the size in MB, above in PSNR and below in MS-SSIM; for a sweep that drew pictures.

    A dot per picture, and per recipe their mean with its standard deviation. Lines show what the model draws in the
    other one of float32 and half precision with the whole adapter, and without one.
    """
    assert sweep.drawn is not None
    drawn = sweep.drawn
    with rc_context(RC):
        figure = Figure(figsize=(8.0, 6.4))
        rows = figure.subplots(len(_DRAWN), sharex=True)
        for axes, name in zip(rows, _DRAWN, strict=True):
            _likeness(axes, sweep, name)
        count = len(drawn.files)
        rows[0].set_title(
            f"{count} picture{'s' * (count != 1)} against the whole adapter's, {sweep.bytes / _MEGA:.3g} MB"
        )
        rows[0].set_xlabel("")
        rows[0].legend(frameon=False)
        return figure


def _likeness(axes: Axes, sweep: Sweep, name: str) -> None:
    assert sweep.drawn is not None
    measure = next(each for each in MEASURES if each.name == name)
    curves: dict[str, list[tuple[float, Sequence[float]]]] = {}
    for point in sweep.points:
        if point.pictures is not None:
            curves.setdefault(point.curve, []).append((point.bytes / _MEGA, point.pictures.values[name]))
    for number, (label, points) in enumerate(curves.items()):
        _spread(axes, label, points, COLOURS[number % len(COLOURS)])
    _sizes(axes)
    axes.set_ylabel(f"{measure.title}{f' ({measure.unit.strip()})' * bool(measure.unit)}")
    for pictures, label, style in (
        (sweep.drawn.floor, f"the whole adapter in {sweep.drawn.other_dtype}", "--"),
        (sweep.drawn.none, "no adapter", ":"),
    ):
        if pictures:
            _line(axes, fmean(pictures.values[name]), label, measure, style)
    chosen = next((point for point in sweep.points if _is_suggested(point, sweep)), None)
    if chosen and chosen.pictures and sweep.suggestion:
        place = (chosen.bytes / _MEGA, fmean(chosen.pictures.values[name]))
        if name == _DRAWN[0]:
            _suggestion(axes, sweep.suggestion, place, below=False)
        else:
            _ring(axes, place)


def _spread(axes: Axes, label: str, points: Sequence[tuple[float, Sequence[float]]], colour: str) -> None:
    axes.errorbar(
        [size for size, _ in points],
        [fmean(values) for _, values in points],
        [pstdev(values) for _, values in points],
        marker="o",
        markersize=4,
        linewidth=1.6,
        elinewidth=0.8,
        capsize=2,
        color=colour,
        label=label,
    )
    sizes = [size for size, values in points for _ in values]
    dots = [value for _, values in points for value in values]
    axes.scatter(sizes, dots, s=7, color=colour, alpha=0.3, linewidths=0)


def _is_suggested(point: Point, sweep: Sweep) -> bool:
    return sweep.suggestion is not None and point.recipe == sweep.suggestion.recipe


def _line(axes: Axes, height: float, label: str, measure: Measure, style: str) -> None:
    text = f"{label}: {measure.text(height)}"
    axes.axhline(height, color=QUIET, linewidth=1.2, linestyle=style, label=text, zorder=0)


def _sizes(axes: Axes) -> None:
    """The axis that both figures have."""
    axes.margins(0.08)
    axes.set_xscale("log")
    axes.set_xlabel("file size (MB)")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5, 7)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.3g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.grid(which="major", color="#e6e6e6", linewidth=0.8)
    axes.set_axisbelow(True)


def _curve(axes: Axes, name: str, points: list[Point], colour: str) -> None:
    sizes = [point.bytes / _MEGA for point in points]
    errors = [point.relative_error for point in points]
    axes.plot(sizes, errors, marker="o", markersize=4, linewidth=1.6, color=colour, label=name)


def _suggestion(axes: Axes, suggestion: Suggestion, place: tuple[float, float], *, below: bool) -> None:
    _ring(axes, place)
    axes.annotate(
        f"begin with {suggestion.recipe}",
        place,
        (-10, -14 if below else 10),
        textcoords="offset points",
        ha="right",
        fontsize=9,
        color=INK,
    )


def _ring(axes: Axes, place: tuple[float, float]) -> None:
    axes.plot(*place, marker="o", markersize=11, markerfacecolor="none", markeredgecolor=INK, linestyle="none")
