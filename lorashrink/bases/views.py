"""A weight as adapters see it: a tensor of the base, some of its rows, or several of them stacked."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import accumulate


@dataclass(frozen=True, slots=True)
class View:
    """A tensor of the base, or a range of its rows, perhaps transposed."""

    key: str
    shape: tuple[int, ...]  # of the view, [out, in, ...]
    rows: tuple[int, int] | None = None
    transposed: bool = False

    @property
    def span(self) -> tuple[int, int]:
        """First row in the tensor, and the one behind the last."""
        return self.rows or (0, self.shape[0])

    def __str__(self) -> str:
        return self.key if self.rows is None else f"{self.key}[{self.rows[0]}:{self.rows[1]}]"


# Views in row order; several where the adapter's weight is fused and the base's is split.
Views = tuple[View, ...]


def views_shape(views: Views) -> tuple[int, ...]:
    """Shape of the stacked views."""
    return (sum(view.shape[0] for view in views), *views[0].shape[1:])


def views_id(views: Views) -> str:
    """A name for the stacked views, unique within their base."""
    return " + ".join(map(str, views))


def stacked(parts: list[Views]) -> Views | None:
    """All parts one below the next; None if their rows differ in length."""
    views = tuple(view for part in parts for view in part)
    return views if len({view.shape[1:] for view in views}) == 1 else None


def cut(views: Views, sizes: list[int]) -> list[Views] | None:
    """The rows in pieces of these sizes; None if they do not add up, or a view has no rows to choose from."""
    if sum(sizes) != views_shape(views)[0] or min(sizes) <= 0:
        return None
    if len(sizes) == 1:
        return [views]
    if any(view.transposed for view in views):
        return None
    pieces = []
    for size, stop in zip(sizes, accumulate(sizes), strict=True):
        piece, first = [], 0  # rows [stop - size, stop) of the stacked views
        for view in views:
            low, high = max(stop - size - first, 0), min(stop - first, view.shape[0])
            first += view.shape[0]
            if low < high and high - low < view.shape[0]:
                offset = view.span[0]
                view = replace(view, shape=(high - low, *view.shape[1:]), rows=(offset + low, offset + high))
            if low < high:
                piece.append(view)
        pieces.append(tuple(piece))
    return pieces


@dataclass(frozen=True, slots=True)
class BaseInfo:
    """The base of a run."""

    path: str
    family: str
    kind: str  # "file", "shards", "folder" or "norms"
