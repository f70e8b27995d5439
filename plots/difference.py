"""How far B is from A: relative difference per block, and what both sides add there."""

from __future__ import annotations

from typing import TYPE_CHECKING

from matplotlib import rc_context
from matplotlib.figure import Figure

from lorashrink.plots.axes import legend_above, name_ticks, width_of_blocks
from lorashrink.plots.blocks import order
from lorashrink.plots.style import AFTER, BEFORE, INK, RC
from lorashrink.text import bare_percent_text, percent_text, size_text

if TYPE_CHECKING:
    from lorashrink.results.comparison import Comparison


@rc_context(RC)
def difference_per_block(comparison: Comparison) -> Figure:
    """‖A − B‖ / ‖A‖ of each block in percent, with a line at that of all blocks, above ‖A‖ and ‖B‖.

    Blocks stand in the order in which a picture is made. Blocks without numbers are left out; one to which a side
    alone adds something has the words "only in A", above a bar of 100 %, or "only in B", above none.
    """
    blocks = sorted((row for row in comparison.blocks if row.fro_a is not None), key=lambda row: order(row.block))
    figure = Figure(figsize=(width_of_blocks(len(blocks)), 5.4))
    upper, lower = figure.subplots(2, sharex=True, height_ratios=(3, 2))
    shares = [row.relative_difference for row in blocks]
    bars = upper.bar(range(len(blocks)), [100 * (share or 0.0) for share in shares], width=0.66, color=AFTER)
    texts = [
        "only in A" if row.fro_a and not row.fro_b
        else "only in B" if row.fro_b and not row.fro_a
        else "" if row.relative_difference is None
        else bare_percent_text(100 * row.relative_difference)
        for row in blocks
    ]  # fmt: skip
    upper.bar_label(bars, texts, padding=2, fontsize=8, bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.6})
    upper.set_ylabel("‖A − B‖ / ‖A‖ (%)")
    upper.margins(y=0.14)
    upper.set_ylim(bottom=0)
    total = comparison.total.relative_difference
    if total is not None:
        label = f"the whole: {percent_text(total)}"
        upper.axhline(100 * total, color=INK, linewidth=1, linestyle="--", zorder=0.5, label=label)
        legend_above(upper)
    lower.bar(range(len(blocks)), [row.fro_a or 0.0 for row in blocks], width=0.82, color=BEFORE, label="‖A‖")
    lower.bar(range(len(blocks)), [row.fro_b or 0.0 for row in blocks], width=0.46, color=AFTER, label="‖B‖")
    lower.set_ylabel("norm of ΔW")
    legend_above(lower, columns=2)
    name_ticks(lower, [row.block for row in blocks])
    lower.set_xlim(-0.7, len(blocks) - 0.3)
    upper.set_title(f"B against A:  {size_text(comparison.a.bytes)} → {size_text(comparison.b.bytes)}")
    return figure
