"""The report page: one HTML file without any outside resources."""

from __future__ import annotations

import base64
import hashlib
import json
from dataclasses import asdict, replace
from html import escape
from importlib.resources import files
from pathlib import Path
from statistics import fmean, pstdev
from string import Template

from lorashrink._version import __version__
from lorashrink.errors import Progress
from lorashrink.pictures.likeness import MEASURES, Measure
from lorashrink.plots.blocks import order
from lorashrink.reports.findings import Findings, decibel_text
from lorashrink.reports.html import (
    Cell,
    figure_html,
    joined_html,
    number_cell,
    percent_text,
    row_html,
    select_html,
    share_cell,
    size_text,
    span_text,
    table_html,
    text_cell,
)
from lorashrink.reports.sheet import picture_sheet
from lorashrink.results.inspection import AdapterTable, LayerRow
from lorashrink.results.shrinking import LayerResult
from lorashrink.results.sweep import Pictures, Point, Sweep


def page(findings: Findings, progress: Progress | None = None) -> bytes:
    """The page as UTF-8; equal findings give equal bytes."""
    made = {
        "summary": ("Summary", _summary(findings)),
        "sizes": ("Sizes", _sizes(findings, progress)),
        "pictures": ("Pictures", picture_sheet(findings)),
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
    return files("lorashrink.reports").joinpath(name).read_text(encoding="utf-8")


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


def _facts(table: AdapterTable) -> str:
    count = len(table.layers)
    ranks = f" of rank {span_text([row.rank for row in table.layers])}" if count else ""
    family = f" for {table.family}" if table.family else ""
    parts = [f"{table.algo}{family}", f"{count} layer{'s' * (count != 1)}{ranks}", table.dtype, f"{table.naming} names"]
    return ", ".join([size_text(table.bytes), *(part for part in parts if part)])


# --- sections -----------------------------------------------------------------------------------


def _summary(findings: Findings) -> str:
    table = findings.table
    tiles = [("size now", size_text(table.bytes), f"{len(table.layers)} layers")]
    words = []
    if findings.sweep and findings.sweep.suggestion:
        suggestion = findings.sweep.suggestion
        point = next(each for each in findings.sweep.points if each.recipe == suggestion.recipe)
        tiles += [
            ("could be", size_text(suggestion.bytes), f"{percent_text(suggestion.bytes / table.bytes)} of it"),
            (
                "error of the weights",
                percent_text(suggestion.relative_error),
                f"{percent_text(point.energy)} of the energy kept",
            ),
        ]
        if point.pictures:
            tiles.append(("pictures", decibel_text(point.pictures), f"SSIM {point.pictures.ssim:.4f}"))
        words.append(f"Begin with <code>{escape(suggestion.recipe)}</code>: {escape(suggestion.reason)}.")
    elif findings.unswept:
        words.append(f"It cannot be shrunk as it is: {escape(findings.unswept)}")
    if table.fro_ratio is not None:
        words.append(
            f"All layers together change their base weights by {percent_text(table.fro_ratio)} of the norm of these."
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
            figure_html(
                "figure-error",
                size_and_error(sweep),
                "Each dot is a recipe, each line a kind of recipe. Lower is closer to the whole adapter, "
                "further left is smaller.",
            )
        )
    if sweep.drawn:
        figures.append(
            figure_html(
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
        row_html(_point_cells(point, sweep), ' class="chosen"' if point.recipe == suggested else "")
        for point in sweep.points
    ]
    caption = f"{len(rows)} recipe{'s' * (len(rows) != 1)}; ★ where no other is both smaller and closer."
    heads = {**_POINT_HEADS, **{f"{measure.title}{measure.unit}": _ALIKE for measure in _measured(sweep)}}
    return joined_html(figures) + table_html("recipe-table", caption, heads, rows)


def _measured(sweep: Sweep) -> list[Measure]:
    """The measures that the pictures were compared by, none without pictures."""
    return [measure for measure in MEASURES if sweep.drawn and measure.name in sweep.drawn.none.values]


def _measure_cell(measure: Measure, pictures: Pictures | None) -> Cell:
    if pictures is None:
        return Cell("–")
    values = pictures.values[measure.name]
    mean = fmean(values)
    return Cell(f"{mean:{measure.form}} ± {pstdev(values):{measure.form}}", mean)


def _point_cells(point: Point, sweep: Sweep) -> list[Cell]:
    return [
        Cell(point.recipe, link=f"<code>{escape(point.recipe)}</code>"),
        Cell(size_text(point.bytes), point.bytes),
        share_cell(point.bytes / sweep.bytes),
        share_cell(point.relative_error),
        number_cell(point.energy),
        number_cell(point.mean_rank, ".1f"),
        Cell("★" if point.best else "", link="★" if point.best else "&nbsp;"),
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
        figure_html(
            "figure-overview",
            layer_overview(table),
            "What was asked for in training. A dot is a value that layers of the block have: the larger, the more.",
        ),
    ]
    if findings.base:
        figures.append(
            figure_html(
                "figure-norms",
                norms_by_kind(table),
                "Where the adapter changes its base most, compared with what is there.",
            )
        )
    figures.append(
        figure_html(
            "figure-spectra",
            spectra_per_block(table),
            "How fast the singular values fall. A line that falls early is a block whose rank can be cut.",
            ' class="wide"',
        )
    )
    if progress:
        progress("figures", 2, 3)
    return joined_html(figures)


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
        figure = figure_html(
            "figure-ranks", rank_per_block(shrunk), f"Mean rank of each block before and after, {words}."
        )
        caption = f"All layers; new rank, energy and errors {words}."
    if progress:
        progress("figures", 3, 3)
    results = {each.name: each for each in shrunk.layers} if shrunk else {}
    left_out = {*(() if shrunk else _OF_RECIPE), *(() if findings.base else _OF_BASE)}
    heads = {head: meaning for head, meaning in _LAYER_HEADS.items() if head not in left_out}
    rows = [
        row_html(
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
            select_html("block", "Block", blocks),
            select_html("kind", "Kind", kinds),
            f'<p id="count" role="status" aria-live="polite">{len(rows)} of {len(rows)} layers</p></div>',
            table_html("layer-table", caption, heads, rows),
        ]
    )


def _layer_cells(row: LayerRow, result: LayerResult | None) -> dict[str, Cell]:
    """Column -> cell, of all columns that there may be."""
    return {
        "layer": Cell(row.name, link=f"<code>{escape(row.name)}</code>"),
        "block": text_cell(row.block),
        "kind": text_cell(row.kind),
        "algo": text_cell(row.algo),
        "shape": text_cell("×".join(map(str, row.shape))),
        "rank": number_cell(row.rank, "d"),
        "alpha": number_cell(row.alpha, "g"),
        "‖ΔW‖": number_cell(row.fro),
        "σ₁": number_cell(row.spectral),
        "eff. rank": number_cell(row.effective_rank, ".1f"),
        "of base": share_cell(row.fro_ratio),
        "new rank": number_cell(result.rank_after if result else None, "d"),
        "energy": number_cell(result.energy if result else None),
        "error": share_cell(result.rle_lora if result else None),
        "error of base": share_cell(result.rle_ckpt if result else None),
        "remarks": text_cell(" ".join(row.flags) or "\N{NO-BREAK SPACE}"),
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
