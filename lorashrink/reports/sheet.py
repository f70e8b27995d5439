"""The contact sheet of pictures on a report page."""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING

from lorashrink.reports.findings import MOST_COLUMNS, MOST_ROWS, Findings, decibel_text
from lorashrink.reports.html import size_text
from lorashrink.results.sweep import Drawn, Sweep

if TYPE_CHECKING:
    from PIL import Image

_MOST_SIDE = 640  # pixels of a picture on the page

# Pictures of more bytes than this are shown reduced and compressed; a page of sixty stays one that can be mailed.
_MOST_BYTES = 100_000

_QUALITY = 90  # of WebP

_SPECK = 160  # pixels: smaller pictures are enlarged without smoothing, which would hide differences

# --- pictures -----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Column:
    """The pictures of one recipe, of no adapter, or of the whole one."""

    head: str
    recipe: str
    psnr: str
    files: tuple[str, ...]


def picture_sheet(findings: Findings) -> str:
    sweep = findings.sweep
    if sweep is None or sweep.drawn is None:
        return ""
    drawn = sweep.drawn
    columns = _columns(sweep, drawn)
    suggested = sweep.suggestion.recipe if sweep.suggestion else ""
    labels = [f"{prompt.prompt} (seed {(prompt.seed or 0) + seed})" for prompt in drawn.prompts for seed in drawn.seeds]
    heads = "".join(
        f'<th scope="col"><b>{escape(column.head)}</b>{column.psnr}<br><code>{escape(column.recipe)}</code></th>'
        for column in columns
    )
    rows = []
    for place, label in enumerate(labels[:MOST_ROWS]):
        cells = "".join(_picture_cell(column, place, label, suggested) for column in columns)
        rows.append(f'<tr><th scope="row">{escape(label)}</th>{cells}</tr>')
    left_out = f"; the first {MOST_ROWS} of {len(labels)}" if len(labels) > MOST_ROWS else ""
    return (
        f"{_COMPARE}"
        '<div class="scroll" role="region" tabindex="0" aria-labelledby="sheet-caption"><table class="sheet">'
        f'<caption id="sheet-caption"><span>The same prompts at {len(columns) - 1} sizes{left_out}. '
        "Choose a picture to lay it over the whole adapter's.</span></caption>"
        f'<thead><tr><th scope="col">prompt</th>{heads}</tr></thead><tbody>{"".join(rows)}</tbody></table></div>'
        f'<p class="note">Drawn by {escape(drawn.model)} on {escape(drawn.device)} in {escape(drawn.dtype)}. dB is the '
        "mean PSNR against the whole adapter's pictures, of the files as they were drawn; large ones are shown here "
        "reduced.</p>"
    )


_COMPARE = """<div class="compare" id="compare" hidden>
<div class="slider"><img alt=""><img alt=""></div>
<div><h3>Before and after</h3>
<p id="compared-prompt"></p>
<div class="ends" aria-hidden="true"><span>whole adapter</span><span>shrunk</span></div>
<input type="range" id="divider" min="0" max="100" value="50" aria-label="Divider between the two pictures">
<p id="compared" role="status" aria-live="polite"></p>
<label><input type="checkbox" id="difference"> Show the difference, four times as bright</label></div>
</div>
"""


def _columns(sweep: Sweep, drawn: Drawn) -> list[_Column]:
    """No adapter, recipes that nothing beats and the suggested one, by size, and the whole adapter."""
    suggested = sweep.suggestion.recipe if sweep.suggestion else ""
    points = [(point, point.pictures) for point in sweep.points if point.pictures is not None]
    best = [point.recipe for point, _ in points if point.best and point.recipe != suggested]
    most = min(len(best), MOST_COLUMNS - 1)
    taken = {best[round(place * (len(best) - 1) / max(most - 1, 1))] for place in range(most)} | {suggested}
    return [
        _Column("no adapter", "", decibel_text(drawn.none), drawn.none.files),
        *(
            _Column(size_text(point.bytes), point.recipe, decibel_text(pictures), pictures.files)
            for point, pictures in points
            if point.recipe in taken
        ),
        _Column(size_text(sweep.bytes), "whole adapter", "", drawn.files),
    ]


def _picture_cell(column: _Column, place: int, label: str, suggested: str) -> str:
    uri, speck = _data_uri(Path(column.files[place]))
    what = f"{label}: {column.recipe or column.head}" + (f", {column.head}" if column.recipe else "")
    classes = " ".join([*(["whole"] if not column.psnr else []), *(["speck"] if speck else [])])
    image = f'<img class="{classes}" src="{uri}" alt="{escape(what)}">'
    if not column.psnr:
        return f"<td>{image}</td>"
    said = f"Right of the divider: {column.recipe or column.head}, {column.head}, {column.psnr}."
    first = " data-first" if column.recipe == suggested and place == 0 else ""
    return f'<td><button type="button" aria-pressed="false" data-said="{escape(said)}"{first}>{image}</button></td>'


def _data_uri(path: Path) -> tuple[str, bool]:
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
