"""Several adapters as one: the weighted sum of what they add to each weight of the base.

Factors are never added, which would also multiply those of one adapter with those of another. They are put side by
side, ΔW = [w₁s₁B₁ | w₂s₂B₂] · [A₁; A₂], so that the sum is exact whatever ranks, scales and families they have. Where
it has no low rank it is a matrix, one layer at a time. Each row of a weight of the base is written by one layer of the
output; the layers are those of the first adapter, and for what it does not change those that it would have.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from lorashrink import metadata
from lorashrink.adapters import Adapter, Layer, adapter_family, layer_name, lora, open_adapter, peft
from lorashrink.adapters.family import Family, Infos, Shape
from lorashrink.bases import FAMILIES, Base, Views, views_shape
from lorashrink.bases.rules import LAYOUTS
from lorashrink.delta import Delta, Dense, Kronecker, factored, fan_in
from lorashrink.errors import FamilyMismatch, NonFinite, ShapeError, UsageError
from lorashrink.files import DTYPES, ComputedStore, cast, sha256_file, tensor_info
from lorashrink.inputs import Sum
from lorashrink.matching import bind
from lorashrink.names import address, kind, naming
from lorashrink.pairing import in_base, matched
from lorashrink.renaming import NAMINGS, Made, layer_name_in, layout_of
from lorashrink.results import WeightedSource

if TYPE_CHECKING:
    from torch import Tensor

    from lorashrink.delta import AnyDelta

# What is left of a sum that is smaller than this part of its terms is their rounding.
_CANCELLED = 2.0**-20
_PROBES = 4  # random inputs that both sides of that comparison are applied to
_BLOCK = 1 << 20  # numbers of a ΔW that are formed at a time


class _Run(NamedTuple):
    """Neighbouring rows that a layer adds to."""

    at: int  # first row in the sum
    start: int  # first row in the layer
    size: int


@dataclass(frozen=True, eq=False, slots=True)
class Part:
    """A layer of one of the adapters, and where it goes."""

    layer: Layer
    weight: float
    runs: tuple[_Run, ...]

    def covers(self, rows: int) -> bool:
        """Whether a sum of so many rows has those of this layer, all of them and in their order."""
        return self.runs == (_Run(0, 0, rows),) and self.layer.shape[0] == rows

    def delta(self) -> AnyDelta:
        """What the layer adds at its weight. Raises NonFinite."""
        found = _with_magnitude(self.layer) if "magnitude" in self.layer.keys else self.layer.delta
        if not all(bool(each.float().isfinite().all()) for each in _tensors(found)):
            raise NonFinite(
                f"{self.layer.store.path}: layer {self.layer.name} contains NaN or infinity. The training diverged, "
                "or the file is damaged; use an earlier checkpoint."
            )
        return _times(found, self.weight)


@dataclass(frozen=True, eq=False)
class SumLayer(Layer):
    """What several layers add to the same weight, as a LoRA; `keys` and `infos` are those of the output."""

    parts: tuple[Part, ...] = ()
    kind: str = "F16"  # dtype in which it is written if nothing else is asked for

    @property
    def rank(self) -> int:
        """Σ of the stored ranks."""
        return sum(part.layer.rank for part in self.parts)

    @property
    def width(self) -> int:
        """Rank of `delta`, as far as headers tell."""
        return min(sum(part.layer.width for part in self.parts), *self._sides)

    @property
    def scale(self) -> float:
        """1: weights and scales are inside of `delta`."""
        return 1.0

    @property
    def algo(self) -> str:
        """The families of the layers that it is the sum of."""
        return "+".join(sorted({part.layer.algo for part in self.parts}))

    @property
    def dtype(self) -> str:
        """The widest dtype of the adapters."""
        return self.kind

    @property
    def delta(self) -> AnyDelta:
        """The sum, in factors where they are fewer numbers than the matrix. Raises NonFinite."""
        deltas = [part.delta() for part in self.parts]
        if len(deltas) == 1 and self.parts[0].covers(self.shape[0]):
            return replace(deltas[0], shape=self.shape)
        runs = [part.runs for part in self.parts]
        if sum(delta.rank for delta in deltas) < min(self._sides):
            return _side_by_side([_factors(delta) for delta in deltas], runs, self.shape)
        return _added(deltas, runs, self.shape)

    @property
    def _sides(self) -> tuple[int, int]:
        return self.shape[0], fan_in(self.shape)


@dataclass(frozen=True, eq=False)
class SumAdapter(Adapter):
    """A weighted sum as an adapter like any other."""

    sources: tuple[WeightedSource, ...] = ()
    identity: str = ""  # SHA-256 of all that decides its contents


def contents_sha256(adapter: Adapter) -> str:
    """SHA-256 of an adapter's contents: of its file, or of all that a sum is made of."""
    return adapter.identity if isinstance(adapter, SumAdapter) else sha256_file(adapter.store.files[0])


def sources_of(adapter: Adapter) -> tuple[WeightedSource, ...]:
    """What the adapter is a sum of; () if it is none."""
    return adapter.sources if isinstance(adapter, SumAdapter) else ()


def combined(
    terms: Sum, base: Base | None = None, *, naming: str | None = None, as_base_delta: bool = False
) -> SumAdapter:
    """The weighted sum of adapters of any family, rank and naming, in the names of the first or in those of `naming`.

    Nothing is computed before a layer's `delta` is asked for. as_base_delta: DoRA adds what it makes of the weights of
    the base. Raises UsageError (DoRA without that, names that only a base tells, tensors that cannot be added),
    FamilyMismatch or ShapeError (adapters of different models), and InputError.
    """
    weights = [weight for _, weight in terms.terms]
    with ExitStack() as stack:
        sides = [stack.enter_context(open_adapter(path)) for path, _ in terms.terms]
        if base is None:
            _check_families(sides)
        known, views = matched(sides, base)
        bound = [bind(side, in_base(side, each), base) for side, each in zip(sides, views, strict=True)]
        _check_layers([side for side, weight in zip(bound, weights, strict=True) if weight], as_base_delta)
        names = _Names.of(bound[0], views[0], known, naming)
        slots = _slots(bound, views, weights, names)
        dtype = _widest(bound)
        extras = _extras(bound, weights, names, dtype)
        hashes = [sha256_file(side.store.files[0]) for side in bound]
        origins = [
            metadata.Summand(path.name, digest, weight, side.store.metadata)
            for (path, weight), digest, side in zip(terms.terms, hashes, bound, strict=True)
        ]
        store = _Store(terms.path, extras.made, metadata.summed(origins), bound)
        layers = tuple(_layer(slot, names.spelling, dtype, store) for slot in slots)
        folder = bound[0].as_folder if naming is None else naming == "peft"
        settings = _settings(bound, layers, folder, naming)
        if settings and not folder:
            store.metadata[peft.METADATA_KEY] = peft.to_metadata(settings)
        stack.pop_all()  # the store closes them
    configs = [sha256_file(side.path / peft.CONFIG_FILE) for side in bound if peft.is_folder(side.path)]
    told = [hashes, configs, weights, base.fingerprint if base else "", naming, as_base_delta]
    return SumAdapter(
        path=terms.path,
        store=store,
        layers=layers,
        others=extras.kept,
        settings=settings,
        as_folder=folder,
        dropped=extras.dropped,
        sources=tuple(WeightedSource(str(path), weight) for path, weight in terms.terms),
        identity=hashlib.sha256(json.dumps(told).encode()).hexdigest(),
    )


class _Store(ComputedStore):
    """The tensors beside the layers; the adapters stay open as long as it."""

    def __init__(
        self, path: Path, made: Mapping[str, Made], entries: Mapping[str, str], sides: Sequence[Adapter]
    ) -> None:
        self._sides = tuple(sides)
        stores = [side.store for side in sides]
        files = [file for store in stores for file in store.files]
        super().__init__(path, made, entries, files, [header for store in stores for header in store.headers])

    def close(self) -> None:
        """Close the files of all adapters."""
        for side in self._sides:
            side.close()


# --- what cannot be added -----------------------------------------------------------------------


def _check_families(sides: Sequence[Adapter]) -> None:
    """Raises FamilyMismatch if the adapters were made for different families of models, as far as they tell."""
    titles = {family.name: family.title for family in FAMILIES}
    told = [(side, looks) for side in sides if (looks := adapter_family(side))]
    for (one, first), (other, second) in combinations(told, 2):
        if first != second:
            raise FamilyMismatch(
                f"{one.path} is an adapter for {titles.get(first, first)}, {other.path} is one for "
                f"{titles.get(second, second)}. Merge adapters of one model."
            )


def _check_layers(sides: Sequence[Adapter], as_base_delta: bool) -> None:
    """Raises UsageError if what a layer adds cannot be had, or is no sum."""
    for side in sides:
        for layer in side:
            dora = "magnitude" in layer.keys
            if dora and not as_base_delta:
                raise UsageError(
                    f"{side.path}: {layer.name} is DoRA, whose strength is not linear, so that no sum of factors is "
                    "right. With the checkpoint as --base, --as-base-delta merges what it makes of its weights."
                )
            if not layer.bound or (dora and layer.weight is None):
                why = "DoRA changes the base weight itself" if dora else layer.family.needs.value
                raise UsageError(
                    f"{side.path}: {layer.name} is {layer.algo}: {why}. Give the checkpoint with --base; a norm table "
                    "is not enough."
                )


def _with_magnitude(layer: Layer) -> Dense:
    """ΔW of DoRA, m·(W + ΔW)/‖W + ΔW‖ − W: W in float64, because the difference is small.

    The norms are those of rows, or where the magnitude has a number per input those of all that this input is
    multiplied with (LyCORIS without `wd_on_out`).
    """
    import torch

    assert layer.weight is not None, "`_check_layers` asks for it"
    weight = layer.weight().double()
    changed = weight + layer.delta.dense().flatten(1)
    magnitude = layer.store.read(layer.keys["magnitude"]).double()
    by_input = changed.reshape(len(changed), layer.shape[1], -1)
    if _per_output(layer, magnitude):
        norms, wanted = by_input.norm(dim=(1, 2), keepdim=True), magnitude.reshape(-1, 1, 1)
    else:
        norms, wanted = by_input.norm(dim=(0, 2), keepdim=True), magnitude.reshape(1, -1, 1)
    shares = torch.where(norms > 0, wanted / norms, 0)
    return Dense(((by_input * shares).flatten(1) - weight).float(), 1.0, layer.shape)


def _per_output(layer: Layer, magnitude: Tensor) -> bool:
    """PEFT's magnitudes always are; those of LyCORIS tell by which dimension is not 1."""
    if ".lora_magnitude_vector" in layer.keys["magnitude"] or magnitude.ndim == 1:
        return True
    return magnitude.shape[0] == layer.shape[0] != 1


# --- names --------------------------------------------------------------------------------------


class _Spelling(NamedTuple):
    """How the factors of a LoRA are called behind the name of their layer."""

    family: Family
    endings: Mapping[str, str]  # role -> ending


_KOHYA = _Spelling(lora.KOHYA, {"up": ".lora_up.weight", "down": ".lora_down.weight", "alpha": ".alpha"})
_PEFT = _Spelling(lora.PEFT, {"up": ".lora_B.weight", "down": ".lora_A.weight"})


def _spelling(adapter: Adapter) -> _Spelling | None:
    """That of the first LoRA in the adapter."""
    for layer in adapter:
        if layer.family.name == "lora":
            if layer.family is lora.KOHYA:
                return _KOHYA
            used = {role: layer.keys[role] for role in ("up", "down", "alpha") if role in layer.keys}
            return _Spelling(layer.family, {role: key[len(layer.name) :] for role, key in used.items()})
    return None


_Address = tuple[str, str]  # (part, module name)
_LEVEL = "text_model."  # of CLIP, which transformers >= 5 leaves out


@dataclass(frozen=True, eq=False, slots=True)
class _Names:
    """What layers of the output are called."""

    naming: str
    asked: bool  # whether that is another naming than the first adapter's
    spelling: _Spelling | None
    known: Base | None  # finds a layer by its name
    layout: str | None  # of the modules, if these can be named
    by_key: Mapping[str, Sequence[tuple[_Address, Views]]]  # tensor of the base -> its modules in the layout
    short: frozenset[str] = frozenset()  # parts in whose names the first adapter leaves out the level text_model

    @classmethod
    def of(cls, first: Adapter, views: Sequence[Views], known: Base | None, asked: str | None) -> _Names:
        """The naming that is asked for, or the one of the first adapter."""
        if asked:
            spelling = _KOHYA if asked == "kohya" else _PEFT
            layout = layout_of(asked, known) if known else None
            return cls(asked, True, spelling, known, layout, _by_key(known, layout))
        used = naming([layer.name for layer in first])
        layout = _layout(first, views, known, used) if known else None
        names = cls(used, False, _spelling(first), known, layout, _by_key(known, layout))
        return replace(names, short=frozenset(names._shortened(first, views)))

    def modules(self, key: str) -> list[tuple[str, Views]]:
        """(name, views) of the layers that a tensor of the base has in this naming."""
        return [(self.named(*address), views) for address, views in self.by_key.get(key, ())]

    def named(self, part: str, module: str) -> str:
        """What a layer for this module is called."""
        assert self.known is not None, "it has the modules"
        module = module.removeprefix(_LEVEL) if part in self.short else module
        return layer_name_in(self.naming, self.known.family, part, module)

    def _shortened(self, first: Adapter, views: Sequence[Views]) -> Iterator[str]:
        """The parts of which the adapter has names without the level that they have here."""
        table = self.known.modules(self.layout) if self.known and self.layout else {}
        addresses = {each: address for address, each in table.items()}
        for layer, each in zip(first, views, strict=True):
            part, module = addresses.get(each, ("", ""))
            if module.startswith(_LEVEL) and layer.name == self.named(part, module.removeprefix(_LEVEL)):
                yield part

    def alike(self, side: Adapter) -> bool:
        """Whether an adapter's own names are of this naming."""
        return naming([layer.name for layer in side]) == self.naming

    def owner(self, name: str) -> object:
        """The same for all names of one module."""
        return (self.known.find(name) if self.known else ()) or address(name)


def _by_key(known: Base | None, layout: str | None) -> dict[str, list[tuple[_Address, Views]]]:
    found: dict[str, list[tuple[_Address, Views]]] = defaultdict(list)
    for place, views in known.modules(layout).items() if known and layout else ():
        for key in {view.key: None for view in views}:
            found[key].append((place, views))
    return found


def _layout(first: Adapter, views: Sequence[Views], known: Base, used: str) -> str | None:
    """The layout that the first adapter's names are made of; None if its names are of no naming that can be written."""
    if used not in NAMINGS:
        return None
    counts = {}
    for layout in LAYOUTS:
        named = {each: address for address, each in known.modules(layout).items()}
        pairs = [(layer.name, named[each]) for layer, each in zip(first, views, strict=True) if each in named]
        with suppress(UsageError):  # this naming has no name for a part of the model
            counts[layout] = sum(name == layer_name_in(used, known.family, *place) for name, place in pairs)
    best = max(counts, key=counts.__getitem__, default=None)
    return best if best and counts[best] else layout_of(used, known)


# --- which rows of which layer ------------------------------------------------------------------

_Range = tuple[int, int]


class _Rows(NamedTuple):
    """Rows of one tensor of the base."""

    key: str
    start: int
    stop: int
    at: int  # the first one's row in the layer


def _rows(views: Views) -> list[_Rows]:
    found, at = [], 0
    for view in views:
        start, stop = view.rows or (0, view.shape[0])
        found.append(_Rows(view.key, start, stop, at))
        at += stop - start
    return found


class _Free:
    """Which rows of the base no layer of the output has yet."""

    def __init__(self) -> None:
        self._taken: dict[str, list[_Range]] = defaultdict(list)

    def of(self, views: Views) -> list[_Rows]:
        """The free ones among these rows."""
        found = []
        for rows in _rows(views):
            place = rows.start
            for start, stop in sorted(self._taken[rows.key]):
                if stop <= place or start >= rows.stop:
                    continue
                if start > place:
                    found.append(_Rows(rows.key, place, start, rows.at + place - rows.start))
                place = stop
            if place < rows.stop:
                found.append(_Rows(rows.key, place, rows.stop, rows.at + place - rows.start))
        return found

    def take(self, rows: Sequence[_Rows]) -> None:
        """They belong to a layer of the output now."""
        for each in rows:
            self._taken[each.key].append((each.start, each.stop))


@dataclass(frozen=True, eq=False, slots=True)
class _Slot:
    """A layer of the output."""

    name: str
    views: Views
    rows: Sequence[_Rows]  # those that no layer before it has
    lead: Layer | None  # whose name and shape it has
    parts: list[Part] = field(default_factory=list)


def _slots(
    sides: Sequence[Adapter], views: Sequence[Sequence[Views]], weights: Sequence[float], names: _Names
) -> list[_Slot]:
    """The layers of the output, with what adds to each of their rows."""
    slots: list[_Slot] = []
    free = _Free()
    members = [
        (number, layer, each)
        for number, (side, found) in enumerate(zip(sides, views, strict=True))
        for layer, each in zip(side, found, strict=True)
        if weights[number] or number == 0
    ]
    alike = [names.alike(side) for side in sides]
    for number, layer, each in members:
        leads = number == 0 and not names.asked
        rows = free.of(each)
        for name, module in [] if leads else [found for row in rows for found in names.modules(row.key)]:
            _take(slots, free, _Slot(name, module, free.of(module), None))
        rest = free.of(each)
        if rest and not leads and (rest != rows or not alike[number]):
            raise _unnamed(sides[number], layer, names)
        _take(slots, free, _Slot(layer.name, each, rest, layer))
    by_key: dict[str, list[tuple[_Slot, _Rows]]] = defaultdict(list)
    for slot in slots:
        for own in slot.rows:
            by_key[own.key].append((slot, own))
    for number, layer, each in members:
        if weights[number]:
            _distribute(layer, weights[number], each, by_key)
    return [slot for slot in slots if slot.parts]


def _take(slots: list[_Slot], free: _Free, slot: _Slot) -> None:
    if slot.rows:
        free.take(slot.rows)
        slots.append(slot)


def _unnamed(side: Adapter, layer: Layer, names: _Names) -> UsageError:
    hint = "Give the base with --base; a norm table is enough."
    if names.asked:
        hint = "Leave --naming out."
    elif names.naming not in NAMINGS:
        hint = f"Choose one with --naming and a base: {', '.join(NAMINGS)}."
    return UsageError(
        f"{side.path}: {layer.name} has no known name in {names.naming} naming, which the output is to have. {hint}"
    )


def _distribute(layer: Layer, weight: float, views: Views, slots: Mapping[str, Sequence[tuple[_Slot, _Rows]]]) -> None:
    """Add the layer to all slots that have rows of it."""
    runs: dict[int, list[_Run]] = defaultdict(list)
    found = {}
    for rows in _rows(views):
        for slot, own in slots[rows.key]:
            start, stop = max(rows.start, own.start), min(rows.stop, own.stop)
            if start < stop:
                runs[id(slot)].append(_Run(own.at + start - own.start, rows.at + start - rows.start, stop - start))
                found[id(slot)] = slot
    for place, slot in found.items():
        slot.parts.append(Part(layer, weight, _joined(runs[place])))


def _joined(runs: Sequence[_Run]) -> tuple[_Run, ...]:
    """Neighbours as one."""
    joined: list[_Run] = []
    for run in sorted(runs):
        last = joined[-1] if joined else None
        if last and (last.at + last.size, last.start + last.size) == (run.at, run.start):
            joined[-1] = last._replace(size=last.size + run.size)
        else:
            joined.append(run)
    return tuple(joined)


# --- the layers of the output -------------------------------------------------------------------


def _layer(slot: _Slot, spelling: _Spelling | None, dtype: str, store: _Store) -> SumLayer:
    """The sum as a LoRA under the slot's name. Raises ShapeError if its parts do not fit each other."""
    shape = _shape(slot)
    for part in slot.parts:
        if fan_in(part.layer.shape) != fan_in(shape):
            raise ShapeError(
                f"{part.layer.store.path}: layer {part.layer.name} is {list(part.layer.shape)}, but {slot.name} of "
                "another adapter, which changes the same weight, is "
                f"{list(shape)}. Merge adapters of one model."
            )
    name = re.sub("^oft_unet_", "lora_unet_", slot.name)  # a prefix that no loader of LoRA knows
    family, endings = spelling or (_PEFT if "." in name else _KOHYA)
    out, *inner = shape
    rank = sum(part.layer.rank for part in slot.parts)
    infos: Infos = {
        "up": tensor_info(dtype, (out, rank, *[1] * (len(inner) - 1))),
        "down": tensor_info(dtype, (rank, *inner)),
        "alpha": tensor_info("F32", ()),
    }
    return SumLayer(
        name=name,
        family=family,
        keys={role: name + ending for role, ending in endings.items()},
        infos={role: infos[role] for role in endings},
        store=store,
        parts=tuple(slot.parts),
        kind=dtype,
    )


def _shape(slot: _Slot) -> Shape:
    """That of the base weight, or as far as the adapters tell. Raises UsageError if they tell too little."""
    if slot.lead is None:
        return views_shape(slot.views)
    told = [slot.lead, *(part.layer for part in slot.parts)]
    layer = next((layer for layer in told if layer.shape_known), slot.lead)
    if not layer.shape_known and kind(slot.name, ()) not in ("attn", "mlp", "te"):
        raise UsageError(
            f"{layer.store.path}: {layer.name} is {layer.algo}, and only the base tells whether this is a convolution. "
            "Give it with --base; a norm table is enough."
        )
    return (views_shape(slot.views)[0], *layer.shape[1:])


_FLOATS = ("F16", "BF16", "F32", "F64")  # that factors are written in


def _widest(sides: Sequence[Adapter]) -> str:
    """The widest dtype of all layers; of those with 16 bits the first one's."""
    found = [layer.dtype if layer.dtype in _FLOATS else "F16" for side in sides for layer in side]
    return max(found, key=lambda dtype: DTYPES[dtype][0], default="F16")


# --- numbers ------------------------------------------------------------------------------------


def _tensors(delta: AnyDelta) -> list[Tensor]:
    if isinstance(delta, Kronecker):
        return [*_tensors(delta.first), *_tensors(delta.second)]
    return [delta.up, delta.down] if isinstance(delta, Delta) else [delta.matrix]


def _times(delta: AnyDelta, weight: float) -> AnyDelta:
    if isinstance(delta, Kronecker):
        return replace(delta, first=replace(delta.first, scale=delta.first.scale * weight))
    return replace(delta, scale=delta.scale * weight)


def _factors(delta: AnyDelta) -> Delta:
    """Of a Kronecker product those of its factors multiplied, whose rank is the product of theirs."""
    import torch

    if not isinstance(delta, Kronecker):
        return factored(delta)
    first, second = factored(delta.first), factored(delta.second)
    up, down = (torch.kron(a.float(), b.float()) for a, b in ((first.up, second.up), (first.down, second.down)))
    return Delta(up, down, first.scale * second.scale, delta.shape)


def _precise(factor: Tensor) -> Tensor:
    """In float32, which holds products of half precision numbers and weights; float64 stays."""
    import torch

    return factor if factor.dtype == torch.float64 else factor.float()


def _side_by_side(deltas: Sequence[Delta], runs: Sequence[Sequence[_Run]], shape: Shape) -> Delta:
    """One product of factors: each `up` in its own columns and, times its scale, in the rows that it changes.

    Where several have the same `down`, as parts of a fused weight often do, their columns are added.
    """
    import torch

    ups = [_placed(_precise(delta.up) * delta.scale, each, shape[0]) for delta, each in zip(deltas, runs, strict=True)]
    downs = [_precise(delta.down) for delta in deltas]
    if _cancel(ups, downs):
        return Delta(torch.zeros(shape[0], 1), torch.zeros(1, fan_in(shape)), 1.0, shape)
    unique: list[tuple[Tensor, Tensor]] = []
    for up, down in zip(ups, downs, strict=True):
        twin = next((place for place, (_, other) in enumerate(unique) if _same(other, down)), None)
        if twin is None:
            unique.append((up, down))
        else:
            unique[twin] = (unique[twin][0] + up, down)
    even = [_balanced(up, down) for up, down in unique]
    dtype = max((each.dtype for pair in even for each in pair), key=lambda dtype: dtype.itemsize)
    up = torch.cat([pair[0].to(dtype) for pair in even], 1)
    return Delta(up, torch.cat([pair[1].to(dtype) for pair in even]), 1.0, shape)


def _placed(up: Tensor, runs: Sequence[_Run], rows: int) -> Tensor:
    """[rows, r] with the rows of `up` where they belong, and zeros elsewhere."""
    if tuple(runs) == (_Run(0, 0, rows),):
        return up[:rows]
    placed = up.new_zeros(rows, up.shape[1])
    for at, start, size in runs:
        placed[at : at + size] = up[start : start + size]
    return placed


def _same(one: Tensor, other: Tensor) -> bool:
    import torch

    return one.shape == other.shape and one.dtype == other.dtype and torch.equal(one, other)


def _cancel(ups: Sequence[Tensor], downs: Sequence[Tensor]) -> bool:
    """Whether nothing but rounding is left of the sum, as far as some random inputs tell."""
    import torch

    if len(ups) < 2:
        return False
    probes = torch.randn(downs[0].shape[1], _PROBES, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    images = [up.double() @ (down.double() @ probes) for up, down in zip(ups, downs, strict=True)]
    return float(torch.stack(images).sum(0).norm()) <= _CANCELLED * sum(float(image.norm()) for image in images)


def _balanced(up: Tensor, down: Tensor) -> tuple[Tensor, Tensor]:
    """Both sides about equally long, by a power of two, so that no digit is lost.

    Side by side, a factor that is small only because its partner is large would look like rounding.
    """
    lengths = float(up.double().norm()), float(down.double().norm())
    if not all(lengths):
        return up, down
    shift = 2.0 ** round((math.log2(lengths[1]) - math.log2(lengths[0])) / 2)
    return up * shift, down / shift


def _added(deltas: Sequence[AnyDelta], runs: Sequence[Sequence[_Run]], shape: Shape) -> Dense:
    """The sum as a matrix, float32; each term is formed in float64, some rows at a time."""
    import torch

    total = torch.zeros(shape[0], fan_in(shape))
    lengths = 0.0
    for delta, each in zip(deltas, runs, strict=True):
        square = 0.0
        for at, rows in _blocks(delta, each):
            total[at : at + len(rows)] += rows
            square += float(rows.double().square().sum())
        lengths += math.sqrt(square)
    if len(deltas) > 1 and float(total.double().norm()) <= _CANCELLED * lengths:
        total.zero_()
    return Dense(total, 1.0, shape)


def _blocks(delta: AnyDelta, runs: Sequence[_Run]) -> Iterator[tuple[int, Tensor]]:
    """(first row in the sum, rows of ΔW, float32), no more than some at a time but for a Kronecker product's."""
    if isinstance(delta, Kronecker):
        matrix = delta.dense().flatten(1)
        for at, start, size in runs:
            yield at, matrix[start : start + size]
        return
    width = fan_in(delta.shape)
    step = max(1, _BLOCK // width)
    for at, start, size in runs:
        for low in range(start, start + size, step):
            high = min(low + step, start + size)
            yield at + low - start, _between(delta, low, high).dense()


def _between(delta: Delta | Dense, low: int, high: int) -> Delta | Dense:
    """Rows of ΔW."""
    shape = (high - low, fan_in(delta.shape))
    if isinstance(delta, Delta):
        return Delta(delta.up[low:high], delta.down, delta.scale, shape)
    return Dense(delta.matrix[low:high], delta.scale, shape)


# --- what belongs to no ΔW ----------------------------------------------------------------------


class _Extras(NamedTuple):
    """Tensors beside the layers."""

    made: dict[str, Made]
    kept: dict[str, str]  # key -> what it is
    dropped: dict[str, str]  # key -> why the output has none such


@dataclass(frozen=True, eq=False, slots=True)
class _Extra:
    """A tensor of one adapter that belongs to none of its ΔW."""

    side: Adapter
    key: str
    name: str  # of its layer
    reason: str
    weight: float

    def read(self) -> Tensor:
        return self.side.store.read(self.key)


# Differences of vectors, which are added like those of matrices.
_DIFFERENCES = (".diff", ".diff_b", ".w_norm", ".b_norm")


def _extras(sides: Sequence[Adapter], weights: Sequence[float], names: _Names, dtype: str) -> _Extras:
    """Sums of differences of vectors; other tensors only where there is nothing to add."""
    groups: dict[tuple[object, str], list[_Extra]] = defaultdict(list)
    for side, weight in zip(sides, weights, strict=True):
        for key, reason in side.others.items() if weight else ():
            name = layer_name(key)
            groups[names.owner(name), key[len(name) :]].append(_Extra(side, key, name, reason, weight))
        for layer in side if weight else ():
            if "bias" in layer.keys:
                _check_bias(side, layer, names)
                bias = _Extra(side, layer.keys["bias"], layer.name, "a difference of a bias", weight * layer.scale)
                groups[names.owner(layer.name), ".diff_b"].append(bias)
    extras = _Extras({}, {}, {})
    for (_, ending), members in groups.items():
        _add_extra(extras, ending, members, sides[0], names, dtype)
    return extras


def _check_bias(side: Adapter, layer: Layer, names: _Names) -> None:
    if names.naming not in ("kohya", "comfy"):
        raise UsageError(
            f"{side.path}: {layer.name} has a bias beside its factors, and sums of those are only written in the names "
            "of kohya or ComfyUI. Add --naming kohya with a base."
        )


def _add_extra(
    extras: _Extras, ending: str, members: Sequence[_Extra], first: Adapter, names: _Names, dtype: str
) -> None:
    lead = members[0]
    name = lead.name if lead.side is first and not names.asked else _renamed(lead, names)
    if ending in _DIFFERENCES and name is not None:
        shapes = {each.side.store.tensors[each.key].shape for each in members}
        if len(shapes) > 1:
            raise ShapeError(
                f"{members[1].side.path}: {members[1].key} has another shape than {lead.key} of {lead.side.path}. "
                "Merge adapters of one model."
            )
        if len(members) == 1 and lead.weight == 1:
            extras.made[name + ending] = (lead.side.store.tensors[lead.key], lead.read)
        else:
            extras.made[name + ending] = (tensor_info(dtype, shapes.pop()), partial(_sum, members, dtype))
        extras.kept[name + ending] = lead.reason
    elif name is not None and _nothing_to_add(members):
        extras.made[name + ending] = (lead.side.store.tensors[lead.key], lead.read)
        extras.kept[name + ending] = lead.reason
    else:
        why = "has no known name in the output's naming" if name is None else "which cannot be weighted or added"
        extras.dropped.update({f"{each.key} ({each.side.path.name})": f"{each.reason}, {why}" for each in members})


def _renamed(extra: _Extra, names: _Names) -> str | None:
    """The name of its layer in the output's naming, None if nothing tells it."""
    if names.known and (views := names.known.find(extra.name)):
        for address, each in names.by_key.get(views[0].key, ()):
            if each == views:
                return names.named(*address)
    return extra.name if names.alike(extra.side) else None


def _nothing_to_add(members: Sequence[_Extra]) -> bool:
    """Whether it is one adapter's alone at full strength, or the same in all that have it."""
    if len(members) == 1:
        return members[0].weight == 1
    infos = {(info.dtype, info.shape) for each in members for info in [each.side.store.tensors[each.key]]}
    return len(infos) == 1 and len({bytes(b"".join(each.side.store.chunks(each.key))) for each in members}) == 1


def _sum(members: Sequence[_Extra], dtype: str) -> Tensor:
    total = members[0].read().double() * members[0].weight
    for each in members[1:]:
        total = total + each.read().double() * each.weight
    return cast(total, dtype)


# --- PEFT's settings ----------------------------------------------------------------------------


def _settings(sides: Sequence[Adapter], layers: Sequence[SumLayer], folder: bool, asked: str | None) -> peft.Settings:
    """Settings that name every module of the sum; {} where the first adapter has none, unless a folder needs them."""
    first = sides[0]
    if folder:
        if len(parts := {address(layer.name)[0] for layer in layers}) > 1:
            raise UsageError(
                f"the sum changes {len(parts)} models ({', '.join(sorted(parts))}), and a PEFT folder is for one. "
                "Name an adapter in one file first, or use --naming diffusers with a base."
            )
        return _settings_of(layers, "base_model.model.", _agreed([side.settings.get("", {}) for side in sides]))
    if asked not in (None, "diffusers") or peft.METADATA_KEY not in first.store.metadata:
        return {}
    components: dict[str, list[SumLayer]] = defaultdict(list)
    for layer in layers:
        components[layer.name.partition(".")[0]].append(layer)
    return {
        component: _settings_of(each, f"{component}.", first.settings.get(component, {}))[""]
        for component, each in components.items()
    }


def _settings_of(layers: Sequence[SumLayer], prefix: str, known: Mapping[str, object]) -> peft.Settings:
    scales = {layer.name.removeprefix(prefix): (layer.rank, 1.0) for layer in layers}
    return peft.settings_for(scales, {**known, "use_dora": False, "lora_bias": False})


def _agreed(settings: Sequence[Mapping[str, object]]) -> dict[str, object]:
    """What all that have settings say alike."""
    told = [each for each in settings if each]
    return {key: value for key, value in (told[0] if told else {}).items() if all(o.get(key) == value for o in told)}
