"""Row intervals of base weights: fused weights that several layers change in part."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import NamedTuple

from lorashrink.bases import Views


class RowRun(NamedTuple):
    """Neighbouring rows that a layer adds to."""

    at: int  # first row in the sum
    start: int  # first row in the layer
    size: int


# --- which rows of which layer ------------------------------------------------------------------

_Range = tuple[int, int]


class Rows(NamedTuple):
    """Rows of one tensor of the base."""

    key: str
    start: int
    stop: int
    at: int  # the first one's row in the layer


def row_intervals(views: Views) -> list[Rows]:
    found, at = [], 0
    for view in views:
        start, stop = view.rows or (0, view.shape[0])
        found.append(Rows(view.key, start, stop, at))
        at += stop - start
    return found


class FreeRows:
    """Which rows of the base no layer of the output has yet."""

    def __init__(self) -> None:
        self._taken: dict[str, list[_Range]] = defaultdict(list)

    def of(self, views: Views) -> list[Rows]:
        """The free ones among these rows."""
        found = []
        for rows in row_intervals(views):
            place = rows.start
            for start, stop in sorted(self._taken[rows.key]):
                if stop <= place or start >= rows.stop:
                    continue
                if start > place:
                    found.append(Rows(rows.key, place, start, rows.at + place - rows.start))
                place = stop
            if place < rows.stop:
                found.append(Rows(rows.key, place, rows.stop, rows.at + place - rows.start))
        return found

    def take(self, rows: Sequence[Rows]) -> None:
        """They belong to a layer of the output now."""
        for each in rows:
            self._taken[each.key].append((each.start, each.stop))


def joined_runs(runs: Sequence[RowRun]) -> tuple[RowRun, ...]:
    """Neighbours as one."""
    joined: list[RowRun] = []
    for run in sorted(runs):
        last = joined[-1] if joined else None
        if last and (last.at + last.size, last.start + last.size) == (run.at, run.start):
            joined[-1] = last._replace(size=last.size + run.size)
        else:
            joined.append(run)
    return tuple(joined)
