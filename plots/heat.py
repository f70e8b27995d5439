"""Where an adapter changes its base most: norms relative to the base's, block by kind of layer."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
from matplotlib import rc_context
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from lorashrink.plots.axes import matrix_frame
from lorashrink.plots.blocks import grouped
from lorashrink.plots.style import INK, RC
from lorashrink.text import bare_percent_text

if TYPE_CHECKING:
    from lorashrink.results.inspection import AdapterTable

_MOST_LINES = 40
# Perceptually even and safe for colour-blind readers (Nuñez, Anderton & Renslow 2018).
_MAP = "cividis"
_KINDS = {
    "te": "text encoder",
    "attn": "attention",
    "mlp": "feed-\nforward",
    "proj": "projection",
    "conv": "convolution",
    "time": "time",
    "mod": "modulation",
    "other": "other",
}
_DARK = 0.55  # share of the colour scale below which what is written on it is light
# On the colours of the scale; not the paper's and the ink's own, which change places on a dark page.
_LIGHT_TEXT, _DARK_TEXT = "#fefefe", "#010101"


@rc_context(RC)
def norms_by_kind(table: AdapterTable) -> Figure:
    """√(Σ‖ΔW‖² / Σ‖W‖²) in percent of the layers of each kind in each block, as colour and number.

    Only layers whose base weight is known count. A cell is empty where the adapter has none, and says 0 without a
    colour where all are zero. Without any there is a sentence in the place of the map.
    """
    rows = [row for row in table.layers if row.fro is not None and row.base_fro]
    groups = grouped([row.block for row in rows], _MOST_LINES)
    kinds = [kind for kind in _KINDS if any(row.kind == kind for row in rows)]
    shares = np.full((len(groups), len(kinds)), math.nan)
    for line, members in enumerate(groups.values()):
        for column, kind in enumerate(kinds):
            if cell := [row for row in rows if row.block in members and row.kind == kind]:
                norm_of_change = math.hypot(*(row.fro or 0.0 for row in cell))
                shares[line, column] = 100 * norm_of_change / math.hypot(*(row.base_fro or 0.0 for row in cell))
    figure = Figure(figsize=(max(5.6, 2.2 + 1.0 * len(kinds)), max(2.4, 1.5 + 0.28 * len(groups))))
    axes = figure.subplots()
    axes.set_title("Norm of ΔW in % of the base weight's")
    if not rows:
        axes.set_axis_off()
        axes.text(0.5, 0.5, "no layer changes a weight of this base", ha="center", color=INK)
        return figure
    with np.errstate(invalid="ignore"):
        positive = shares[shares > 0]
    low, high = (positive.min(), positive.max()) if positive.size else (1.0, 1.0)
    norm = LogNorm(low / 1.001, high * 1.001)
    image = axes.imshow(np.ma.masked_where(~(shares > 0), shares), cmap=_MAP, norm=norm, aspect="auto")
    for (line, column), value in np.ndenumerate(shares):
        if not math.isnan(value):
            colour = (_LIGHT_TEXT if norm(value) < _DARK else _DARK_TEXT) if value > 0 else INK
            axes.text(column, line, bare_percent_text(value), ha="center", va="center", fontsize=8, color=colour)
    axes.set_xticks(range(len(kinds)), [_KINDS[kind] for kind in kinds])
    axes.set_yticks(range(len(groups)), list(groups))
    bar = matrix_frame(axes, image, pad=0.02, aspect=30)
    bar.ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    bar.ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.3g} %"))
    bar.ax.yaxis.set_minor_formatter(NullFormatter())
    return figure
