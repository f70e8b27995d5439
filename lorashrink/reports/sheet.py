"""The contact sheet of pictures on a report page."""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from lorashrink.results.sweep import Pictures, Sweep
from lorashrink.text import decibel_text, size_text

if TYPE_CHECKING:
    from PIL import Image

_MOST_COLUMNS, _MOST_ROWS = 8, 12  # of recipes; of pictures
_MOST_SIDE = 640  # pixels of a picture on the page
# Pictures of more bytes than this are shown reduced and compressed; a page of sixty stays one that can be mailed.
_MOST_BYTES = 100_000
_QUALITY = 90  # of WebP
_SPECK = 160  # pixels: smaller pictures are enlarged without smoothing, which would hide differences


@dataclass(frozen=True, slots=True)
class SheetColumn:
    """The pictures of one recipe, of no adapter, or of the original."""

    head: str
    recipe: str
    worst: str  # PSNR of the worst picture; "" of the original adapter, which the others are measured against
    files: tuple[str, ...]
    levels: tuple[str, ...] = ()  # PSNR of each picture
    suggested: bool = False

    @property
    def whole(self) -> bool:
        return not self.worst

    @classmethod
    def of(cls, head: str, recipe: str, pictures: Pictures, suggested: bool = False) -> SheetColumn:
        levels = tuple(map(decibel_text, pictures.values["psnr"]))
        return cls(head, recipe, levels[pictures.worst], pictures.files, levels, suggested)


@dataclass(frozen=True, slots=True)
class SheetCell:
    """A picture of the sheet."""

    column: SheetColumn
    level: str  # PSNR against the original adapter's
    uri: str
    speck: bool  # too small to be smoothed
    first: bool  # the page shows it first


@dataclass(frozen=True, slots=True)
class Sheet:
    """Pictures row by row: a row for each prompt and seed, a column for each size."""

    columns: list[SheetColumn]
    rows: list[tuple[str, list[SheetCell]]]  # (label, cells)
    total: int  # of rows, with those that are left out


def picture_sheet(sweep: Sweep) -> Sheet:
    """Pictures without an adapter, of the best recipes by size, and of the original adapter, if a sweep drew some."""
    from lorashrink.plots.comparison_sheet import shown_points

    drawn = sweep.drawn
    assert drawn is not None
    columns = [
        SheetColumn.of("no adapter", "", drawn.none),
        *(
            SheetColumn.of(size_text(point.bytes), point.recipe, pictures, point is sweep.suggested)
            for point, pictures in shown_points(sweep, _MOST_COLUMNS)
        ),
        SheetColumn(size_text(sweep.bytes), "original adapter", "", drawn.files),
    ]
    # The picture that the recommended file harms most is the one to look at.
    suggested = sweep.suggested.pictures if sweep.suggested else None
    order = list(range(len(drawn.labels)))
    if suggested:
        order.sort(key=lambda row: row != suggested.worst)
    rows = [
        (
            drawn.labels[row],
            [
                SheetCell(
                    column,
                    column.levels[row] if column.levels else "",
                    *picture_uri(Path(column.files[row])),
                    first=row == order[0] and column.suggested,
                )
                for column in columns
            ],
        )
        for row in order[:_MOST_ROWS]
    ]
    return Sheet(columns, rows, len(drawn.labels))


def picture_uri(path: Path) -> tuple[str, bool]:
    """A picture in the smallest form that shows it, and whether it is so small that it should not be smoothed."""
    from PIL import Image

    with Image.open(path) as opened:
        picture = opened.convert("RGB")
    forms = {"png": path.read_bytes(), "webp": _webp(picture, lossless=True)}
    if min(map(len, forms.values())) > _MOST_BYTES:
        picture.thumbnail((_MOST_SIDE, _MOST_SIDE), Image.Resampling.LANCZOS)
        forms = {"webp": _webp(picture, quality=_QUALITY)}
    kind, data = min(forms.items(), key=lambda form: len(form[1]))
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}", max(picture.size) < _SPECK


def _webp(picture: Image.Image, **options: bool | int) -> bytes:
    data = io.BytesIO()
    picture.save(data, "webp", **options)
    return data.getvalue()
