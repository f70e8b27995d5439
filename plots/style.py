"""One look for all figures: a colour-blind-safe palette (Okabe & Ito) and quiet axes, without global state."""

from __future__ import annotations

import io
import re
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.colors import to_hex, to_rgba_array
from matplotlib.figure import Figure

from lorashrink.errors import OutputError, UsageError
from lorashrink.files.disk import write_bytes

BEFORE, AFTER, INK, QUIET, GRID = "#c9d3db", "#0072b2", "#333333", "#777777", "#e6e6e6"
# What depends on the paper: name -> colour on white, colour on dark. All other colours read well on both.
ROLES: dict[str, tuple[str, str]] = {
    "paper": ("#ffffff", "#15191e"),
    "ink": (INK, "#dfe4e8"),
    "quiet": (QUIET, "#9aa4ad"),
    "before": (BEFORE, "#4b5863"),
    "grid": (GRID, "#323a42"),
    "black": ("#000000", "#f5f7f8"),
}

RC: dict[Any, Any] = {
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlelocation": "left",
    "text.parse_math": False,  # names of files and layers may hold dollars
    "axes.titlesize": "large",
    "figure.constrained_layout.use": True,
    "font.size": 10,
    "savefig.dpi": 144,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
}

# One colour per curve, in this order (Okabe & Ito 2008, without yellow, which is faint on white).
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#000000")

_FORMATS = ("png", "svg")


def check(path: Path) -> str:
    """The format that the ending of `path` names, found out before the work that leads to the figure.

    Raises:
        UsageError: it is neither .png nor .svg.
        OutputError: its folder is missing.
    """
    kind = path.suffix.lower().removeprefix(".")
    if kind not in _FORMATS:
        raise UsageError(f"{path}: figures are written as {' or '.join(f'.{kind}' for kind in _FORMATS)}.")
    if not path.parent.is_dir():
        raise OutputError(f"{path}: there is no folder {path.parent}.")
    return kind


def save(figure: Figure, path: Path, *, dark: bool = False) -> None:
    """Write a figure as the ending of `path` says, .png or .svg; equal figures give equal bytes. `dark`: see `darken`.

    Raises:
        UsageError, OutputError: as `check`, or it cannot be written.
    """
    kind = check(path)
    if dark:
        darken(figure)
    write_bytes(path, _drawn(figure, kind, metadata={"Date": None} if kind == "svg" else None))


def inline_svg(figure: Figure, name: str) -> str:
    """The figure as an `<svg>` element for a page: transparent, in the page's own light or dark colours.

    The page sets the CSS variables `--figure-NAME` for each name of `ROLES`; without them it is the light figure.
    `name` keeps the ids of several figures in one page apart.
    """
    nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    text = _drawn(figure, "svg", metadata=nothing, transparent=True).decode()
    text = text[text.index("<svg") :]
    used = set(_REFERENCE.findall(text))
    text = re.sub(r' id="([^"]+)"', lambda match: f' id="{name}-{match[1]}"' if match[1] in used else "", text)
    text = _REFERENCE.sub(lambda match: match[0].replace("#", f"#{name}-"), text)
    for role, (light, _) in ROLES.items():
        text = text.replace(f": {light}", f": var(--figure-{role}, {light})")
    return text.strip()


_REFERENCE = re.compile(r'(?:href="#|url\(#)([^")]+)')
# What each kind of artist may call its colours.
_COLOURED = ("color", "facecolor", "edgecolor", "markerfacecolor", "markeredgecolor")


def darken(figure: Figure) -> None:
    """Give a finished figure dark paper: what has a colour of `ROLES` gets the dark one, all else keeps its own."""
    dark = dict(ROLES.values())
    for artist in figure.findobj():
        for name in _COLOURED:
            getter, setter = getattr(artist, f"get_{name}", None), getattr(artist, f"set_{name}", None)
            if getter is None or setter is None:
                continue
            old = to_rgba_array(getter())
            new = to_rgba_array([dark.get(to_hex(colour), to_hex(colour)) for colour in old]) if len(old) else old
            if (new[:, :3] != old[:, :3]).any():
                new[:, 3] = old[:, 3]
                setter(new if len(new) > 1 else tuple(new[0]))


def _drawn(figure: Figure, kind: str, **options: Any) -> bytes:
    picture = io.BytesIO()
    with rc_context({"svg.hashsalt": "lorashrink", "svg.fonttype": "none"}):
        figure.savefig(picture, format=kind, **options)
    return picture.getvalue()
