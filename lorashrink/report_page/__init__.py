"""One self-contained page about an adapter: the numbers in, HTML out. Texts from files are escaped where they enter."""

from __future__ import annotations

import base64
import hashlib
import io
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from html import escape
from importlib.resources import files
from pathlib import Path
from statistics import fmean, pstdev
from string import Template
from typing import TYPE_CHECKING

from lorashrink._version import __version__
from lorashrink.likeness import MEASURES, Measure
from lorashrink.plots.blocks import order
from lorashrink.results import BaseInfo, FileResult, LayerResult
from lorashrink.sweeping import Drawn, Pictures, Point, Sweep
from lorashrink.tables import AdapterTable, LayerRow

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from PIL import Image

Progress = Callable[[str, int, int], None]

_MEGA = 1e6
_MOST_COLUMNS, _MOST_ROWS = 8, 12  # of recipes; of pictures
_MOST_SIDE = 640  # pixels of a picture on the page
# Pictures of more bytes than this are shown reduced and compressed; a page of sixty stays one that can be mailed.
_MOST_BYTES = 100_000
_QUALITY = 90  # of WebP
_SPECK = 160  # pixels: smaller pictures are enlarged without smoothing, which would hide differences


@dataclass(frozen=True, slots=True)
class Findings:
    """What a page is made of."""

    table: AdapterTable  # with singular values
    base: BaseInfo | None
    sweep: Sweep | None
    unswept: str  # why there is no sweep, else ""
    shrunk: FileResult | None  # what one recipe of the sweep would do to each layer
    hashes: Mapping[str, str]  # file -> what identifies its contents
    commands: Mapping[str, str]  # what for -> command line


def page(findings: Findings, progress: Progress | None = None) -> bytes:
    """The page as UTF-8; equal findings give equal bytes."""
    made = {
        "summary": ("Summary", _summary(findings)),
        "sizes": ("Sizes", _sizes(findings, progress)),
        "pictures": ("Pictures", _pictures(findings)),
        "inside": ("Inside", _inside(findings, progress)),
        "layers": ("Layers", _layers(findings, progress)),
        "again": ("Make it again", _again(findings)),
    }
    there = {name: section for name, section in made.items() if section[1]}
    script = _part("script.js")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    text = Template(_part("template.html")).substitute(
        title=escape(Path(findings.table.path).name),
        version=__version__,
        facts=escape(_facts(findings.table)),
        contents="".join(f'<li><a href="#{name}">{title}</a></li>' for name, (title, _) in there.items()),
        sections="\n".join(_section(name, title, body) for name, (title, body) in there.items()),
        numbers=_numbers(findings),
        style=_style(),
        script=script,
        script_hash=f"sha256-{digest}",
    )
    return text.encode()


def _section(name: str, title: str, body: str) -> str:
    return f'<section id="{name}" aria-labelledby="{name}-title"><h2 id="{name}-title">{title}</h2>\n{body}\n</section>'


def _part(name: str) -> str:
    return files("lorashrink.report_page").joinpath(name).read_text(encoding="utf-8")


def _style() -> str:
    """The style sheet with the colours of the figures, which the page's scheme decides."""
    from lorashrink.plots.style import ROLES

    light, dark = (
        " ".join(f"--figure-{name}: {colours[place]};" for name, colours in ROLES.items()) for place in (0, 1)
    )
    return Template(_part("style.css")).substitute(light=light, dark=dark)


def _numbers(findings: Findings) -> str:
    """All numbers of the page as JSON: what `inspect`, `sweep` and a dry run of `resize` print, for programs.

    Without singular values, which are most of it; and `<` is written as an escape, so that no text ends the element.
    """
    table = replace(findings.table, layers=tuple(replace(row, singular_values=None) for row in findings.table.layers))
    document = {
        "version": __version__,
        "inspect": asdict(table),
        "sweep": findings.sweep and asdict(findings.sweep),
        "resize": findings.shrunk and asdict(replace(findings.shrunk, seconds=0.0)),  # the time is not of the adapter
    }
    # Infinity and NaN are no JSON.
    finite = json.loads(json.dumps(document), parse_constant=lambda _: None)
    return json.dumps(finite, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")


# --- numbers as text ----------------------------------------------------------------------------


def _size(count: float) -> str:
    return (
        f"{count / 1e3:.1f} kB"
        if count < _MEGA
        else f"{count / _MEGA:.3g} MB"
        if count < 1e9
        else f"{count / 1e9:.3g} GB"
    )


def _percent(share: float | None) -> str:
    """Three digits, but for what is too small to matter."""
    if share is None:
        return "–"
    return "< 0.0001 %" if 0 < share < 1e-6 else f"{100 * share:.3g} %"


def _number(value: float | None, form: str = ".4g") -> str:
    return "–" if value is None else format(value, form)


def _decibel(pictures: Pictures) -> str:
    return f"{pictures.psnr:.1f} dB"


def _span(numbers: Sequence[float]) -> str:
    low, high = min(numbers), max(numbers)
    return f"{low:g}" if low == high else f"{low:g} to {high:g}"


def _facts(table: AdapterTable) -> str:
    count = len(table.layers)
    ranks = f" of rank {_span([row.rank for row in table.layers])}" if count else ""
    family = f" for {table.family}" if table.family else ""
    parts = [f"{table.algo}{family}", f"{count} layer{'s' * (count != 1)}{ranks}", table.dtype, f"{table.naming} names"]
    return ", ".join([_size(table.bytes), *(part for part in parts if part)])


# --- tables -------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Cell:
    """What a cell says, and the number that it is sorted by."""

    text: str
    value: float | None = None
    link: str = ""  # HTML in place of the text


def _share_cell(value: float | None) -> _Cell:
    return _Cell(_percent(value), value)


def _number_cell(value: float | None, form: str = ".4g") -> _Cell:
    return _Cell(_number(value, form), value)


def _text_cell(text: str) -> _Cell:
    return _Cell(text, link=escape(text))


def _row(cells: Sequence[_Cell], attributes: str = "") -> str:
    """A row of a table; the first cell is its head."""
    made = []
    for place, cell in enumerate(cells):
        tag, scope = ("th", ' scope="row"') if place == 0 else ("td", "")
        if cell.link:
            kind = ' class="text name"' if place == 0 else ' class="text"'
            made.append(f"<{tag}{scope}{kind}>{cell.link}</{tag}>")
        else:
            value = "" if cell.value is None else repr(cell.value)
            made.append(f'<{tag}{scope} data-value="{value}">{escape(cell.text)}</{tag}>')
    return f"<tr{attributes}>{''.join(made)}</tr>"


def _table(name: str, caption: str, heads: Mapping[str, str], rows: Sequence[str]) -> str:
    """heads: column -> what it means. Texts stand to the left, and so do their heads."""
    columns = "".join(
        f'<th scope="col"{_LEFT if head in _TEXTS else ""} title="{escape(meaning)}">'
        f'<button type="button">{escape(head)}</button></th>'
        for head, meaning in heads.items()
    )
    return (
        f'<div class="scroll" role="region" tabindex="0" aria-labelledby="{name}-caption"><table id="{name}">'
        f'<caption id="{name}-caption"><span>{caption}</span></caption><thead><tr>{columns}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )


_LEFT = ' class="text"'
_TEXTS = ("recipe", "layer", "block", "kind", "algo", "shape", "best", "remarks")


def _figure(name: str, figure: Figure, caption: str, attributes: str = "") -> str:
    from lorashrink.plots.style import inline_svg

    drawing = inline_svg(figure, name).replace("<svg ", f'<svg role="img" aria-labelledby="{name}-caption" ', 1)
    return (
        f'<figure id="{name}"{attributes}><div class="scroll" tabindex="0" role="region" '
        f'aria-labelledby="{name}-caption">{drawing}</div>'
        f'<figcaption id="{name}-caption">{caption}</figcaption></figure>'
    )


def _together(figures: Sequence[str]) -> str:
    """Figures side by side where there is room."""
    return '<div class="figures">' + "\n".join(figures) + "</div>\n"


# --- sections -----------------------------------------------------------------------------------


def _summary(findings: Findings) -> str:
    table = findings.table
    tiles = [("size now", _size(table.bytes), f"{len(table.layers)} layers")]
    words = []
    if findings.sweep and findings.sweep.suggestion:
        suggestion = findings.sweep.suggestion
        point = next(each for each in findings.sweep.points if each.recipe == suggestion.recipe)
        tiles += [
            ("could be", _size(suggestion.bytes), f"{_percent(suggestion.bytes / table.bytes)} of it"),
            (
                "error of the weights",
                _percent(suggestion.relative_error),
                f"{_percent(point.energy)} of the energy kept",
            ),
        ]
        if point.pictures:
            tiles.append(("pictures", _decibel(point.pictures), f"SSIM {point.pictures.ssim:.4f}"))
        words.append(f"Begin with <code>{escape(suggestion.recipe)}</code>: {escape(suggestion.reason)}.")
    elif findings.unswept:
        words.append(f"It cannot be shrunk as it is: {escape(findings.unswept)}")
    if table.fro_ratio is not None:
        words.append(
            f"All layers together change their base weights by {_percent(table.fro_ratio)} of the norm of these."
        )
    shown = "".join(
        f"<div><dt>{label}</dt><dd>{escape(text)}<small>{escape(more)}</small></dd></div>"
        for label, text, more in tiles
    )
    health = "".join(f"<li><b>{escape(each.flag)}</b> {escape(each.text)}</li>" for each in table.health)
    notes = "".join(f"<dt>{escape(label)}</dt><dd>{escape(text)}</dd>" for label, text in table.notes.items())
    return "\n".join(
        [
            f'<dl class="tiles">{shown}</dl>',
            *(f"<p>{text}</p>" for text in words),
            f'<h3>What is unusual</h3><ul class="findings">{health}</ul>'
            if health
            else "<p>Nothing in it is unusual.</p>",
            f'<h3>How it was made</h3><dl class="notes">{notes}</dl>' if notes else "",
        ]
    )


_POINT_HEADS = {
    "recipe": "what is kept",
    "size": "of the file",
    "of before": "size / size of the whole adapter",
    "error": "‖lost‖ / ‖ΔW‖",
    "energy": "share of Σσ² that is kept",
    "mean rank": "over all layers, removed ones count as 0",
    "best": "no other recipe is both smaller and closer",
}
_ALIKE = "likeness to the whole adapter's pictures: mean ± standard deviation, higher is more alike"


def _sizes(findings: Findings, progress: Progress | None) -> str:
    from lorashrink.plots.quality import size_and_error, size_and_pictures

    sweep = findings.sweep
    if sweep is None:
        return ""
    figures = []
    if any(point.relative_error for point in sweep.points):  # points without error have no place in the figure
        figures.append(
            _figure(
                "figure-error",
                size_and_error(sweep),
                "Each dot is a recipe, each line a kind of recipe. Lower is closer to the whole adapter, "
                "further left is smaller.",
            )
        )
    if sweep.drawn:
        figures.append(
            _figure(
                "figure-pictures",
                size_and_pictures(sweep),
                "How alike the pictures are to those of the whole adapter. Above the dashed line a recipe changes them "
                "less than half precision does; at the dotted line there might as well be no adapter.",
            )
        )
    if progress:
        progress("figures", 1, 3)
    suggested = sweep.suggestion.recipe if sweep.suggestion else None
    rows = [
        _row(_point_cells(point, sweep), ' class="chosen"' if point.recipe == suggested else "")
        for point in sweep.points
    ]
    caption = f"{len(rows)} recipe{'s' * (len(rows) != 1)}; ★ where no other is both smaller and closer."
    heads = {**_POINT_HEADS, **{f"{measure.title}{measure.unit}": _ALIKE for measure in _measured(sweep)}}
    return _together(figures) + _table("recipe-table", caption, heads, rows)


def _measured(sweep: Sweep) -> list[Measure]:
    """The measures that the pictures were compared by, none without pictures."""
    return [measure for measure in MEASURES if sweep.drawn and measure.name in sweep.drawn.none.values]


def _measure_cell(measure: Measure, pictures: Pictures | None) -> _Cell:
    if pictures is None:
        return _Cell("–")
    values = pictures.values[measure.name]
    mean = fmean(values)
    return _Cell(f"{mean:{measure.form}} ± {pstdev(values):{measure.form}}", mean)


def _point_cells(point: Point, sweep: Sweep) -> list[_Cell]:
    return [
        _Cell(point.recipe, link=f"<code>{escape(point.recipe)}</code>"),
        _Cell(_size(point.bytes), point.bytes),
        _share_cell(point.bytes / sweep.bytes),
        _share_cell(point.relative_error),
        _number_cell(point.energy),
        _number_cell(point.mean_rank, ".1f"),
        _Cell("★" if point.best else "", link="★" if point.best else "&nbsp;"),
        *(_measure_cell(measure, point.pictures) for measure in _measured(sweep)),
    ]


def _inside(findings: Findings, progress: Progress | None) -> str:
    from lorashrink.plots.heat import norms_by_kind
    from lorashrink.plots.overview import layer_overview
    from lorashrink.plots.spectra import spectra_per_block

    table = findings.table
    if not table.layers:
        return "<p>There is no layer that adds anything to a weight of the base.</p>"
    figures = [
        _figure(
            "figure-overview",
            layer_overview(table),
            "What was asked for in training. A dot is a value that layers of the block have: the larger, the more.",
        ),
    ]
    if findings.base:
        figures.append(
            _figure(
                "figure-norms",
                norms_by_kind(table),
                "Where the adapter changes its base most, compared with what is there.",
            )
        )
    figures.append(
        _figure(
            "figure-spectra",
            spectra_per_block(table),
            "How fast the singular values fall. A line that falls early is a block whose rank can be cut.",
            ' class="wide"',
        )
    )
    if progress:
        progress("figures", 2, 3)
    return _together(figures)


# Column -> what it means; what a recipe would do, and what only a base tells, is left out where there is none.
_LAYER_HEADS = {
    "layer": "name in the file",
    "block": "of the model",
    "kind": "of layer",
    "shape": "of ΔW",
    "algo": "family of the adapter's layer",
    "rank": "in the file",
    "new rank": "by the recipe; 0 is removed",
    "error": "‖lost‖ / ‖ΔW‖",
    "error of base": "‖lost‖ / ‖W‖",
    "energy": "share of Σσ² that is kept",
    "alpha": "in the file",
    "‖ΔW‖": "Frobenius norm",
    "of base": "‖ΔW‖ / ‖W‖",
    "σ₁": "spectral norm",
    "eff. rank": "exp of the entropy of σ²/Σσ²",
    "remarks": "what is unusual",
}
_OF_RECIPE, _OF_BASE = ("new rank", "error", "error of base", "energy"), ("error of base", "of base")


def _layers(findings: Findings, progress: Progress | None) -> str:
    from lorashrink.plots.ranks import rank_per_block

    table, shrunk = findings.table, findings.shrunk
    if not table.layers:
        return ""
    figure = ""
    caption = "All layers."
    if shrunk:
        words = f"by <code>{escape(shrunk.recipe)}</code>"
        figure = _figure("figure-ranks", rank_per_block(shrunk), f"Mean rank of each block before and after, {words}.")
        caption = f"All layers; new rank, energy and errors {words}."
    if progress:
        progress("figures", 3, 3)
    results = {each.name: each for each in shrunk.layers} if shrunk else {}
    left_out = {*(() if shrunk else _OF_RECIPE), *(() if findings.base else _OF_BASE)}
    heads = {head: meaning for head, meaning in _LAYER_HEADS.items() if head not in left_out}
    rows = [
        _row(
            [_layer_cells(row, results.get(row.name))[head] for head in heads],
            f' data-block="{escape(row.block)}" data-kind="{escape(row.kind)}"',
        )
        for row in table.layers
    ]
    blocks = sorted({row.block for row in table.layers}, key=order)
    kinds = sorted({row.kind for row in table.layers})
    return "\n".join(
        [
            figure,
            '<div class="controls" id="controls" hidden role="search" aria-label="Layers">',
            '<div><label for="words">Find</label>'
            '<input type="search" id="words" placeholder="words, such as attn1"></div>',
            _select("block", "Block", blocks),
            _select("kind", "Kind", kinds),
            f'<p id="count" role="status" aria-live="polite">{len(rows)} of {len(rows)} layers</p></div>',
            _table("layer-table", caption, heads, rows),
        ]
    )


def _select(name: str, label: str, choices: Sequence[str]) -> str:
    options = "".join(f'<option value="{escape(each)}">{escape(each)}</option>' for each in choices)
    return (
        f'<div><label for="{name}">{label}</label>'
        f'<select id="{name}"><option value="">all</option>{options}</select></div>'
    )


def _layer_cells(row: LayerRow, result: LayerResult | None) -> dict[str, _Cell]:
    """Column -> cell, of all columns that there may be."""
    return {
        "layer": _Cell(row.name, link=f"<code>{escape(row.name)}</code>"),
        "block": _text_cell(row.block),
        "kind": _text_cell(row.kind),
        "algo": _text_cell(row.algo),
        "shape": _text_cell("×".join(map(str, row.shape))),
        "rank": _number_cell(row.rank, "d"),
        "alpha": _number_cell(row.alpha, "g"),
        "‖ΔW‖": _number_cell(row.fro),
        "σ₁": _number_cell(row.spectral),
        "eff. rank": _number_cell(row.effective_rank, ".1f"),
        "of base": _share_cell(row.fro_ratio),
        "new rank": _number_cell(result.rank_after if result else None, "d"),
        "energy": _number_cell(result.energy if result else None),
        "error": _share_cell(result.rle_lora if result else None),
        "error of base": _share_cell(result.rle_ckpt if result else None),
        "remarks": _text_cell(" ".join(row.flags) or "\N{NO-BREAK SPACE}"),
    }


def _again(findings: Findings) -> str:
    commands = "".join(
        f"<h3>{escape(what)}</h3><pre><code>{escape(command)}</code></pre>"
        for what, command in findings.commands.items()
    )
    hashes = "".join(
        f'<tr><th scope="row" class="text name">{escape(path)}</th>'
        f'<td class="text hash"><code>{escape(digest)}</code></td></tr>'
        for path, digest in findings.hashes.items()
    )
    return (
        f"{commands}<h3>Files</h3>"
        f'<div class="scroll"><table><caption>What was read, with lorashrink {__version__}.</caption><thead><tr>'
        '<th scope="col" class="text">file</th><th scope="col" class="text">contents</th></tr></thead>'
        f"<tbody>{hashes}</tbody></table></div>"
        '<p class="note">All numbers of this page are also in it as JSON, in the element with the id “numbers”.</p>'
    )


# --- pictures -----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Column:
    """The pictures of one recipe, of no adapter, or of the whole one."""

    head: str
    recipe: str
    psnr: str
    files: tuple[str, ...]


def _pictures(findings: Findings) -> str:
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
    for place, label in enumerate(labels[:_MOST_ROWS]):
        cells = "".join(_picture_cell(column, place, label, suggested) for column in columns)
        rows.append(f'<tr><th scope="row">{escape(label)}</th>{cells}</tr>')
    left_out = f"; the first {_MOST_ROWS} of {len(labels)}" if len(labels) > _MOST_ROWS else ""
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
    most = min(len(best), _MOST_COLUMNS - 1)
    taken = {best[round(place * (len(best) - 1) / max(most - 1, 1))] for place in range(most)} | {suggested}
    return [
        _Column("no adapter", "", _decibel(drawn.none), drawn.none.files),
        *(
            _Column(_size(point.bytes), point.recipe, _decibel(pictures), pictures.files)
            for point, pictures in points
            if point.recipe in taken
        ),
        _Column(_size(sweep.bytes), "whole adapter", "", drawn.files),
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
