"""Parts of axes that several figures have."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

from lorashrink.plots.style import GRID

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.colorbar import Colorbar
    from matplotlib.image import AxesImage
    from matplotlib.legend import Legend


def width_of_blocks(count: int) -> float:
    """The width in inches of a figure with a name below each block."""
    return max(6.0, 1.6 + 0.42 * count)


def name_ticks(axes: Axes, names: Sequence[str], rotation: float = 60) -> None:
    """Names below 0, 1, 2, ..., turned so that long ones fit."""
    axes.set_xticks(range(len(names)), names, rotation=rotation, ha="right", rotation_mode="anchor")


def legend_above(axes: Axes, *entries: Any, columns: int = 1) -> Legend:
    """A legend above the right end of the axes. entries: handles and labels, where not all that is drawn."""
    return axes.legend(
        *entries,
        frameon=False,
        ncols=columns,
        loc="lower right",
        bbox_to_anchor=(1.0, 1.0),
        borderaxespad=0.1,
        fontsize=9,
    )


def grid_below(axes: Axes, axis: Literal["both", "x", "y"] = "both") -> None:
    """Thin lines at the major ticks, below what is drawn."""
    axes.grid(axis=axis, which="major", color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)


def matrix_frame(axes: Axes, image: AxesImage, **options: Any) -> Colorbar:
    """Take frame and tick marks from a matrix of colours, and put the scale beside it. options: of the scale."""
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    bar = axes.figure.colorbar(image, ax=axes, **options)
    bar.outline.set_visible(False)
    return bar
