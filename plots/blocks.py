"""The blocks of a model in the order in which a picture is made, few enough for a figure."""

from __future__ import annotations

import re
from collections.abc import Sequence

_ORDER = ("TE", "IN", "D", "MID", "S", "L", "OUT", "other")
_NAME = re.compile(r"(TE\d?|[A-Za-z]+)\.?(\d*)")


def order(block: str) -> tuple[int, str, int]:
    """Sorts blocks: text encoders, input, middle, output, and what belongs to no block."""
    word, number = _split(block)
    stage = "TE" if word.startswith("TE") else word
    return (_ORDER.index(stage) if stage in _ORDER else len(_ORDER), word, int(number or -1))


def _split(block: str) -> tuple[str, str]:
    match = _NAME.fullmatch(block)
    return (match[1], match[2]) if match else (block, "")


def grouped(blocks: Sequence[str], most: int) -> dict[str, list[str]]:
    """Label -> blocks: each text encoder as one, and neighbours together where there are more than `most`."""
    ordered = sorted(set(blocks), key=order)
    groups = []
    for length in range(1, len(ordered) + 2):
        groups = runs_of(ordered, length)
        if len(groups) <= most:
            break  # else the widest runs, which are too many too
    labels = []
    for first, *more in groups:
        word = _split(first)[0]
        if word.startswith("TE"):
            labels.append(f"text encoder {word[2:]}".strip())
        else:
            labels.append(f"{first}–{_split(more[-1])[1]}" if more else first)
    return dict(zip(labels, groups, strict=True))


def runs_of(ordered: Sequence[str], length: int) -> list[list[str]]:
    """Runs of up to `length` blocks of one word; text encoders are one run each."""
    runs: list[list[str]] = []
    for block in ordered:
        word = _split(block)[0]
        limit = len(ordered) if word.startswith("TE") else length
        if runs and _split(runs[-1][0])[0] == word and len(runs[-1]) < limit:
            runs[-1].append(block)
        else:
            runs.append([block])
    return runs
