"""Size against error of one adapter, with the choice that was made."""

from __future__ import annotations

from typing import TYPE_CHECKING

from matplotlib import rc_context
from matplotlib.figure import Figure

from lorashrink.plots.quality import error_axis, size_axis
from lorashrink.plots.style import COLOURS, RC
from lorashrink.text import percent_text, size_text

if TYPE_CHECKING:
    from lorashrink.results.prepared import Curve, Outcome

_MEGA = 1e6


@rc_context(RC)
def size_and_choice(curve: Curve, chosen: Outcome | None = None) -> Figure:
    """Relative error of ΔW over the size in MB, both logarithmic, and the chosen outcome as a ring."""
    outcomes = [outcome for outcome in curve.outcomes if outcome.relative_error > 0]
    figure = Figure(figsize=(8.0, 4.6))
    axes = figure.subplots()
    sizes, errors = [outcome.bytes / _MEGA for outcome in outcomes], [outcome.relative_error for outcome in outcomes]
    axes.plot(sizes, errors, linewidth=1.8, color=COLOURS[0])
    if chosen is not None and chosen.relative_error > 0:
        axes.plot(chosen.bytes / _MEGA, chosen.relative_error, "o", markersize=11, mew=2, mfc="none", mec=COLOURS[1])
    size_axis(axes)
    error_axis(axes)
    choice = f", chosen {size_text(chosen.bytes)} at {percent_text(chosen.relative_error)} error" if chosen else ""
    axes.set_title(f"{size_text(curve.bytes)} before{choice}")
    return figure
