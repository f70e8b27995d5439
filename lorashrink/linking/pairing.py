"""Which layers of several adapters change the same weights, whatever the adapters' names, families and ranks.

With a base its weights tell; without one equal names do, and names of two programs where one of them writes dots.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations, pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from lorashrink.adapters import Adapter, Layer, adapter_family
from lorashrink.bases import FAMILIES, Base, View, Views, views_id
from lorashrink.bases.weights import name_weights
from lorashrink.engine.delta import Delta, fan_in
from lorashrink.errors import FamilyMismatch, ShapeError, UsageError
from lorashrink.linking.matching import fits, match
from lorashrink.names import address


def matched(sides: Sequence[Adapter], base: Base | None) -> tuple[Base | None, list[list[Views]]]:
    """(what finds a layer by its name, the rows that each layer of each adapter changes).

    A layer that is not found stands for a weight of its own name. Raises FamilyMismatch or ShapeError if the adapters
    were made for different models, and UsageError if only a base could tell which layers are the same.
    """
    for one, other in combinations(sides, 2):
        _check_shapes(one, other)
    if base:
        return base, [_or_own(side, match(side, base)) for side in sides]
    tried = []
    for known in _dictionaries(sides):
        views = [_or_own(side, [_find(known, layer) for layer in side] if known else None) for side in sides]
        apart = _apart(sides, views)
        if not apart:
            return known, views
        tried.append((sum(len(name) for pair in apart for name in pair.left), apart, known, views))
    _, apart, known, views = min(tried, key=lambda each: each[0])
    for pair in apart:
        pair.check()
    return known, views


def _dictionaries(sides: Sequence[Adapter]) -> Iterator[Base | None]:
    """What may know all names without a base: none needed, or one adapter those of the others."""
    yield None
    family = next(filter(None, map(adapter_family, sides)), None)
    for side in sides:
        if known := _named_as_in(side, family):
            yield known


class _Apart(NamedTuple):
    """Two adapters that both change what the other one does not."""

    one: Adapter
    other: Adapter
    left: tuple[list[str], list[str]]  # the names of these layers

    def check(self) -> None:
        """Raises FamilyMismatch or UsageError if these may be the same layers under other names."""
        strangers = None
        if sum(map(len, self.left)) == len(self.one) + len(self.other):
            strangers = _families_differ(self.one, self.other)
        if strangers or not _speak_alike(*self.left):
            raise strangers or UsageError(
                f"{self.one.path} and {self.other.path}: name their layers differently ({self.left[0][0]}; "
                f"{self.left[1][0]}), and names alone do not tell which are the same. Give the base with --base; a "
                "norm table is enough."
            )


def _apart(sides: Sequence[Adapter], views: Sequence[Sequence[Views]]) -> list[_Apart]:
    """The pairs of which neither side has found all of its layers in the other."""
    keys = [{view.key for each in found for view in each} for found in views]

    def left(number: int, other: int) -> list[str]:
        if keys[number] <= keys[other]:
            return []
        layers = zip(sides[number], views[number], strict=True)
        return [layer.name for layer, each in layers if not keys[other] & {view.key for view in each}]

    pairs = [(a, b, (left(a, b), left(b, a))) for a, b in combinations(range(len(sides)), 2)]
    return [_Apart(sides[a], sides[b], names) for a, b, names in pairs if all(names)]


def _or_own(side: Adapter, found: Sequence[Views] | None) -> list[Views]:
    own: list[Views] = [(View(layer.name, (*layer.shape, 1, 1)[: max(2, len(layer.shape))]),) for layer in side]
    return [one or other for one, other in zip(found, own, strict=True)] if found else own


def in_base(side: Adapter, views: Sequence[Views]) -> list[Views]:
    """What `matched` found in the base: () for the layers that stand for a weight of their own name."""
    return [() if each[0].key == layer.name else each for layer, each in zip(side, views, strict=True)]


def _named_as_in(adapter: Adapter, looks: str | None) -> Base | None:
    """A base of just the weights that an adapter names; None if it has flattened the names, which is no way back."""
    names = {layer.name.removeprefix("base_model.model."): layer for layer in adapter}
    if not all("." in name for name in names):
        return None
    shapes = {f"{name}.weight": layer.shape for name, layer in names.items() if len(layer.shape) > 1}
    family = next((family for family in FAMILIES if family.name == looks), FAMILIES[-1])
    found = name_weights(shapes, family).by_name.values()
    return Base(adapter.path, "names", family, shapes, "", norms={views_id(views): {} for views in found})


def _find(base: Base, layer: Layer) -> Views:
    views = base.find(layer.name)
    return views if views and fits(layer, views) else ()


def _speak_alike(left_a: Sequence[str], left_b: Sequence[str]) -> bool:
    """Whether layers that found no partner have names of one kind, so that they are really different layers."""
    words = _first_words(left_a), _first_words(left_b)
    one, other = words
    if "" in {*one, *other}:  # names that do not tell their part may mean any
        one, other = ({"": set().union(*each.values())} if each else {} for each in words)
    return all(one[part] & other[part] for part in one.keys() & other.keys())


def _first_words(names: Iterable[str]) -> dict[str, set[str]]:
    """Part of the model -> how names of its modules begin, up to the first number."""
    found: dict[str, set[str]] = {}
    for part, module in map(address, names):
        found.setdefault(part, set()).add(re.split(r"_\d", module)[0])
    return found


def _check_shapes(a: Adapter, b: Adapter) -> None:
    """Raises FamilyMismatch or ShapeError if layers of one name change weights of different shapes."""
    one, other = ({layer.name: layer for layer in side if len(layer.shape) > 1} for side in (a, b))
    for name in one.keys() & other.keys():
        shapes = [layer.shape for layer in (one[name], other[name])]
        if len({(shape[0], fan_in(shape)) for shape in shapes}) > 1:
            raise _families_differ(a, b) or ShapeError(
                f"{a.path} and {b.path}: {name} is {list(shapes[0])} in the first and {list(shapes[1])} in the second. "
                "Take adapters that were made for the same model."
            )


def _families_differ(a: Adapter, b: Adapter) -> FamilyMismatch | None:
    looks = [adapter_family(each) for each in (a, b)]
    if looks[0] == looks[1] or None in looks:
        return None
    titles = {family.name: family.title for family in FAMILIES}
    one, other = (titles.get(str(each), each) for each in looks)
    return FamilyMismatch(
        f"{a.path} looks like an adapter for {one}, {b.path} like one for {other}. Take adapters of one model."
    )


class Piece(NamedTuple):
    """Rows of a weight of the base, and the first row of each member there; None where it does not reach."""

    size: int
    starts: tuple[int | None, ...]


@dataclass(frozen=True, eq=False, slots=True)
class Unit:
    """Layers of one or several adapters that change the same rows."""

    members: tuple[tuple[int, Layer], ...]  # (number of the adapter, layer)
    pieces: tuple[Piece, ...]

    def of(self, side: int) -> list[Layer]:
        """The layers of one adapter."""
        return [layer for each, layer in self.members if each == side]

    @property
    def rows(self) -> int:
        """How many rows they change together."""
        return sum(piece.size for piece in self.pieces)


class _Span(NamedTuple):
    """Rows of one tensor of the base that a layer changes."""

    key: str
    start: int
    stop: int
    member: int
    offset: int  # of the first one in the layer


def units(sides: Sequence[Adapter], views: Sequence[Sequence[Views]]) -> list[Unit]:
    """Layers that belong together, in the order of the first adapter's, then of the next ones'."""
    members = [
        (number, layer, each)
        for number, (side, found) in enumerate(zip(sides, views, strict=True))
        for layer, each in zip(side, found, strict=True)
    ]
    spans = [span for number, (_, _, each) in enumerate(members) for span in _spans(number, each)]
    by_key: dict[str, list[_Span]] = {}
    for span in spans:
        by_key.setdefault(span.key, []).append(span)
    groups = [[number] for number in range(len(members))]
    for each in by_key.values():
        reach, last = -1, -1
        for span in sorted(each, key=lambda span: (span.start, span.stop)):
            if span.start < reach:
                _join(groups, last, span.member)
            last, reach = span.member, max(reach, span.stop)
    found = []
    for group in {id(group): group for group in groups}.values():
        # the layer that fuses most knows the order of its parts
        by_size = sorted(sorted(group), key=lambda number: -len(members[number][2]))
        inside = [span for number in by_size for span in _spans(number, members[number][2])]
        keys = list(dict.fromkeys(span.key for span in inside))
        first = {span.member: (keys.index(span.key), span.start) for span in reversed(inside)}
        ordered = sorted(group, key=lambda number: (members[number][0], first[number]))
        found.append(Unit(tuple(members[number][:2] for number in ordered), _pieces(ordered, inside)))
    return found


def _spans(member: int, views: Views) -> list[_Span]:
    spans, offset = [], 0
    for view in views:
        start, stop = view.rows or (0, view.shape[0])
        spans.append(_Span(view.key, start, stop, member, offset))
        offset += stop - start
    return spans


def _join(groups: list[list[int]], one: int, other: int) -> None:
    if groups[one] is not groups[other]:
        groups[one].extend(groups[other])
        for number in groups[other]:
            groups[number] = groups[one]


def _pieces(group: Sequence[int], spans: Sequence[_Span]) -> tuple[Piece, ...]:
    pieces = []
    for key in dict.fromkeys(span.key for span in spans):
        here = [span for span in spans if span.key == key]
        for low, high in pairwise(sorted({end for span in here for end in (span.start, span.stop)})):
            found = {s.member: s.offset + low - s.start for s in here if s.start <= low and high <= s.stop}
            if found:
                pieces.append(Piece(high - low, tuple(found.get(number) for number in group)))
    return tuple(pieces)


def stacked_up(deltas: Sequence[Delta], pieces: Sequence[Piece]) -> Tensor:
    """[rows, Σr]: the factors side by side, each in the rows that it changes."""
    ups = [wide(delta.up) for delta in deltas]
    if len(pieces) == 1:
        return torch.cat(ups, 1)
    parts = []
    for size, starts in pieces:
        inside = [
            up.new_zeros(size, up.shape[1]) if start is None else up[start : start + size]
            for up, start in zip(ups, starts, strict=True)
        ]
        parts.append(torch.cat(inside, 1))
    return torch.cat(parts)


def wide(factor: Tensor) -> Tensor:
    """torch puts tensors of 8-bit floats beside no others."""
    return factor.float() if factor.element_size() < 2 else factor
