"""The report as a short page in Markdown for a model site, with its pictures in files beside it."""

from __future__ import annotations

import re
from pathlib import Path

from lorashrink._version import __version__
from lorashrink.reports.findings import Findings
from lorashrink.reports.page import facts_line, new_environment

ENDING = ".md"

_SPECIAL = re.compile(r"([\\`*_{}\[\]#!|<>&~$])")


def card_pictures(card: Path) -> tuple[Path, Path]:
    """Where the pictures of a card go: before and after, and sizes."""
    return card.with_name(f"{card.stem}_pictures.png"), card.with_name(f"{card.stem}_sizes.png")


def write_card(path: Path, findings: Findings) -> bytes:
    """The card as UTF-8; its pictures are written beside `path`, as far as there are any."""
    from lorashrink.pictures.drawing import write_picture
    from lorashrink.plots import style
    from lorashrink.plots.comparison_sheet import pictures_by_size
    from lorashrink.plots.quality import has_error, size_and_error, size_and_pictures

    sweep, (before_and_after, sizes) = findings.sweep, card_pictures(path)
    figures = []
    if sweep and sweep.drawn:
        write_picture(before_and_after, pictures_by_size(sweep))
        style.save(size_and_pictures(sweep), sizes)
        figures = [
            ("The same prompts with no adapter, smaller files and the original adapter", before_and_after.name),
            ("Size against likeness of the pictures", sizes.name),
        ]
    elif sweep and any(map(has_error, sweep.points)):
        style.save(size_and_error(sweep), sizes)
        figures = [("Size against error of the weights", sizes.name)]
    public = findings.without_folders()
    environment = new_environment(autoescape=False)
    environment.filters["plain"] = plain
    template = environment.get_template("card.md")
    text = template.render(
        version=__version__,
        title=findings.title,
        facts=facts_line(public.table),
        table=public.table,
        sweep=public.sweep,
        unswept=public.unswept,
        figures=figures,
        commands=public.commands,
    )
    return text.encode()


def plain(text: str) -> str:
    """The text in one line, with a backslash before all that Markdown or HTML would read."""
    return _SPECIAL.sub(r"\\\1", " ".join(text.split()))
