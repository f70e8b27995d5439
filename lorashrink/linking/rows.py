"""Row intervals of base weights: which rows of which tensor a layer, a module or a statistic covers."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise
from typing import Generic, NamedTuple, TypeVar

from lorashrink.bases import Views

Owner = TypeVar("Owner")


class Rows(NamedTuple):
    """Rows `start` to `stop` of one tensor of the base, as a layer sees them."""

    key: str
    start: int
    stop: int
    first: int  # row of the layer at `start`

    @property
    def size(self) -> int:
        """How many rows."""
        return self.stop - self.start

    @property
    def in_layer(self) -> tuple[int, int]:
        """First row in the layer, and the one behind the last."""
        return self.first, self.first + self.size

    def cut(self, start: int, stop: int) -> Rows | None:
        """The rows that also lie in start to stop of the tensor; None if there are none."""
        low, high = max(self.start, start), min(self.stop, stop)
        return Rows(self.key, low, high, self.first + low - self.start) if low < high else None


class RowRun(NamedTuple):
    """Neighbouring rows of a target that are neighbouring rows of a source."""

    at: int  # first row in the target
    start: int  # first row in the source
    size: int


class Common(NamedTuple, Generic[Owner]):
    """The same rows of the base, as a layer sees them and as an owner sees them."""

    rows: Rows
    own: Rows
    owner: Owner


class Clash(NamedTuple, Generic[Owner]):
    """A tensor of which two owners have the same rows."""

    key: str
    owners: tuple[Owner, Owner]  # by their first rows


def row_intervals(views: Views) -> list[Rows]:
    """The rows that a layer with these views changes, in the order of its own rows."""
    intervals, first = [], 0
    for view in views:
        start, stop = view.span
        intervals.append(Rows(view.key, start, stop, first))
        first += stop - start
    return intervals


class RowMap(Generic[Owner]):
    """Which rows of the base belong to which owners."""

    def __init__(self) -> None:
        self._by_key: dict[str, list[tuple[Rows, Owner]]] = defaultdict(list)

    def add(self, rows: Iterable[Rows], owner: Owner) -> None:
        """Give these rows to an owner; several owners may have the same ones."""
        for interval in rows:
            self._by_key[interval.key].append((interval, owner))

    def common(self, rows: Iterable[Rows]) -> Iterator[Common[Owner]]:
        """What each owner has of these rows, interval by interval, owners in the order in which they were added."""
        for interval in rows:
            for own, owner in self._by_key.get(interval.key, ()):
                part = interval.cut(own.start, own.stop)
                if part and (own_part := own.cut(part.start, part.stop)):
                    yield Common(part, own_part, owner)

    def free(self, rows: Iterable[Rows]) -> list[Rows]:
        """The parts of these rows that no owner has."""
        free = []
        for interval in rows:
            start = interval.start
            for taken in sorted(common.rows for common in self.common([interval])):
                free.append(interval.cut(start, taken.start))
                start = max(start, taken.stop)
            free.append(interval.cut(start, interval.stop))
        return [part for part in free if part]

    def clash(self) -> Clash[Owner] | None:
        """Two owners with common rows, None if all rows have one owner."""
        for key, intervals in self._by_key.items():
            ordered = sorted(intervals, key=lambda pair: pair[0])
            for (rows, owner), (next_rows, next_owner) in pairwise(ordered):
                if next_rows.start < rows.stop:
                    return Clash(key, (owner, next_owner))
        return None


def joined_runs(runs: Iterable[RowRun]) -> tuple[RowRun, ...]:
    """The same runs, by their place in the target; neighbours that are neighbours in the source too become one."""
    joined: list[RowRun] = []
    for run in sorted(runs):
        last = joined[-1] if joined else None
        if last and (last.at + last.size, last.start + last.size) == (run.at, run.start):
            joined[-1] = last._replace(size=last.size + run.size)
        else:
            joined.append(run)
    return tuple(joined)


def covers(runs: Sequence[RowRun], rows: int) -> bool:
    """Whether the first `rows` rows of the source are all of the target's, in their order."""
    return tuple(runs) == (RowRun(0, 0, rows),)
