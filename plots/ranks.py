"""Rank per block before and after shrinking."""

from __future__ import annotations

from statistics import fmean

from matplotlib import rc_context
from matplotlib.figure import Figure

from lorashrink.names import block
from lorashrink.plots.axes import name_ticks, width_of_blocks
from lorashrink.plots.blocks import order
from lorashrink.plots.style import AFTER, BEFORE, RC
from lorashrink.results.shrinking import FileResult, LayerResult
from lorashrink.text import share_text, size_text


@rc_context(RC)
def rank_per_block(result: FileResult) -> Figure:
    """Mean rank of the layers of each block, before and after, as a bar in a bar, with the number kept on top.

    A removed layer counts with rank 0. Blocks stand in the order in which a picture is made.
    """
    members: dict[str, list[LayerResult]] = {}
    for layer in result.layers:
        members.setdefault(block(layer.name), []).append(layer)
    names = sorted(members, key=order)
    before = [fmean(layer.rank_before for layer in members[name]) for name in names]
    after = [fmean(layer.rank_after for layer in members[name]) for name in names]
    figure = Figure(figsize=(width_of_blocks(len(names)), 3.8))
    axes = figure.subplots()
    axes.bar(range(len(names)), before, width=0.82, color=BEFORE, label="before")
    bars = axes.bar(range(len(names)), after, width=0.52, color=AFTER, label="after")
    axes.bar_label(bars, [f"{rank:.1f}" if 0 < rank < 10 else f"{rank:.0f}" for rank in after], padding=2, fontsize=8)
    name_ticks(axes, names)
    axes.set_ylabel("mean rank per layer")
    sizes = f"{size_text(result.bytes_before)} → {size_text(result.bytes_after)}"
    axes.set_title(f"{result.recipe}:  {sizes},  error {share_text(result.relative_error)}")
    axes.legend(frameon=False, ncols=2, loc="upper right")
    axes.set_ylim(top=axes.get_ylim()[1] * 1.15)
    return figure
