"""Quality of pictures over the size of files, a curve for each method, with its name beside it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from matplotlib import rc_context
from matplotlib.figure import Figure

from lorashrink.plots.quality import size_axis
from lorashrink.plots.style import COLOURS, QUIET, RC

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from lorashrink.results.evidence import Evidence

# How the curves of one method differ by dtype.
_STYLES = {"fp16": "-", "bf16": "-", "fp8": "--", "mixed": "-.", "packed": ":"}

_LEAST_GAP = 0.045  # between names, of the height of the axes

# The points of a curve: (bytes, dB).
Points = Sequence[tuple[float, float]]


def size_and_quality(evidence: Evidence, adapter: str) -> Figure:
    """PSNR over bytes of tensors, of the mean picture and of the worst one, for all curves of an adapter."""
    points = {name: evidence.points(adapter, name) for name in evidence.curves}
    means = {name: [(point.payload, point.mean_db) for point in points[name]] for name in points}
    worst = {name: [(point.payload, point.worst_db) for point in points[name]] for name in points}
    return named_curves(
        {"mean PSNR (dB)": means, "PSNR of the worst picture (dB)": worst}, quality=evidence.quality, title=adapter
    )


@rc_context(RC)
def named_curves(panels: Mapping[str, Mapping[str, Points]], *, quality: float, title: str) -> Figure:
    """Curves over bytes on a logarithmic axis, with their names beside them: label of the y axis -> curves.

    Names are a method and a dtype: a colour is a method, a kind of line a dtype. The first panel has a line at
    `quality`.
    """
    names = dict.fromkeys(name for curves in panels.values() for name in curves)
    scores = list(dict.fromkeys(name.rpartition(" ")[0] for name in names))
    figure = Figure(figsize=(7.2 if len(panels) == 1 else 11.0, 4.6))
    all_axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for axes, (label, curves) in zip(all_axes, panels.items(), strict=True):
        ends = []
        for name, points in curves.items():
            if not points:
                continue
            score, _, dtype = name.rpartition(" ")
            colour = COLOURS[scores.index(score) % len(COLOURS)]
            sizes, levels = [size / 1e6 for size, _ in points], [level for _, level in points]
            axes.plot(sizes, levels, _STYLES[dtype], marker="o", markersize=3.5, linewidth=1.6, color=colour)
            ends.append((name, sizes[-1], levels[-1], colour))
        size_axis(axes)
        axes.set_xlabel("size of tensors (MB)")
        axes.set_ylabel(label)
        _name_curves(axes, ends)
    all_axes[0].axhline(quality, color=QUIET, linewidth=0.8, linestyle=":", zorder=0)
    all_axes[0].set_title(title)
    return figure


def _name_curves(axes: Axes, ends: Sequence[tuple[str, float, float, str]]) -> None:
    """A name at the right of the axes for each curve (name, x and y of its end, colour), with a line to its end."""
    low, high = axes.get_ylim()
    rising = sorted(ends, key=lambda end: end[2])
    groups: list[list[float]] = []  # heights of names that touch; they move as little as keeps them apart
    for _, _, level, _ in rising:
        groups.append([(level - low) / (high - low)])
        while len(groups) > 1 and _first(groups[-1]) < _first(groups[-2]) + _LEAST_GAP * len(groups[-2]):
            last = groups.pop()
            groups[-1] += last
    heights = [_first(group) + _LEAST_GAP * number for group in groups for number in range(len(group))]
    for (name, size, level, colour), height in zip(rising, heights, strict=True):
        axes.annotate(
            name,
            (size, level),
            xytext=(1.02, height),
            textcoords="axes fraction",
            fontsize=8.5,
            color=colour,
            va="center",
            arrowprops={"arrowstyle": "-", "color": colour, "linewidth": 0.6, "alpha": 0.5, "shrinkA": 0},
        )


def _first(group: Sequence[float]) -> float:
    """Where a group begins whose middle is the mean of its numbers."""
    return sum(group) / len(group) - _LEAST_GAP * (len(group) - 1) / 2
