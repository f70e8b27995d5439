"""One look for all figures: a colour-blind-safe palette (Okabe & Ito) and quiet axes, without global state."""

from __future__ import annotations

from typing import Any

BEFORE, AFTER, INK = "#c9d3db", "#0072b2", "#333333"

RC: dict[Any, Any] = {
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlelocation": "left",
    "axes.titlesize": "large",
    "figure.constrained_layout.use": True,
    "font.size": 10,
    "savefig.dpi": 144,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
}
