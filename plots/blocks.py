"""The blocks of a model in the order in which a picture is made, few enough for a figure."""

from __future__ import annotations

import re
from collections.abc import Sequence

_ORDER = ("TE", "IN", "D", "MID", "S", "L", "OUT", "other")
_NAME = re.compile(r"(TE\d?|[A-Za-z]+)\.?(\d*)")


def order(block: str) -> tuple[int, str, int]:
    """Where a block stands: text encoders, input, middle, output, and what belongs to no block."""
    word, number = _parts(block)
    known = "TE" if word.startswith("TE") else word
    return (_ORDER.index(known) if known in _ORDER else len(_ORDER), word, int(number or -1))


def _parts(block: str) -> tuple[str, str]:
    found = _NAME.fullmatch(block)
    return (found[1], found[2]) if found else (block, "")


def grouped(blocks: Sequence[str], most: int) -> dict[str, list[str]]:
    """Label -> blocks: each text encoder as one, and neighbours together where there are more than `most`."""
    ordered = sorted(set(blocks), key=order)
    # Where even the widest runs are too many, they are what there is.
    tries = [_runs(ordered, together) for together in range(1, len(ordered) + 2)]
    fitting = next((groups for groups in tries if len(groups) <= most), tries[-1])
    return {_label(members): members for members in fitting}


def _runs(ordered: Sequence[str], together: int) -> list[list[str]]:
    """Runs of up to `together` blocks of one word; text encoders are one run each."""
    runs: list[list[str]] = []
    for block in ordered:
        word = _parts(block)[0]
        limit = len(ordered) if word.startswith("TE") else together
        if runs and _parts(runs[-1][0])[0] == word and len(runs[-1]) < limit:
            runs[-1].append(block)
        else:
            runs.append([block])
    return runs


def _label(members: Sequence[str]) -> str:
    word = _parts(members[0])[0]
    if word.startswith("TE"):
        return f"text encoder {word[2:]}".strip()
    return members[0] if len(members) == 1 else f"{members[0]}–{_parts(members[-1])[1]}"
