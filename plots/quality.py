"""Size against error: one curve per kind of recipe."""

from __future__ import annotations

from typing import TYPE_CHECKING

from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from lorashrink.plots.style import COLOURS, INK, RC

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from lorashrink.sweeping import Point, Sweep

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
        axes.margins(0.08)
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_xlabel("file size (MB)")
        axes.set_ylabel("error of the weights, ‖lost‖ / ‖ΔW‖")
        axes.set_title(f"How small can it get: {sweep.bytes / _MEGA:.3g} MB before")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5, 7)))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.3g}"))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:.3g} %"))
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_minor_formatter(NullFormatter())
        axes.grid(which="major", color="#e6e6e6", linewidth=0.8)
        axes.set_axisbelow(True)
        _suggestion(axes, sweep)
        axes.legend(frameon=False)
        return figure


def _curve(axes: Axes, name: str, points: list[Point], colour: str) -> None:
    sizes = [point.bytes / _MEGA for point in points]
    errors = [point.relative_error for point in points]
    axes.plot(sizes, errors, marker="o", markersize=4, linewidth=1.6, color=colour, label=name)


def _suggestion(axes: Axes, sweep: Sweep) -> None:
    if sweep.suggestion is None:
        return
    place = (sweep.suggestion.bytes / _MEGA, sweep.suggestion.relative_error)
    axes.plot(*place, marker="o", markersize=11, markerfacecolor="none", markeredgecolor=INK, linestyle="none")
    axes.annotate(
        f"begin with {sweep.suggestion.recipe}",
        place,
        (-10, -14),
        textcoords="offset points",
        ha="right",
        fontsize=9,
        color=INK,
    )
