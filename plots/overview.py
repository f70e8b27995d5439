"""What was asked for in training, at a glance: rank, alpha and scale of the layers of each block."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from lorashrink.plots.axes import grid_below, legend_above, name_ticks, width_of_blocks
from lorashrink.plots.blocks import grouped
from lorashrink.plots.style import COLOURS, QUIET, RC

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from lorashrink.results.inspection import AdapterTable, LayerRow

_MOST_BLOCKS = 24
_WIDE = 4.0  # largest over smallest value from which an axis is logarithmic
_SMALLEST, _LARGEST = 16.0, 150.0  # area of a dot, points²
_PANELS: tuple[tuple[str, Callable[[LayerRow], float | None]], ...] = (
    ("rank", lambda row: row.rank),
    ("alpha", lambda row: row.alpha),
    ("scale", lambda row: row.scale),
)
# Convolutions apart and a little to the side, since they often have ranks and alphas of their own.
_SERIES = (("convolutions", True, COLOURS[1], 0.17), ("other layers", False, COLOURS[0], -0.17))


@rc_context(RC)
def layer_overview(table: AdapterTable) -> Figure:
    """Rank, alpha and scale over the blocks: a dot for each value, the larger the more layers of the block have it.

    Layers whose alpha or scale is not known are not in that panel; a panel without any says so.
    """
    groups = grouped([row.block for row in table.layers], _MOST_BLOCKS)
    positions = {block: number for number, members in enumerate(groups.values()) for block in members}
    figure = Figure(figsize=(max(6.4, width_of_blocks(len(groups))), 5.6))
    panels = figure.subplots(len(_PANELS), sharex=True)
    for axes, (name, value_of) in zip(panels, _PANELS, strict=True):
        _panel(axes, name, value_of, table.layers, positions)
    panels[0].set_title("Rank, alpha and scale")
    drawn = {dots.get_label(): dots for axes in panels for dots in axes.collections}
    if len(drawn) > 1:
        legend = legend_above(panels[0], drawn.values(), drawn.keys(), columns=2)
        handles: Sequence[Any] = legend.legend_handles  # of dots, which have sizes
        for handle in handles:
            handle.set_sizes([40.0])
    name_ticks(panels[-1], list(groups))
    panels[-1].set_xlim(-0.7, max(1, len(groups)) - 0.3)
    return figure


def _panel(
    axes: Axes,
    name: str,
    value_of: Callable[[LayerRow], float | None],
    rows: Sequence[LayerRow],
    positions: Mapping[str, int],
) -> None:
    axes.set_ylabel(name)
    grid_below(axes, "y")
    values = [(row, value) for row in rows if (value := value_of(row)) is not None and math.isfinite(value)]
    if not values:
        axes.set_yticks([])
        axes.text(0.5, 0.5, f"no layer tells its {name}", transform=axes.transAxes, ha="center", color=QUIET)
        return
    counts = {
        label: Counter((positions[row.block], float(value)) for row, value in values if (row.kind == "conv") == kernels)
        for label, kernels, _, _ in _SERIES
    }
    most = max(count for counter in counts.values() for count in counter.values())
    for label, _, colour, side in _SERIES:
        dots = sorted(counts[label])
        if dots:
            axes.scatter(
                [position + side for position, _ in dots],
                [value for _, value in dots],
                [_SMALLEST + (_LARGEST - _SMALLEST) * counts[label][dot] / most for dot in dots],
                color=colour, edgecolors="white", linewidths=0.5, label=label,
            )  # fmt: skip
    low, high = min(value for _, value in values), max(value for _, value in values)
    if low > 0 and high >= _WIDE * low:
        axes.set_yscale("log", base=2)
        axes.set_ylim(low / 1.5, high * 1.5)
        axes.yaxis.set_major_locator(LogLocator(base=2, numticks=6))
        axes.yaxis.set_minor_locator(NullLocator())
    else:
        margin = 0.2 * (max(high, 0.0) - min(low, 0.0) or 1.0)
        axes.set_ylim(min(low - margin, 0.0) if low < 0 else 0.0, high + margin if high > 0 else margin)
        axes.yaxis.set_major_locator(MaxNLocator(4, integer=all(value == int(value) for _, value in values)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.3g}"))
