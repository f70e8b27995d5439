"""Numbers as text: the same number looks the same in the terminal, in figures and on pages."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any

# Control characters, with which a name could drive the terminal, marks that turn the order of a line around or end
# it, and halves of characters that no encoding has.
_UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ufeff\ud800-\udfff]")


def printable(text: str, *, keep: str = "") -> str:
    """The text with escapes such as `\\x1b` for all that is not meant to be seen, but the characters in `keep`."""

    def escaped(match: re.Match[str]) -> str:
        character = match[0]
        if character in keep:
            return character
        return character.encode("unicode_escape", "surrogatepass").decode()

    return _UNPRINTABLE.sub(escaped, text)


def size_text(count: float) -> str:
    """A number of bytes in decimal units: `410.2 kB`, `3.7 MB`, `6.94 GB`."""
    if count < 1e6:
        return f"{count / 1e3:.1f} kB"
    return f"{count / 1e6:.1f} MB" if count < 1e9 else f"{count / 1e9:.2f} GB"


_UNITS = {"": 2**20, "B": 1, "KB": 1e3, "MB": 1e6, "GB": 1e9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}

_SIZE = re.compile(r"(?P<number>[-+.\de]+?) ?(?P<unit>(?:[kmg]i?)?b)?", re.IGNORECASE)


def bytes_in(text: str) -> float:
    """Bytes of a size such as `300MB`, `0.4 MiB` or `1.5GB`; a bare number counts MiB. Raises ValueError."""
    match = _SIZE.fullmatch(text.strip())
    if not match:
        raise ValueError(text)
    return float(match["number"]) * _UNITS[(match["unit"] or "").upper()]


def json_in(text: str | bytes | bytearray) -> Any:
    """What a text holds as JSON; None if it does not parse."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def number_text(value: float | None, form: str = ".4g") -> str:
    """The value in the format `form`; a dash for None."""
    return "-" if value is None else format(value, form)


def share_text(share: float | None) -> str:
    """A share of 1 in percent with two decimals, for columns: `96.55%`; a dash for None."""
    return "-" if share is None else f"{100 * share:.2f}%"


def percent_text(share: float) -> str:
    """A share of 1 in percent with three digits, for differences of any magnitude: `0.0312 %`."""
    return "< 0.0001 %" if 0 < share < 1e-6 else f"{100 * share:.3g} %"


def bare_percent_text(percent: float) -> str:
    """A percentage with two digits and no unit, where there is no room for one: `0.031`, `9.9`, `12`, `0`."""
    return "0" if percent == 0 else f"{percent:.2g}" if percent < 9.95 else f"{percent:.0f}"


def span_text(numbers: Sequence[float]) -> str:
    """The range of the numbers: `4 to 8`, or `4` where all are equal; a dash for none."""
    if not numbers:
        return "-"
    low, high = min(numbers), max(numbers)
    return f"{low:g}" if low == high else f"{low:g} to {high:g}"


def decibel_text(level: float) -> str:
    """A level in decibels: `31.2 dB`."""
    return f"{level:.1f} dB"


def names_text(names: Sequence[str], most: int | None = 3) -> str:
    """The first `most` names, and how many more there are: `a, b, c and 4 more`. None: all of them."""
    shown = names[:most]
    return ", ".join(shown) + (f" and {len(names) - len(shown)} more" if len(shown) < len(names) else "")


def count_text(count: int, noun: str, plural: str = "") -> str:
    """A number of things: `1 file`, `3 files`; the plural where it is not the noun with an s."""
    return f"{count} {noun if count == 1 else plural or noun + 's'}"
