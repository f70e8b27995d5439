"""Who gets along with whom: two matrices, the cosine of every pair of adapters and how much their subspaces overlap."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.ticker import MultipleLocator

from lorashrink.plots.axes import matrix_frame, name_ticks
from lorashrink.plots.style import INK, RC
from lorashrink.results.overlap import short_names

if TYPE_CHECKING:
    from collections.abc import Sequence

    from matplotlib.axes import Axes

    from lorashrink.results.overlap import Overlap, Table

# Both are safe for colour-blind readers (Brewer & Harrower, https://colorbrewer2.org).
_SIGNED, _SHARE = "PuOr", "Purples"
_DARK = 0.62  # share of a colour scale's reach above which ink on it is white
_LONGEST = 22  # characters of a name
_FEW = 8  # adapters whose cells have room for three digits


@rc_context(RC)
def overlap_matrices(overlap: Overlap) -> Figure:
    """Cosines of ΔW from -1 to 1, and overlaps of its subspaces from 0 to 1, as colours and numbers.

    What an adapter has in common with itself is left empty; a pair of which one changes nothing has a dash. The names
    are those of the files, with their weights where not all are 1.
    """
    weighted = any(member.weight != 1 for member in overlap.adapters)
    names = [
        f"{_shortened(name)} : {member.weight:g}" if weighted else _shortened(name)
        for name, member in zip(
            short_names([member.path for member in overlap.adapters]), overlap.adapters, strict=True
        )
    ]
    side = max(2.3, 0.44 * len(names))
    figure = Figure(figsize=(2 * side + 4.6, side + 1.9))
    left, right = figure.subplots(1, 2)
    _matrix(left, overlap.cosine, names, _SIGNED, -1.0, "Cosine of what they add")
    _matrix(right, overlap.subspace, names, _SHARE, 0.0, "Overlap of their subspaces")
    right.tick_params(labelleft=False)
    return figure


def _shortened(name: str) -> str:
    """Both ends of a long name: versions stand at the end."""
    return name if len(name) <= _LONGEST else f"{name[: _LONGEST // 2]}…{name[-_LONGEST // 2 + 1 :]}"


def _matrix(axes: Axes, values: Table, names: Sequence[str], colours: str, low: float, title: str) -> None:
    table = np.array([[math.nan if value is None else value for value in line] for line in values])
    np.fill_diagonal(table, math.nan)
    image = axes.imshow(np.ma.masked_invalid(table), cmap=colours, vmin=low, vmax=1.0)
    few = len(names) <= _FEW
    for (line, column), value in np.ndenumerate(table):
        if line != column:
            text = "–" if math.isnan(value) else f"{value:.2f}"
            if not few:  # cells are narrow
                text = f"{value:.1f}" if abs(value) >= 0.995 else text.replace("0.", ".", 1)
            text = text if text.strip("-0.") else text.removeprefix("-")
            axes.text(
                column, line, text, ha="center", va="center", fontsize=9 if few else 7,
                color="white" if abs(value) > _DARK else INK,
            )  # fmt: skip
    axes.set_title(title)
    name_ticks(axes, names, rotation=45)
    axes.set_yticks(range(len(names)), names)
    bar = matrix_frame(axes, image, shrink=0.8, pad=0.03, aspect=24)
    bar.locator = MultipleLocator(0.5)
    bar.update_ticks()
