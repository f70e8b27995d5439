"""One look for all figures: a colour-blind-safe palette (Okabe & Ito) and quiet axes, without global state."""

from __future__ import annotations

import io
from pathlib import Path
from typing import TYPE_CHECKING, Any

from matplotlib import rc_context
from matplotlib.figure import Figure

from lorashrink.errors import OutputError, UsageError
from lorashrink.files import write_bytes

if TYPE_CHECKING:
    from PIL import Image

BEFORE, AFTER, INK, QUIET = "#c9d3db", "#0072b2", "#333333", "#777777"

RC: dict[Any, Any] = {
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlelocation": "left",
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
        raise UsageError(f"{path}: figures are written as {' or '.join(f'.{each}' for each in _FORMATS)}.")
    if not path.parent.is_dir():
        raise OutputError(f"{path}: there is no folder {path.parent}.")
    return kind


def save(figure: Figure, path: Path) -> None:
    """Write a figure as the ending of `path` says, .png or .svg; equal figures give equal bytes.

    Raises:
        UsageError, OutputError: as `check`, or it cannot be written.
    """
    kind = check(path)
    picture = io.BytesIO()
    with rc_context({"svg.hashsalt": "lorashrink", "svg.fonttype": "none"}):
        figure.savefig(picture, format=kind, metadata={"Date": None} if kind == "svg" else None)
    write_bytes(path, picture.getvalue())


def save_picture(picture: Image.Image, path: Path) -> None:
    """Write a picture as .png.

    Raises OutputError if it cannot be written.
    """
    data = io.BytesIO()
    picture.save(data, "png")
    write_bytes(path, data.getvalue())
