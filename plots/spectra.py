"""How fast singular values fall, block by block: what can be dropped."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, NullLocator

from lorashrink.plots.blocks import grouped
from lorashrink.plots.style import COLOURS, INK, RC
from lorashrink.text import count_text, size_text

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from numpy.typing import NDArray

    from lorashrink.results.inspection import AdapterTable, LayerRow

_MOST_PANELS, _COLUMNS = 24, 6
_QUARTILES = (25, 50, 75)
_DECADES = 6  # below the largest value; what is smaller is rounding
# Apart, since they often have other ranks: one median over both would jump where the shorter ones end.
_LINES = (("convolutions", COLOURS[1]), ("other layers", COLOURS[0]))


@rc_context(RC)
def spectra_per_block(table: AdapterTable) -> Figure:
    """σ_i of ΔW over i: the median of a block's layers and the middle half of them, a panel for each block.

    Convolutions have a line of their own, named after its kind. Needs rows with `singular_values`; layers without, and
    values of zero, are left out. Without any layer there is one panel that says so.
    """
    rows = [row for row in table.layers if row.singular_values and row.singular_values[0] > 0]
    groups = grouped([row.block for row in rows], _MOST_PANELS)
    columns = min(_COLUMNS, max(1, len(groups)))
    lines = max(1, math.ceil(len(groups) / columns))
    figure = Figure(figsize=(max(5.0, 1.2 + 1.75 * columns), 1.3 + 1.6 * lines))
    panels = figure.subplots(lines, columns, sharex=True, sharey=True, squeeze=False).ravel()
    for axes, (label, members) in zip(panels, groups.items(), strict=False):
        _panel(axes, label, [row for row in rows if row.block in members])
    for number, axes in enumerate(panels[: len(groups)]):
        axes.tick_params(labelbottom=number + columns >= len(groups))
    for axes in panels[max(1, len(groups)) :]:
        axes.set_visible(False)
    figure.suptitle(f"Singular values per block, {size_text(table.bytes)}", x=0.01, ha="left", fontsize="large")
    if not rows:
        panels[0].set_axis_off()
        panels[0].text(0.5, 0.5, "no layer has singular values above zero", ha="center", color=INK)
        return figure
    # The panels share their axes, which are as wide as what is drawn in all of them.
    bands = [band for axes in panels[: len(groups)] for band in axes.collections]
    extent = np.concatenate([path.vertices for band in bands for path in band.get_paths()])
    (_, bottom), (longest, top) = extent.min(axis=0).tolist(), extent.max(axis=0).tolist()
    first = panels[0]
    first.set_xscale("log")
    first.set_yscale("log")
    first.set_xlim(0.9, max(2.0, longest) * 1.1)
    first.set_ylim(max(bottom, top * 10.0**-_DECADES) / 1.3, top * 1.3)
    first.xaxis.set_major_locator(LogLocator(base=4 if longest > 16 else 2, numticks=6))
    first.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.0f}"))
    first.xaxis.set_minor_locator(NullLocator())
    first.yaxis.set_minor_formatter(NullFormatter())
    drawn = {line.get_label(): line for axes in panels for line in axes.get_lines()}
    figure.legend(
        drawn.values(),
        [f"{label if len(drawn) > 1 else 'layers'}: median and middle half" for label in drawn],
        loc="outside upper right", ncols=2, frameon=False, fontsize=9,
    )  # fmt: skip
    figure.supxlabel("dimension of a layer, largest first", fontsize=10)
    figure.supylabel("singular value of ΔW", fontsize=10)
    return figure


def quartiles(rows: Sequence[LayerRow]) -> NDArray[np.float64]:
    """[3, longest] lower quartile, median and upper quartile of σ_i over the layers that have an i-th one above 0."""
    values = [np.asarray(row.singular_values or (), dtype=np.float64) for row in rows]
    longest = max(map(len, values), default=0)
    table = np.full((len(values), longest), np.nan)
    for line, sigma in zip(table, values, strict=True):
        line[: len(sigma)] = np.where(sigma > 0, sigma, np.nan)
    used = ~np.isnan(table).all(axis=0)
    return np.nanpercentile(table[:, used], _QUARTILES, axis=0) if used.any() else np.empty((3, 0))


def _panel(axes: Axes, label: str, rows: Sequence[LayerRow]) -> None:
    for name, colour in _LINES:
        members = [row for row in rows if (row.kind == "conv") == (name == "convolutions")]
        low, middle, high = quartiles(members)
        dimensions = np.arange(1, len(middle) + 1)
        if members:
            axes.fill_between(dimensions, low, high, color=colour, alpha=0.25, linewidth=0)
            # A layer of rank 1 is a point, which a line does not show.
            marker = "o" if len(middle) == 1 else None
            axes.plot(dimensions, middle, color=colour, linewidth=1.8, marker=marker, markersize=4, label=name)
    axes.set_title(f"{label}  ·  {count_text(len(rows), 'layer')}", fontsize=9)
