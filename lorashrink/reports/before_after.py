"""The page of `shrink`: pictures before and after, and all files of a run."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from lorashrink.reports.page import rendered
from lorashrink.reports.sheet import picture_uri
from lorashrink.reports.tables import Column
from lorashrink.results.automatic import PicturePair, ShrinkReport, Shrunk
from lorashrink.text import count_text, share_text, size_text

_MOST_SHEETS = 40  # adapters whose pictures are on the page, so that it can be mailed


@dataclass(frozen=True, slots=True)
class _Image:
    uri: str
    speck: bool  # too small to be smoothed


@dataclass(frozen=True, slots=True)
class _PairRow:
    """One prompt of one adapter."""

    pair: PicturePair
    images: Mapping[str, _Image]  # by the name of their column

    @classmethod
    def of(cls, pair: PicturePair) -> _PairRow:
        """A row with the pictures themselves."""
        paths = {"no adapter": pair.none, "before": pair.before, "after": pair.after}
        return cls(pair, {column: _Image(*picture_uri(Path(path))) for column, path in paths.items()})


@dataclass(frozen=True, slots=True)
class _PairSheet:
    """The pictures of one adapter."""

    name: str
    result: Shrunk
    rows: list[_PairRow]


@dataclass(frozen=True, slots=True)
class _FileRow:
    """A row of the table of files."""

    name: str
    result: Shrunk
    attributes: Mapping[str, str] = field(default_factory=dict)  # of the row in HTML


def shrunk_page(report: ShrinkReport, folder: Path) -> bytes:
    """The page as UTF-8, for the adapters of a report that have outputs; folder: where these are."""
    shrunk = report.written
    names = {result.input: os.path.relpath(result.output or "", folder) for result in shrunk}
    drawn = [result for result in shrunk if result.pictures]
    before, after = (sum(getattr(result, key) for result in shrunk) for key in ("bytes_before", "bytes_after"))
    return rendered(
        "shrunk.html",
        title=names[shrunk[0].input] if len(shrunk) == 1 else count_text(len(shrunk), "LoRA"),
        facts=f"{size_text(before)} before, {size_text(after)} after, {1 - after / before:.0%} saved",
        report=report,
        figure_colours={},  # it has no figures
        before=before,
        after=after,
        worst=min((result.worst_picture_db or 0.0 for result in drawn), default=None),
        shrunk=[_FileRow(names[result.input], result) for result in shrunk],
        columns=_COLUMNS,
        reasons=dict.fromkeys(result.why for result in shrunk),
        failed=[(Path(failure.input).name, failure.error) for failure in report.failed],
        sheets=[
            _PairSheet(names[result.input], result, list(map(_PairRow.of, result.pictures)))
            for result in drawn[:_MOST_SHEETS]
        ],
        unseen=len(drawn[_MOST_SHEETS:]),
    )


_COLUMNS = (
    Column("file", "in the folder", lambda row: row.name, code=True),
    Column("before", "size", lambda row: size_text(row.result.bytes_before), lambda row: row.result.bytes_before),
    Column("after", "size", lambda row: size_text(row.result.bytes_after), lambda row: row.result.bytes_after),
    Column("share", "size after / size before", lambda row: f"{row.result.share:.0%}", lambda row: row.result.share),
    Column(
        "quality",
        "PSNR of the worst picture, or what is predicted for the mean",
        lambda row: row.result.quality_text or "–",
        lambda row: row.result.quality,
    ),
    Column(
        "error",
        "‖lost‖ / ‖ΔW‖ of the weights",
        lambda row: share_text(row.result.relative_error),
        lambda row: row.result.relative_error,
    ),
    Column("dtype", "of the numbers in the file", lambda row: row.result.dtype),
    Column("loads in", "programs", lambda row: ", ".join(row.result.loads_in or ()) or "–"),
    Column("recipe", "what is kept", lambda row: row.result.recipe, code=True),
)
