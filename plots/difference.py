"""How far B is from A: relative difference per block, and what both sides add there."""

from __future__ import annotations

from typing import TYPE_CHECKING

from matplotlib import rc_context
from matplotlib.figure import Figure

from lorashrink.plots.style import AFTER, BEFORE, INK, RC

if TYPE_CHECKING:
    from collections.abc import Sequence

    from matplotlib.axes import Axes

    from lorashrink.results.comparison import BlockDifference, Comparison


def difference_per_block(comparison: Comparison) -> Figure:
    """‖A − B‖ / ‖A‖ of each block in percent, with a line at that of the whole, above ‖A‖ and ‖B‖.

    Blocks stand in the order in which a picture is made. Blocks without numbers are left out; one to which only B adds
    something has no bar in the upper panel, but the words "only B".
    """
    known = [each for each in comparison.blocks if each.fro_a is not None]
    blocks = sorted(known, key=lambda each: (not each.block.startswith("TE"), each.block))
    with rc_context(RC):
        figure = Figure(figsize=(max(6.0, 1.6 + 0.42 * len(blocks)), 5.4))
        upper, lower = figure.subplots(2, sharex=True, height_ratios=(3, 2))
        _differences(upper, blocks, comparison.total)
        _norms(lower, blocks)
        lower.set_xticks(
            range(len(blocks)), [each.block for each in blocks], rotation=60, ha="right", rotation_mode="anchor"
        )
        lower.set_xlim(-0.7, len(blocks) - 0.3)
        upper.set_title(_title(comparison))
        return figure


def _differences(axes: Axes, blocks: Sequence[BlockDifference], total: BlockDifference) -> None:
    shares = [100 * (each.relative_difference or 0.0) for each in blocks]
    bars = axes.bar(range(len(blocks)), shares, width=0.66, color=AFTER)
    texts = [_percent(each.relative_difference) for each in blocks]
    axes.bar_label(bars, texts, padding=2, fontsize=8, bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.6})
    axes.set_ylabel("‖A − B‖ / ‖A‖ (%)")
    axes.margins(y=0.14)
    axes.set_ylim(bottom=0)
    if total.relative_difference is not None:
        share = 100 * total.relative_difference
        axes.axhline(share, color=INK, linewidth=1, linestyle="--", zorder=0.5, label=f"the whole: {share:.3g} %")
        axes.legend(frameon=False, loc="lower right", bbox_to_anchor=(1.0, 1.0), borderaxespad=0.1, fontsize=9)


def _percent(share: float | None) -> str:
    """For the label of a bar, which has no room for a unit."""
    if share is None:
        return "only B"
    return "0" if share == 0 else f"{100 * share:.2g}" if share < 0.0995 else f"{100 * share:.0f}"


def _norms(axes: Axes, blocks: Sequence[BlockDifference]) -> None:
    places = range(len(blocks))
    axes.bar(places, [each.fro_a or 0.0 for each in blocks], width=0.82, color=BEFORE, label="‖A‖")
    axes.bar(places, [each.fro_b or 0.0 for each in blocks], width=0.46, color=AFTER, label="‖B‖")
    axes.set_ylabel("norm of ΔW")
    axes.legend(frameon=False, ncols=2, loc="lower right", bbox_to_anchor=(1.0, 1.0), borderaxespad=0.1, fontsize=9)


def _title(comparison: Comparison) -> str:
    a, b = comparison.a, comparison.b
    return f"B against A:  {a.bytes / 1e6:.2f} MB → {b.bytes / 1e6:.2f} MB"
