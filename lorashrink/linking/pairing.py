"""Which layers of several adapters change the same weights, whatever the adapters' names, families and ranks.

With a base its weights tell; without one equal names do, and names of two programs where one of them writes dots.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations, pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from lorashrink.adapters import Adapter, Layer, adapter_family
from lorashrink.bases import Base, View, Views, views_id
from lorashrink.bases.families import UNKNOWN, family_named, family_title
from lorashrink.bases.weights import name_weights
from lorashrink.engine.delta import Delta, fan_in
from lorashrink.errors import FamilyMismatch, ShapeError, UsageError
from lorashrink.linking.matching import bind, find_fitting, match
from lorashrink.linking.rows import RowMap, Rows, row_intervals
from lorashrink.names import address


def matched(sides: Sequence[Adapter], base: Base | None) -> tuple[Base | None, list[list[Views]]]:
    """(what finds a layer by its name, the rows that each layer of each adapter changes).

    A layer that is not found stands for a weight of its own name. Raises FamilyMismatch or ShapeError if the adapters
    were made for different models, and UsageError if only a base could tell which layers are the same.
    """
    seen: dict[str, tuple[Adapter, tuple[int, ...]]] = {}
    for side in sides:
        for layer in side:
            if len(layer.shape) < 2:
                continue
            first_side, shape = seen.setdefault(layer.name, (side, layer.shape))
            if shape != layer.shape and (shape[0], fan_in(shape)) != (layer.shape[0], fan_in(layer.shape)):
                raise _families_differ(first_side, side) or ShapeError(
                    f"{first_side.path} and {side.path}: {layer.name} is {list(shape)} in the first and "
                    f"{list(layer.shape)} in the second. Take adapters that were made for the same model."
                )
    if base:
        return base, [_or_own(side, match(side, base)) for side in sides]
    tried = []
    for names in _dictionaries(sides):
        views = [_or_own(side, find_fitting(side, names) if names else [()] * len(side)) for side in sides]
        unpaired = _unpaired(sides, views)
        if not unpaired:
            return names, views
        tried.append((unpaired, names, views))
    unpaired, names, views = min(tried, key=lambda attempt: sum(pair.layers for pair in attempt[0]))
    for pair in unpaired:
        pair.check()
    return names, views


def _families_differ(a: Adapter, b: Adapter) -> FamilyMismatch | None:
    family_a, family_b = adapter_family(a), adapter_family(b)
    if family_a is None or family_b is None or family_a == family_b:
        return None
    return FamilyMismatch(
        f"{a.path} looks like an adapter for {family_title(family_a)}, {b.path} like one for "
        f"{family_title(family_b)}. Take adapters of one model."
    )


def _dictionaries(sides: Sequence[Adapter]) -> Iterator[Base | None]:
    """What may know all names without a base: nothing, if names are equal, or one adapter those of the others.

    Such an adapter is a base of just the weights that it names; names that it has flattened are no way back.
    """
    yield None
    family = family_named(next(filter(None, map(adapter_family, sides)), "")) or UNKNOWN
    for side in sides:
        layers = {layer.name.removeprefix("base_model.model."): layer for layer in side}
        if all("." in name for name in layers):
            shapes = {f"{name}.weight": layer.shape for name, layer in layers.items() if len(layer.shape) > 1}
            weights = name_weights(shapes, family).by_name.values()
            yield Base(side.path, "names", family, shapes, "", norms={views_id(views): {} for views in weights})


def _or_own(side: Adapter, views: Sequence[Views]) -> list[Views]:
    """The views, for a layer without any those of a weight of its own name."""
    own: list[Views] = [(View(layer.name, (*layer.shape, 1, 1)[: max(2, len(layer.shape))]),) for layer in side]
    return [in_model or by_name for in_model, by_name in zip(views, own, strict=True)]


def in_base(side: Adapter, views: Sequence[Views]) -> list[Views]:
    """What `matched` found in the base: () for the layers that stand for a weight of their own name."""
    pairs = zip(side, views, strict=True)
    return [() if layer_views[0].key == layer.name else layer_views for layer, layer_views in pairs]


def bind_all(sides: Sequence[Adapter], views: Sequence[Sequence[Views]], base: Base | None) -> list[Adapter]:
    """The adapters with what their layers need of the base, for views of `matched`."""
    return [bind(side, in_base(side, rows), base) for side, rows in zip(sides, views, strict=True)]


class _Unpaired(NamedTuple):
    """Two adapters that each change something that the other does not, with the names of these layers."""

    a: Adapter
    b: Adapter
    only_a: list[str]
    only_b: list[str]

    @property
    def layers(self) -> int:
        return len(self.only_a) + len(self.only_b)

    def check(self) -> None:
        """Raises FamilyMismatch or UsageError if these may be the same layers under other names."""
        strangers = None
        if self.layers == len(self.a) + len(self.b):
            strangers = _families_differ(self.a, self.b)
        words: list[dict[str, set[str]]] = []  # part of the model -> how names of its modules begin, up to a number
        for names in (self.only_a, self.only_b):
            by_part = defaultdict(set)
            for part, module in map(address, names):
                by_part[part].add(re.split(r"_\d", module)[0])
            words.append(by_part)
        if any("" in by_part for by_part in words):  # names that do not tell their part may mean any
            words = [{"": set[str]().union(*by_part.values())} if by_part else {} for by_part in words]
        # layers of one part that found no partner are really different ones if their names are of one kind
        words_a, words_b = words
        if strangers or not all(words_a[part] & words_b[part] for part in words_a.keys() & words_b.keys()):
            raise strangers or UsageError(
                f"{self.a.path} and {self.b.path}: name their layers differently ({self.only_a[0]}; "
                f"{self.only_b[0]}), and names alone do not tell which are the same. Give the base with --base; a "
                "norm table is enough."
            )


def _unpaired(sides: Sequence[Adapter], views: Sequence[Sequence[Views]]) -> list[_Unpaired]:
    """The pairs of which neither side has found all of its layers in the other."""
    keys = [[{view.key for view in layer_views} for layer_views in side_views] for side_views in views]
    all_keys = [set[str]().union(*side_keys) for side_keys in keys]

    def only(side: int, other_side: int) -> list[str]:
        if all_keys[side] <= all_keys[other_side]:
            return []
        pairs = zip(sides[side], keys[side], strict=True)
        return [layer.name for layer, layer_keys in pairs if not layer_keys & all_keys[other_side]]

    pairs = (_Unpaired(sides[a], sides[b], only(a, b), only(b, a)) for a, b in combinations(range(len(sides)), 2))
    return [pair for pair in pairs if pair.only_a and pair.only_b]


class Member(NamedTuple):
    """A layer of one of several adapters."""

    side: int  # number of the adapter
    layer: Layer
    views: Views  # rows that it changes


def members_of(sides: Sequence[Adapter], views: Sequence[Sequence[Views]]) -> list[Member]:
    """The layers of all adapters, in their order."""
    return [
        Member(number, layer, layer_views)
        for number, (side, side_views) in enumerate(zip(sides, views, strict=True))
        for layer, layer_views in zip(side, side_views, strict=True)
    ]


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
        return [layer for number, layer in self.members if number == side]

    @property
    def adapters(self) -> list[int]:
        """Numbers of the adapters that have layers here, ascending."""
        return sorted({number for number, _ in self.members})

    @property
    def bound(self) -> bool:
        """Whether ΔW of every layer can be had; some need a base weight."""
        return all(layer.bound for _, layer in self.members)

    @property
    def rows(self) -> int:
        """How many rows they change together."""
        return sum(piece.size for piece in self.pieces)


def units(sides: Sequence[Adapter], views: Sequence[Sequence[Views]]) -> list[Unit]:
    """Layers that belong together, in the order of the first adapter's, then of the next ones'."""
    members = members_of(sides, views)
    intervals = [row_intervals(member.views) for member in members]
    result = []
    for group in _groups(intervals):
        # the layer that fuses most knows the order of its parts
        by_size = sorted(group, key=lambda index: -len(intervals[index]))
        rows = [(index, interval) for index in by_size for interval in intervals[index]]
        keys = list(dict.fromkeys(interval.key for _, interval in rows))
        first = {index: (keys.index(interval.key), interval.start) for index, interval in reversed(rows)}
        ordered = sorted(group, key=lambda index: (members[index].side, first[index]))
        pieces = []
        for key in keys:  # each tensor is cut wherever a member begins or ends
            in_tensor = [(index, interval) for index, interval in rows if interval.key == key]
            for low, high in pairwise(
                sorted({end for _, interval in in_tensor for end in (interval.start, interval.stop)})
            ):
                starts = {index: part.first for index, interval in in_tensor if (part := interval.cut(low, high))}
                if starts:
                    pieces.append(Piece(high - low, tuple(starts.get(index) for index in ordered)))
        result.append(Unit(tuple((members[index].side, members[index].layer) for index in ordered), tuple(pieces)))
    return result


def _groups(intervals: Sequence[Sequence[Rows]]) -> list[list[int]]:
    """The members that change common rows, directly or through others; ascending."""
    groups = [[member] for member in range(len(intervals))]  # of each member; one list for all in a group
    owners = RowMap[int]()
    spans: set[tuple[str, int, int]] = set()  # rows that are in `owners`: one member of a group stands for all there
    for member, rows in enumerate(intervals):
        for common in owners.common(rows):
            group, joining = groups[member], groups[common.owner]
            if group is not joining:
                group.extend(joining)
                for number in joining:
                    groups[number] = group
        new = [row for row in rows if (row.key, row.start, row.stop) not in spans]
        spans.update((row.key, row.start, row.stop) for row in new)
        owners.add(new, member)
    return [sorted(group) for group in {id(group): group for group in groups}.values()]


def stacked_up(deltas: Sequence[Delta], pieces: Sequence[Piece]) -> Tensor:
    """[rows, Σr]: the factors side by side, each in the rows that it changes."""
    ups = [wide(delta.up) for delta in deltas]
    if len(pieces) == 1:
        return torch.cat(ups, 1)
    bands = []
    for size, starts in pieces:
        band = [
            up.new_zeros(size, up.shape[1]) if start is None else up[start : start + size]
            for up, start in zip(ups, starts, strict=True)
        ]
        bands.append(torch.cat(band, 1))
    return torch.cat(bands)


def wide(factor: Tensor) -> Tensor:
    """torch puts tensors of 8-bit floats beside no others."""
    return factor.float() if factor.element_size() < 2 else factor
