"""The tables of a report page: a row of `Column` for each of their columns."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from statistics import fmean, pstdev
from typing import Any

from lorashrink.pictures.likeness import MEASURES, Measure
from lorashrink.reports.findings import Findings
from lorashrink.results.inspection import LayerRow
from lorashrink.results.shrinking import LayerResult
from lorashrink.results.sweep import Point, Sweep
from lorashrink.text import decibel_text, number_text, share_text, size_text


@dataclass(frozen=True, slots=True)
class Column:
    """A column: its head, what that means, the text of a row's cell, and the number that rows are sorted by.

    Without a number it is a column of words.
    """

    head: str
    meaning: str
    text: Callable[[Any], str]
    number: Callable[[Any], float | None] | None = None
    code: bool = False

    @property
    def words(self) -> bool:
        return self.number is None

    def sort_value(self, row: object) -> float | str:
        """The number of a row's cell; empty where there is none."""
        number = self.number(row) if self.number else None
        return "" if number is None else number


def number_column(
    head: str, meaning: str, number: Callable[[Any], float | None], text: Callable[[float], str] = number_text
) -> Column:
    """A column of numbers, with a dash where there is none."""

    def text_of(row: object) -> str:
        value = number(row)
        return "–" if value is None else text(value)

    return Column(head, meaning, text_of, number)


# --- recipes ------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class PointRow:
    """A recipe of a sweep."""

    point: Point
    attributes: Mapping[str, str] = field(default_factory=dict)  # of the row in HTML


def point_columns(sweep: Sweep) -> list[Column]:
    """The columns of the table of recipes; measures of likeness have theirs where pictures were drawn."""
    measures = [measure for measure in MEASURES if sweep.drawn and measure.name in sweep.drawn.none.values]
    if sweep.drawn:
        worst = [
            number_column(
                "worst picture",
                "PSNR in dB against the original adapter's",
                lambda row: row.point.pictures and row.point.pictures.worst_psnr,
                decibel_text,
            )
        ]
    elif sweep.read:
        worst = [
            number_column(
                "worst passage",
                f"{sweep.read.measure} from the original adapter",
                lambda row: row.point.texts and row.point.texts.worst_distance,
                "{:.2g}".format,
            ),
            number_column("perplexity", "of the text", lambda row: row.point.texts and row.point.texts.perplexity),
        ]
    else:
        worst = []
    return [
        Column("recipe", "what is kept", lambda row: row.point.recipe, code=True),
        number_column("size", "of the file", lambda row: row.point.bytes, size_text),
        number_column(
            "of before", "size / size of the original adapter", lambda row: row.point.bytes / sweep.bytes, share_text
        ),
        *worst,
        number_column(
            "error",
            "of the weights, ‖lost‖ / ‖ΔW‖; says little of calibrated recipes",
            lambda row: None if row.point.calibrated else row.point.relative_error,
            share_text,
        ),
        number_column("energy", "share of Σσ² that is kept", lambda row: row.point.energy, share_text),
        number_column(
            "mean rank", "over all layers, removed ones count as 0", lambda row: row.point.mean_rank, "{:.1f}".format
        ),
        Column(
            "best",
            "no other recipe is both smaller and closer",
            lambda row: " ".join(["★"] * row.point.best + ["recommended"] * bool(row.attributes)),
        ),
        *map(likeness_column, measures),
    ]


def likeness_column(measure: Measure) -> Column:
    """The column of a measure of pictures."""

    def values(row: PointRow) -> tuple[float, ...]:
        return row.point.pictures.values[measure.name] if row.point.pictures else ()

    def text(row: PointRow) -> str:
        if not values(row):
            return "–"
        return f"{fmean(values(row)):{measure.form}} ± {pstdev(values(row)):{measure.form}}"

    return Column(
        f"{measure.title}{measure.unit}",
        "likeness to the original adapter's pictures: mean ± standard deviation, higher is more alike",
        text,
        lambda row: fmean(values(row)) if values(row) else None,
    )


def point_rows(sweep: Sweep) -> list[PointRow]:
    """The recipes by size; the suggested one stands out."""
    return [PointRow(point, {"class": "chosen"} if point is sweep.suggested else {}) for point in sweep.points]


# --- layers -------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class ReportLayer:
    """A layer of the adapter, and what the recipe would make of it."""

    layer: LayerRow
    result: LayerResult | None

    @property
    def attributes(self) -> dict[str, str]:
        """What the page's controls choose rows by."""
        return {"data-block": self.layer.block, "data-kind": self.layer.kind}


def _from_result(name: str) -> Callable[[ReportLayer], float | None]:
    return lambda row: getattr(row.result, name) if row.result else None


_OF_RECIPE, _OF_BASE = ("new rank", "error", "error of base", "energy"), ("error of base", "of base")

_LAYER_COLUMNS = (
    Column("layer", "name in the file", lambda row: row.layer.name, code=True),
    Column("block", "of the model", lambda row: row.layer.block),
    Column("kind", "of layer", lambda row: row.layer.kind),
    Column("shape", "of ΔW", lambda row: "×".join(map(str, row.layer.shape))),
    Column("algo", "family of the adapter's layer", lambda row: row.layer.algo),
    number_column("rank", "in the file", lambda row: row.layer.rank, "{:d}".format),
    number_column("new rank", "by the recipe; 0 is removed", _from_result("rank_after"), "{:d}".format),
    number_column("error", "‖lost‖ / ‖ΔW‖", _from_result("rle_lora"), share_text),
    number_column("error of base", "‖lost‖ / ‖W‖", _from_result("rle_ckpt"), share_text),
    number_column("energy", "share of Σσ² that is kept", _from_result("energy"), share_text),
    number_column("alpha", "in the file", lambda row: row.layer.alpha, "{:g}".format),
    number_column("‖ΔW‖", "Frobenius norm", lambda row: row.layer.fro),
    number_column("of base", "‖ΔW‖ / ‖W‖", lambda row: row.layer.fro_ratio, share_text),
    number_column("σ₁", "spectral norm", lambda row: row.layer.spectral),
    number_column("eff. rank", "exp of the entropy of σ²/Σσ²", lambda row: row.layer.effective_rank, "{:.1f}".format),
    Column("remarks", "what is unusual", lambda row: " ".join(row.layer.flags)),
)


def layer_columns(findings: Findings) -> list[Column]:
    """The columns of the table of layers, without those that need a recipe or a base where there is none."""
    missing = {*(() if findings.shrunk else _OF_RECIPE), *(() if findings.base else _OF_BASE)}
    return [column for column in _LAYER_COLUMNS if column.head not in missing]


def layer_rows(findings: Findings) -> list[ReportLayer]:
    """The layers in the order of the file."""
    results = {result.name: result for result in findings.shrunk.layers} if findings.shrunk else {}
    return [ReportLayer(layer, results.get(layer.name)) for layer in findings.table.layers]
