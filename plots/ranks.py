"""Rank per block before and after shrinking."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

from matplotlib import rc_context
from matplotlib.figure import Figure

from lorashrink.names import block
from lorashrink.plots.style import AFTER, BEFORE, RC

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from lorashrink.results.shrinking import FileResult, LayerResult

_ORDER = ("TE", "IN", "MID", "OUT", "other")


def rank_per_block(result: FileResult) -> Figure:
    """Mean rank of the layers of each block, before and after, as a bar in a bar, with the number kept on top.

    A removed layer counts with rank 0. Blocks stand in the order in which a picture is made.
    """
    names, before, after = _means(result.layers)
    with rc_context(RC):
        figure = Figure(figsize=(max(6.0, 1.6 + 0.42 * len(names)), 3.8))
        axes = figure.subplots()
        places = range(len(names))
        axes.bar(places, before, width=0.82, color=BEFORE, label="before")
        bars = axes.bar(places, after, width=0.52, color=AFTER, label="after")
        axes.bar_label(bars, [_short(value) for value in after], padding=2, fontsize=8)
        axes.set_xticks(places, names, rotation=60, ha="right", rotation_mode="anchor")
        axes.set_ylabel("mean rank per layer")
        axes.set_title(_title(result))
        _legend(axes)
        return figure


def _means(layers: Sequence[LayerResult]) -> tuple[list[str], list[float], list[float]]:
    members: dict[str, list[LayerResult]] = {}
    for layer in layers:
        members.setdefault(block(layer.name), []).append(layer)
    names = sorted(members, key=_place)
    return (
        names,
        [_mean([layer.rank_before for layer in members[name]]) for name in names],
        [_mean([layer.rank_after for layer in members[name]]) for name in names],
    )


def _place(name: str) -> tuple[int, str]:
    start = re.match(r"[A-Za-z]+", name)
    word = start[0] if start else name
    return (_ORDER.index(word) if word in _ORDER else len(_ORDER), name)


def _mean(values: Sequence[int]) -> float:
    return sum(values) / len(values)


def _short(value: float) -> str:
    return f"{value:.1f}" if 0 < value < 10 else f"{value:.0f}"


def _title(result: FileResult) -> str:
    return (
        f"{result.recipe}:  {result.bytes_before / 1e6:.2f} MB → {result.bytes_after / 1e6:.2f} MB,  "
        f"error {100 * result.relative_error:.1f} %"
    )


def _legend(axes: Axes) -> None:
    axes.legend(frameon=False, ncols=2, loc="upper right")
    axes.set_ylim(top=axes.get_ylim()[1] * 1.15)
