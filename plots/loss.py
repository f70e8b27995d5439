"""The loss and the learning rates of a run."""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib import rc_context
from matplotlib.figure import Figure

from lorashrink.errors import InputError
from lorashrink.plots.style import AFTER, BEFORE, INK, RC

Points = Sequence[tuple[int, float]]  # step, value

_CURRENT, _AVERAGE, _RATE = "loss/current", "loss/average", "lr/"
_STYLES = ("-", "--", ":", "-.")


def read_scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """What tensorboard logged below a run's folder: tag -> (step, value), in the order of steps."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    scalars: defaultdict[str, list[tuple[int, float]]] = defaultdict(list)
    for file in folder.rglob("*.tfevents.*"):
        log = EventAccumulator(str(file), size_guidance={"scalars": 0})  # 0: all of them, not a sample
        log.Reload()
        for tag in log.Tags()["scalars"]:
            scalars[tag] += [(event.step, event.value) for event in log.Scalars(tag)]
    if not scalars:
        raise InputError(f"{folder}: no log in it; --logging_dir makes one")
    return {tag: sorted(points, key=lambda point: point[0]) for tag, points in scalars.items()}


@rc_context(RC)
def loss_curve(scalars: Mapping[str, Points]) -> Figure:
    """The loss of each step, pale, and its average, bold; below it the learning rates if there are any.

    scalars: what was logged under each tag: `loss/current`, `loss/average` and any `lr/...`; others are not drawn.
    Raises InputError if there is no `loss/average`.
    """
    if not scalars.get(_AVERAGE):
        raise InputError(f"the log holds no {_AVERAGE}, so no step of training is in it")
    names: dict[tuple[tuple[int, float], ...], list[str]] = {}
    for tag in sorted(scalars):
        if tag.startswith(_RATE) and scalars[tag]:
            names.setdefault(tuple(scalars[tag]), []).append(tag.removeprefix(_RATE))
    # Equal curves under one name, because one would hide the other.
    rates = {"\n".join(same): points for points, same in names.items()}
    figure = Figure(figsize=(8.0, 5.0 if rates else 3.8))
    panels = figure.subplots(
        2 if rates else 1, sharex=True, squeeze=False, height_ratios=[3, 1] if rates else None
    ).flat
    axes = panels[0]
    axes.plot(*_columns(scalars.get(_CURRENT, ())), color=BEFORE, linewidth=0.8)
    axes.plot(*_columns(scalars[_AVERAGE]), color=AFTER, linewidth=2.2)
    step, value = scalars[_AVERAGE][-1]
    axes.annotate(f"average {value:.3g}", (step, value), (6, 0), textcoords="offset points", va="center", color=AFTER)
    axes.set_ylim(bottom=0)
    axes.set_ylabel("loss (mean squared error)")
    axes.set_title("Loss of each step, pale, and its average")
    if rates:
        axes = panels[1]
        for (name, points), style in zip(rates.items(), itertools.cycle(_STYLES), strict=False):
            axes.plot(*_columns(points), color=INK, linewidth=1.2, linestyle=style, label=name)
        axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
        axes.set_ylim(bottom=0)
        axes.set_ylabel("learning rate")
        axes.yaxis.set_major_formatter("{x:.3g}")
    axes.set_xlabel("optimizer step")
    return figure


def _columns(points: Points) -> tuple[list[int], list[float]]:
    return [step for step, _ in points], [value for _, value in points]
