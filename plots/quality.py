"""Size against error: one curve per kind of recipe."""

from __future__ import annotations

from typing import TYPE_CHECKING

from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from lorashrink.plots.style import COLOURS, INK, QUIET, RC

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from lorashrink.sweeping import Pictures, Point, Suggestion, Sweep

_MEGA = 1e6


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
            _suggestion(axes, sweep.suggestion, sweep.suggestion.relative_error, below=True)
        axes.legend(frameon=False)
        return figure


def size_and_pictures(sweep: Sweep) -> Figure:
    """PSNR of the pictures in dB over the size in MB, with standard deviations; for a sweep that drew pictures.

    Lines show what the model draws in the other one of float32 and float16 with the whole adapter, and without one.
    """
    assert sweep.drawn is not None
    drawn, other = sweep.drawn, "float16" if sweep.drawn.dtype == "float32" else "float32"
    curves: dict[str, list[tuple[float, Pictures]]] = {}
    for point in sweep.points:
        if point.pictures is not None:
            curves.setdefault(point.curve, []).append((point.bytes / _MEGA, point.pictures))
    with rc_context(RC):
        figure = Figure(figsize=(8.0, 4.6))
        axes = figure.subplots()
        for number, (name, points) in enumerate(curves.items()):
            axes.errorbar(
                [size for size, _ in points],
                [pictures.psnr for _, pictures in points],
                [pictures.psnr_deviation for _, pictures in points],
                marker="o",
                markersize=4,
                linewidth=1.6,
                elinewidth=0.8,
                capsize=2,
                color=COLOURS[number % len(COLOURS)],
                label=name,
            )
        _sizes(axes)
        axes.set_ylabel("pictures: PSNR (dB), higher is more alike")
        count = len(drawn.files)
        axes.set_title(f"{count} picture{'s' * (count != 1)} against the whole adapter's, {sweep.bytes / _MEGA:.3g} MB")
        if drawn.floor:
            _line(axes, drawn.floor.psnr, f"the whole adapter in {other}", "--")
        _line(axes, drawn.none.psnr, "no adapter", ":")
        chosen = next((point for point in sweep.points if _is_suggested(point, sweep)), None)
        if chosen and chosen.pictures and sweep.suggestion:
            _suggestion(axes, sweep.suggestion, chosen.pictures.psnr, below=False)
        axes.legend(frameon=False)
        return figure


def _is_suggested(point: Point, sweep: Sweep) -> bool:
    return sweep.suggestion is not None and point.recipe == sweep.suggestion.recipe


def _line(axes: Axes, height: float, label: str, style: str) -> None:
    axes.axhline(height, color=QUIET, linewidth=1.2, linestyle=style, label=f"{label}: {height:.1f} dB", zorder=0)


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


def _suggestion(axes: Axes, suggestion: Suggestion, height: float, *, below: bool) -> None:
    place = (suggestion.bytes / _MEGA, height)
    axes.plot(*place, marker="o", markersize=11, markerfacecolor="none", markeredgecolor=INK, linestyle="none")
    axes.annotate(
        f"begin with {suggestion.recipe}",
        place,
        (-10, -14 if below else 10),
        textcoords="offset points",
        ha="right",
        fontsize=9,
        color=INK,
    )
