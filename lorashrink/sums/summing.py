"""Weighted sums of adapters as one adapter."""

from __future__ import annotations

import hashlib
import json
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING

from lorashrink.adapters import Adapter, Layer, adapter_family, open_adapter, peft
from lorashrink.adapters.family import Infos, Shape
from lorashrink.bases import FAMILIES, Base, Views, views_shape
from lorashrink.engine.delta import Dense, delta_tensors, fan_in, low_rank_factors, scaled
from lorashrink.errors import FamilyMismatch, NonFinite, ShapeError, UsageError
from lorashrink.files.disk import sha256_file
from lorashrink.files.store import DTYPES, ComputedStore, tensor_info
from lorashrink.linking.inputs import Sum
from lorashrink.linking.matching import bind
from lorashrink.linking.pairing import in_base, matched
from lorashrink.linking.renaming import NAMINGS, Made
from lorashrink.linking.rows import FreeRows, RowRun, Rows, joined_runs, row_intervals
from lorashrink.names import address, kind
from lorashrink.results.shrinking import WeightedSource
from lorashrink.sums import metadata
from lorashrink.sums.extras import collect_extras
from lorashrink.sums.naming import KOHYA, PEFT, Names, Spelling
from lorashrink.sums.numbers import side_by_side, summed_matrix

if TYPE_CHECKING:
    from torch import Tensor

    from lorashrink.engine.delta import AnyDelta


@dataclass(frozen=True, eq=False, slots=True)
class Part:
    """A layer of one of the adapters, and where it goes."""

    layer: Layer
    weight: float
    runs: tuple[RowRun, ...]

    def covers(self, rows: int) -> bool:
        """Whether a sum of so many rows has those of this layer, all of them and in their order."""
        return self.runs == (RowRun(0, 0, rows),) and self.layer.shape[0] == rows

    def delta(self) -> AnyDelta:
        """What the layer adds at its weight. Raises NonFinite."""
        found = _with_magnitude(self.layer) if "magnitude" in self.layer.keys else self.layer.delta
        if not all(bool(each.float().isfinite().all()) for each in delta_tensors(found)):
            raise NonFinite(
                f"{self.layer.store.path}: layer {self.layer.name} contains NaN or infinity. The training diverged, "
                "or the file is damaged; use an earlier checkpoint."
            )
        return scaled(found, self.weight)


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
            return side_by_side([low_rank_factors(delta) for delta in deltas], runs, self.shape)
        return summed_matrix(deltas, runs, self.shape)

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
        names = Names.of(bound[0], views[0], known, naming)
        slots = _slots(bound, views, weights, names)
        dtype = _widest(bound)
        extras = collect_extras(bound, weights, names, dtype)
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


@dataclass(frozen=True, eq=False, slots=True)
class _Slot:
    """A layer of the output."""

    name: str
    views: Views
    rows: Sequence[Rows]  # those that no layer before it has
    lead: Layer | None  # whose name and shape it has
    parts: list[Part] = field(default_factory=list)


def _slots(
    sides: Sequence[Adapter], views: Sequence[Sequence[Views]], weights: Sequence[float], names: Names
) -> list[_Slot]:
    """The layers of the output, with what adds to each of their rows."""
    slots: list[_Slot] = []
    free = FreeRows()
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
    by_key: dict[str, list[tuple[_Slot, Rows]]] = defaultdict(list)
    for slot in slots:
        for own in slot.rows:
            by_key[own.key].append((slot, own))
    for number, layer, each in members:
        if weights[number]:
            _distribute(layer, weights[number], each, by_key)
    return [slot for slot in slots if slot.parts]


def _take(slots: list[_Slot], free: FreeRows, slot: _Slot) -> None:
    if slot.rows:
        free.take(slot.rows)
        slots.append(slot)


def _unnamed(side: Adapter, layer: Layer, names: Names) -> UsageError:
    hint = "Give the base with --base; a norm table is enough."
    if names.asked:
        hint = "Leave --naming out."
    elif names.naming not in NAMINGS:
        hint = f"Choose one with --naming and a base: {', '.join(NAMINGS)}."
    return UsageError(
        f"{side.path}: {layer.name} has no known name in {names.naming} naming, which the output is to have. {hint}"
    )


def _distribute(layer: Layer, weight: float, views: Views, slots: Mapping[str, Sequence[tuple[_Slot, Rows]]]) -> None:
    """Add the layer to all slots that have rows of it."""
    runs: dict[int, list[RowRun]] = defaultdict(list)
    found = {}
    for rows in row_intervals(views):
        for slot, own in slots[rows.key]:
            start, stop = max(rows.start, own.start), min(rows.stop, own.stop)
            if start < stop:
                runs[id(slot)].append(RowRun(own.at + start - own.start, rows.at + start - rows.start, stop - start))
                found[id(slot)] = slot
    for place, slot in found.items():
        slot.parts.append(Part(layer, weight, joined_runs(runs[place])))


# --- the layers of the output -------------------------------------------------------------------


def _layer(slot: _Slot, spelling: Spelling | None, dtype: str, store: _Store) -> SumLayer:
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
    family, endings = spelling or (PEFT if "." in name else KOHYA)
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
