"""The pages of a study: in HTML, one file with all that it shows, and in Markdown with its figures beside it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from lorashrink._version import __version__
from lorashrink.reports.card import plain as markdown_text
from lorashrink.reports.page import json_element, labelled_figure, new_environment, rendered
from lorashrink.reports.tables import Column, number_column
from lorashrink.results.evidence import Evidence
from lorashrink.text import count_text, decibel_text, size_text

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_NONE = "–"


@dataclass(frozen=True, slots=True)
class _Row:
    """A row of a table in HTML."""

    item: Any  # Measured, Reached or Difference
    attributes: dict[str, str]


def web_page(result: Evidence, curves: Sequence[Figure]) -> bytes:
    """The page as UTF-8; `curves` is the figure of each adapter."""
    from lorashrink.plots.style import ROLES

    points = sorted(result.results, key=lambda point: (point.adapter, point.curve, point.plain, point.payload))
    figures = {f"curves-{number}": labelled_figure(curve, f"curves-{number}") for number, curve in enumerate(curves)}
    return rendered(
        "evidence.html",
        title=result.model,
        facts=facts_line(result),
        result=result,
        figures=figures,
        figure_colours=ROLES,
        difference_columns=_DIFFERENCES,
        differences=[_Row(item, {"class": "chosen"} if not item.adapter else {}) for item in result.differences],
        reached_columns=_REACHED,
        reached=[_Row(item, {}) for item in result.reached],
        point_columns=_POINTS,
        points=[_Row(item, {}) for item in points],
        off=prediction_error(result),
        numbers=json_element(result),
    )


def markdown_page(result: Evidence, curves: Sequence[Figure], figures: Path) -> bytes:
    """The page as UTF-8; the figure of each adapter is written into a folder, which is below that of the page."""
    from lorashrink.plots import style

    figures.mkdir(exist_ok=True)
    names = []
    for number, (adapter, curve) in enumerate(zip(result.adapters, curves, strict=True)):
        style.save(curve, figures / f"{number}.png")
        names.append((adapter.name, f"{figures.name}/{number}.png"))
    environment = new_environment(autoescape=False)
    environment.filters["plain"] = markdown_text
    text = environment.get_template("evidence.md").render(
        version=__version__,
        result=result,
        facts=facts_line(result),
        figures=names,
        difference_columns=_DIFFERENCES,
        differences=[_Row(item, {}) for item in result.differences],
        reached_columns=_REACHED,
        reached=[_Row(item, {}) for item in result.reached],
        off=prediction_error(result),
    )
    return (text.strip() + "\n").encode()


def facts_line(result: Evidence) -> str:
    """What was measured, in one line."""
    pictures = sum(adapter.pictures for adapter in result.adapters)
    return (
        f"{result.kind}, {count_text(len(result.adapters), 'adapter')}, {count_text(len(result.curves), 'method')}, "
        f"{count_text(len(result.results), 'file')}, {count_text(pictures, 'prompt and seed', 'prompts and seeds')}, "
        f"drawn in {result.dtype} on {result.device.partition(':')[0]}"
    )


def prediction_error(result: Evidence) -> float | None:
    """How far predictions are from what was seen, root mean square in dB, between 24 and 50 dB."""
    pairs = [
        (point.predicted_db, point.mean_db)
        for point in result.results
        if point.predicted_db is not None and not point.plain and 24 < point.mean_db < 50
    ]
    return fmean((predicted - seen) ** 2 for predicted, seen in pairs) ** 0.5 if pairs else None


# --- tables -------------------------------------------------------------------------------------


def _of(name: str) -> Callable[[_Row], float | None]:
    return lambda row: getattr(row.item, name)


def _interval(row: _Row, names: Sequence[str], form: Callable[[float], str]) -> str:
    value, low, high = (getattr(row.item, name) for name in names)
    return _NONE if value is None else f"{form(value)} ({form(low)} to {form(high)})"


_DIFFERENCES = (
    Column("method", "and dtype", lambda row: row.item.curve, code=True),
    Column("adapter", "of the study", lambda row: row.item.adapter or "mean of all"),
    Column(
        "dB at equal size",
        "Bjøntegaard difference of the mean PSNR, with the 95 % interval over the prompts",
        lambda row: _interval(row, ("decibels", "decibels_low", "decibels_high"), "{:+.1f}".format),
        _of("decibels"),
    ),
    Column(
        "size at equal quality",
        "Bjøntegaard difference in bytes of tensors, as a share, with the 95 % interval over the prompts",
        lambda row: _interval(row, ("rate", "rate_low", "rate_high"), "{:.0%}".format),
        _of("rate"),
    ),
)

_SIZES = (
    Column("adapter", "of the study", lambda row: row.item.adapter),
    Column("method", "and dtype", lambda row: row.item.curve, code=True),
    number_column("tensors", "bytes without the header", _of("payload"), size_text),
    number_column("file", "bytes with the header", _of("bytes"), size_text),
)

_REACHED = (
    *_SIZES,
    number_column("worst picture", "PSNR of the worst picture at this size", _of("worst_db"), decibel_text),
)

_POINTS = (
    *_SIZES,
    number_column("mean", "PSNR", _of("mean_db"), decibel_text),
    number_column("worst", "PSNR of the worst picture", _of("worst_db"), decibel_text),
    number_column("predicted", "mean PSNR", _of("predicted_db"), decibel_text),
    number_column("SSIM", "mean", lambda row: fmean(row.item.ssim), "{:.4f}".format),
    number_column("MS-SSIM", "mean", lambda row: fmean(row.item.ms_ssim), "{:.4f}".format),
    Column("prompts", "with or without the words that call it", lambda row: "plain" if row.item.plain else "own"),
    Column("recipe", "what is kept", lambda row: row.item.recipe, code=True),
)
