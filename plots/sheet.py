"""A contact sheet: the pictures of one moment of training on one page, each with what it was drawn from."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib
from PIL import Image, ImageDraw, ImageFont

from lorashrink.plots.style import INK, QUIET

_MARGIN, _GAP, _NARROWEST = 24, 20, 256  # pixels
_TITLE_SIZE, _TEXT_SIZE, _LEADING = 22, 14, 19  # pixels
_CAPTION_LINES = 2


@dataclass(frozen=True, slots=True, eq=False)
class Cell:
    """One picture of a sheet."""

    picture: Image.Image
    caption: str  # cut to two lines
    details: str  # one line


def contact_sheet(title: str, cells: Sequence[Cell], *, side: int = 512) -> Image.Image:
    """The pictures in rows, in their order, none larger than `side` pixels in width and height; RGB."""
    small = [fitted(cell.picture, side) for cell in cells]
    columns = math.ceil(math.sqrt(len(cells)))
    width = max(_NARROWEST, *(picture.width for picture in small))
    heights = [max(picture.height for picture in small[at : at + columns]) for at in range(0, len(small), columns)]
    below = (_CAPTION_LINES + 1) * _LEADING + 8
    sheet = Image.new(
        "RGB",
        (
            2 * _MARGIN + columns * (width + _GAP) - _GAP,
            2 * _MARGIN + _TITLE_SIZE + _GAP + sum(heights) + len(heights) * (below + _GAP) - _GAP,
        ),
        "white",
    )
    drawing = ImageDraw.Draw(sheet)
    drawing.text((_MARGIN, _MARGIN), title, INK, sheet_font(_TITLE_SIZE))
    font = sheet_font(_TEXT_SIZE)
    for number, (cell, picture) in enumerate(zip(cells, small, strict=True)):
        row, column = divmod(number, columns)
        left = _MARGIN + column * (width + _GAP)
        top = _MARGIN + _TITLE_SIZE + _GAP + sum(heights[:row]) + row * (below + _GAP)
        sheet.paste(picture, (left, top))
        caption = [(line, INK) for line in wrapped(cell.caption, font, width, _CAPTION_LINES)]
        caption += [(line, QUIET) for line in wrapped(cell.details, font, width, 1)]
        for line_number, (line, colour) in enumerate(caption):
            drawing.text((left, top + picture.height + 8 + line_number * _LEADING), line, colour, font)
    return sheet


def fitted(picture: Image.Image, side: int) -> Image.Image:
    """The picture in RGB, reduced to `side` pixels in width and height if it is larger."""
    small = picture.convert("RGB")
    small.thumbnail((side, side), Image.Resampling.LANCZOS)
    return small


def wrapped(text: str, font: ImageFont.FreeTypeFont, width: int, lines: int) -> list[str]:
    """The text in at most so many lines, each at most `width` pixels wide; what is cut off becomes an ellipsis."""
    for characters in range(width // 4, 2, -1):
        wrapped_lines = textwrap.wrap(text, characters, max_lines=lines, placeholder=" …")
        if all(font.getlength(line) <= width for line in wrapped_lines):
            return wrapped_lines
    return []


def sheet_font(size: int) -> ImageFont.FreeTypeFont:
    """The font of sheets, `size` pixels high."""
    # matplotlib brings this one along; Pillow's own knows fewer alphabets.
    return ImageFont.truetype(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf", size)
