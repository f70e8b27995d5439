"""A table of pictures: a row for each prompt and seed, a column for each size."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image, ImageDraw

from lorashrink.plots.sheet import fitted, sheet_font, wrapped
from lorashrink.plots.style import INK, QUIET
from lorashrink.text import count_text, decibel_text, size_text

if TYPE_CHECKING:
    from lorashrink.results.sweep import Pictures, Point, Sweep

_MOST_COLUMNS, _MOST_ROWS = 6, 12  # of recipes; of pictures
_MARGIN, _GAP, _LABEL, _NARROWEST = 24, 10, 180, 160  # pixels
_TITLE_SIZE, _TEXT_SIZE, _LEADING = 22, 14, 19  # pixels
_HEAD_LINES, _ROW_LINES = 4, 5


def pictures_by_size(sweep: Sweep, *, side: int = 320) -> Image.Image:
    """No adapter, some recipes from the smallest file to the largest, and the original adapter, side by side; RGB.

    Columns are recipes that nothing beats, evenly chosen if there are many, and the suggested one.
    """
    drawn = sweep.drawn
    assert drawn is not None
    columns = [
        (["no adapter", _worst(drawn.none)], drawn.none.files, _levels(drawn.none)),
        *(
            (
                [size_text(point.bytes), _worst(pictures), point.recipe.replace("=1,", ",")],
                pictures.files,
                _levels(pictures),
            )
            for point, pictures in shown_points(sweep, _MOST_COLUMNS)
        ),
        ([size_text(sweep.bytes), "original adapter"], drawn.files, [""] * len(drawn.files)),
    ]
    labels = drawn.labels
    cut = f", the first {_MOST_ROWS} of {len(labels)} pictures" if len(labels) > _MOST_ROWS else ""
    return picture_table(
        f"{Path(sweep.source).name} at {count_text(len(columns) - 1, 'size')}{cut}",
        [heads for heads, _, _ in columns],
        labels[:_MOST_ROWS],
        [
            [(_read(files[row], side), levels[row]) for _, files, levels in columns]
            for row in range(min(len(labels), _MOST_ROWS))
        ],
    )


def _worst(pictures: Pictures) -> str:
    return f"worst {decibel_text(pictures.worst_psnr)}"


def _levels(pictures: Pictures) -> list[str]:
    return [decibel_text(level) for level in pictures.values["psnr"]]


def shown_points(sweep: Sweep, most: int) -> list[tuple[Point, Pictures]]:
    """The suggested recipe and recipes that nothing beats, evenly chosen if they are more than `most` together."""
    points = [(point, point.pictures) for point in sweep.points if point.pictures is not None]
    suggested = {sweep.suggestion.recipe} if sweep.suggestion else set()
    best = [point.recipe for point, _ in points if point.best and point.recipe not in suggested]
    count = min(len(best), most - len(suggested))
    shown = {best[round(number * (len(best) - 1) / max(count - 1, 1))] for number in range(count)} | suggested
    return [(point, pictures) for point, pictures in points if point.recipe in shown]


def _read(path: str, side: int) -> Image.Image:
    """No wider or higher than `side`, and specks enlarged by a whole number."""
    with Image.open(path) as picture:
        small = fitted(picture, side)
    times = max(1, _NARROWEST // max(small.size))
    return small.resize((times * small.width, times * small.height), Image.Resampling.NEAREST)


def picture_table(
    title: str, heads: Sequence[Sequence[str]], labels: Sequence[str], rows: Sequence[Sequence[tuple[Image.Image, str]]]
) -> Image.Image:
    """heads: lines above each column. labels: one left of each row. rows: pictures, and a text below each."""
    font = sheet_font(_TEXT_SIZE)
    width = max(_NARROWEST, *(picture.width for row in rows for picture, _ in row))
    heights = [max(_ROW_LINES * _LEADING, *(picture.height + _LEADING for picture, _ in row)) for row in rows]
    left, top = _MARGIN + _LABEL + _GAP, _MARGIN + _TITLE_SIZE + _GAP
    below = top + _HEAD_LINES * _LEADING + _GAP
    size = (
        left + len(heads) * (width + _GAP) - _GAP + _MARGIN,
        below + sum(heights) + _GAP * (len(rows) - 1) + _MARGIN,
    )
    sheet = Image.new("RGB", size, "white")
    drawing = ImageDraw.Draw(sheet)
    drawing.text((_MARGIN, _MARGIN - 6), title, INK, sheet_font(_TITLE_SIZE))
    for column, lines in enumerate(heads):
        for number, text in enumerate(lines):
            most = _HEAD_LINES - number if number == len(lines) - 1 else 1
            # a recipe has no spaces to break it at
            for more, line in enumerate(wrapped(text.replace(",", ", "), font, width, most)):
                corner = (left + column * (width + _GAP), top + (number + more) * _LEADING)
                drawing.text(corner, line.replace(", ", ","), QUIET if number else INK, font)
    for number, (label, row) in enumerate(zip(labels, rows, strict=True)):
        height = below + sum(heights[:number]) + number * _GAP
        for line_number, line in enumerate(wrapped(label, font, _LABEL, _ROW_LINES)):
            drawing.text((_MARGIN, height + line_number * _LEADING), line, INK, font)
        for column, (picture, below_it) in enumerate(row):
            corner = (left + column * (width + _GAP), height)
            sheet.paste(picture, corner)
            drawing.text((corner[0], height + picture.height + 2), below_it, QUIET, font)
    return sheet
