"""Tables and figures as HTML."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING

from lorashrink.reports.findings import MEGABYTE

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# --- numbers as text ----------------------------------------------------------------------------


def size_text(count: float) -> str:
    return (
        f"{count / 1e3:.1f} kB"
        if count < MEGABYTE
        else f"{count / MEGABYTE:.3g} MB"
        if count < 1e9
        else f"{count / 1e9:.3g} GB"
    )


def percent_text(share: float | None) -> str:
    """Three digits, but for what is too small to matter."""
    if share is None:
        return "–"
    return "< 0.0001 %" if 0 < share < 1e-6 else f"{100 * share:.3g} %"


def _number(value: float | None, form: str = ".4g") -> str:
    return "–" if value is None else format(value, form)


def span_text(numbers: Sequence[float]) -> str:
    low, high = min(numbers), max(numbers)
    return f"{low:g}" if low == high else f"{low:g} to {high:g}"


# --- tables -------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Cell:
    """What a cell says, and the number that it is sorted by."""

    text: str
    value: float | None = None
    link: str = ""  # HTML in place of the text


def share_cell(value: float | None) -> Cell:
    return Cell(percent_text(value), value)


def number_cell(value: float | None, form: str = ".4g") -> Cell:
    return Cell(_number(value, form), value)


def text_cell(text: str) -> Cell:
    return Cell(text, link=escape(text))


def row_html(cells: Sequence[Cell], attributes: str = "") -> str:
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


def table_html(name: str, caption: str, heads: Mapping[str, str], rows: Sequence[str]) -> str:
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


def figure_html(name: str, figure: Figure, caption: str, attributes: str = "") -> str:
    from lorashrink.plots.style import inline_svg

    drawing = inline_svg(figure, name).replace("<svg ", f'<svg role="img" aria-labelledby="{name}-caption" ', 1)
    return (
        f'<figure id="{name}"{attributes}><div class="scroll" tabindex="0" role="region" '
        f'aria-labelledby="{name}-caption">{drawing}</div>'
        f'<figcaption id="{name}-caption">{caption}</figcaption></figure>'
    )


def joined_html(figures: Sequence[str]) -> str:
    """Figures side by side where there is room."""
    return '<div class="figures">' + "\n".join(figures) + "</div>\n"


def select_html(name: str, label: str, choices: Sequence[str]) -> str:
    options = "".join(f'<option value="{escape(each)}">{escape(each)}</option>' for each in choices)
    return (
        f'<div><label for="{name}">{label}</label>'
        f'<select id="{name}"><option value="">all</option>{options}</select></div>'
    )
