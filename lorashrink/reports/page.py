"""The report page: one HTML file without any outside resources."""

from __future__ import annotations

import base64
import functools
import hashlib
import json
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from importlib.resources import files
from typing import TYPE_CHECKING

from lorashrink._version import __version__
from lorashrink.errors import Progress
from lorashrink.plots.blocks import order
from lorashrink.reports.findings import Findings
from lorashrink.reports.sheet import picture_sheet
from lorashrink.reports.tables import layer_columns, layer_rows, point_columns, point_rows
from lorashrink.results.inspection import AdapterTable
from lorashrink.results.shown import plain
from lorashrink.text import count_text, decibel_text, printable, share_text, size_text, span_text

if TYPE_CHECKING:
    from jinja2 import Environment
    from markupsafe import Markup
    from matplotlib.figure import Figure


def page(findings: Findings, progress: Progress | None = None, *, paths: bool = False) -> bytes:
    """The page as UTF-8; equal findings give equal bytes. `paths`: show whole paths of files, not names alone.

    The texts of the page are in `templates/`, which escape every value that is not `Markup`.
    """
    from lorashrink.plots.style import ROLES

    sheet = picture_sheet(findings.sweep) if findings.sweep and findings.sweep.drawn else None
    if not paths:
        findings = findings.without_folders()
    table, sweep, shrunk = findings.table, findings.sweep, findings.shrunk
    return rendered(
        "page.html",
        title=findings.title,
        facts=facts_line(table),
        table=table,
        sweep=sweep,
        unswept=findings.unswept,
        shrunk=shrunk,
        figures=inline_figures(findings, progress),
        point_columns=point_columns(sweep) if sweep else (),
        point_rows=point_rows(sweep) if sweep else (),
        sheet=sheet,
        drawn=sweep.drawn if sweep else None,
        layer_columns=layer_columns(findings),
        layer_rows=layer_rows(findings),
        blocks=sorted({row.block for row in table.layers}, key=order),
        kinds=sorted({row.kind for row in table.layers}),
        commands=findings.commands,
        hashes=findings.hashes,
        numbers=json_element(
            {
                "version": __version__,
                "inspect": replace(table, layers=tuple(replace(row, singular_values=None) for row in table.layers)),
                "sweep": sweep,
                "resize": shrunk and replace(shrunk, seconds=0.0),  # the time is not of the adapter
            }
        ),
        figure_colours=ROLES,
    )


def rendered(name: str, **values: object) -> bytes:
    """The page of a template as UTF-8, with the one script that its content policy allows."""
    from markupsafe import Markup

    script = files("lorashrink.reports").joinpath("templates/script.js").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    template = new_environment().get_template(name)
    text = template.render(version=__version__, script=Markup(script), script_hash=f"sha256-{digest}", **values)
    return text.encode()


@functools.cache
def new_environment(*, autoescape: bool = True) -> Environment:
    """Jinja2 with the templates of reports and the filters that they use."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("lorashrink.reports"),
        autoescape=autoescape,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=lambda value: printable(value, keep="\n\t") if type(value) is str else value,
    )
    environment.filters |= {
        "count": count_text,
        "decibel": decibel_text,
        "share": share_text,
        "size": size_text,
    }
    return environment


def facts_line(table: AdapterTable) -> str:
    """Size, family, ranks and names of an adapter in one line."""
    ranks = f" of rank {span_text([row.rank for row in table.layers])}" if table.layers else ""
    facts = (
        size_text(table.bytes),
        f"{table.algo} for {table.family}" if table.family else table.algo,
        f"{count_text(len(table.layers), 'layer')}{ranks}",
        table.dtype,
        f"{table.naming} names",
    )
    return ", ".join(filter(None, facts))


def json_element(document: object) -> Markup:
    """A result, or several by their names, as JSON in a page. No text in it can end the element that it stands in."""
    from jinja2.utils import htmlsafe_json_dumps

    return htmlsafe_json_dumps(plain(document), dumps=json.dumps, allow_nan=False, separators=(",", ":"))


def labelled_figure(figure: Figure, name: str) -> Markup:
    """A figure as SVG that its caption names; see `figure` in `macros.html`."""
    from markupsafe import Markup

    from lorashrink.plots.style import inline_svg

    svg = inline_svg(figure, f"figure-{name}")
    return Markup(svg.replace("<svg ", f'<svg role="img" aria-labelledby="figure-{name}-caption" ', 1))


def inline_figures(findings: Findings, progress: Progress | None) -> dict[str, Markup]:
    """Name -> SVG of the figures that there are numbers for."""
    from lorashrink.plots.heat import norms_by_kind
    from lorashrink.plots.overview import layer_overview
    from lorashrink.plots.quality import has_error, size_and_error, size_and_pictures, size_and_texts
    from lorashrink.plots.ranks import rank_per_block
    from lorashrink.plots.spectra import spectra_per_block

    table, sweep = findings.table, findings.sweep
    drawings: dict[str, Callable[[], Figure]] = {}
    if sweep and any(map(has_error, sweep.points)):
        drawings["error"] = partial(size_and_error, sweep)
    if sweep and sweep.drawn:
        drawings["pictures"] = partial(size_and_pictures, sweep)
    if sweep and sweep.read:
        drawings["texts"] = partial(size_and_texts, sweep)
    if table.layers:
        drawings["overview"] = partial(layer_overview, table)
        drawings["spectra"] = partial(spectra_per_block, table)
    if table.layers and findings.base:
        drawings["norms"] = partial(norms_by_kind, table)
    if table.layers and findings.shrunk:
        drawings["ranks"] = partial(rank_per_block, findings.shrunk)
    figures = {}
    for done, (name, draw) in enumerate(drawings.items(), 1):
        figures[name] = labelled_figure(draw(), name)
        if progress:
            progress("figures", done, len(drawings))
    return figures
