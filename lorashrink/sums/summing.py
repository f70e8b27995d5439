"""Weighted sums of adapters as one adapter."""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

from lorashrink.adapters import Adapter, adapter_family, open_adapter, peft
from lorashrink.adapters.peft_keys import only_in_peft, way_out
from lorashrink.bases import Base
from lorashrink.bases.families import family_title
from lorashrink.errors import FamilyMismatch, ShapeError, UsageError
from lorashrink.files.disk import sha256_file, sha256_store
from lorashrink.files.in_memory import sha256_tensors
from lorashrink.files.store import DTYPES, FACTOR_DTYPES, ComputedStore
from lorashrink.linking.inputs import Sum
from lorashrink.linking.pairing import bind_all, matched
from lorashrink.linking.renaming import LazyTensor
from lorashrink.names import address
from lorashrink.results.shrinking import WeightedSource
from lorashrink.sums import metadata
from lorashrink.sums.extras import collect_extras
from lorashrink.sums.layers import SumLayer
from lorashrink.sums.naming import Names
from lorashrink.sums.slots import output_slots


@dataclass(frozen=True, eq=False)
class SumAdapter(Adapter):
    """A weighted sum as an adapter like any other."""

    sources: tuple[WeightedSource, ...] = ()
    identity: str = ""  # SHA-256 of all that decides its contents


def combined(
    terms: Sum, base: Base | None = None, *, naming: str | None = None, as_base_delta: bool = False
) -> SumAdapter:
    """The weighted sum of adapters of any family, rank and naming, in the names of the first or in those of `naming`.

    Nothing is computed before a layer's `delta` is read. as_base_delta: DoRA adds what it makes of the weights of
    the base. Raises UsageError (DoRA without that, names that only a base tells, tensors that cannot be added),
    FamilyMismatch or ShapeError (adapters of different models), and InputError.
    """
    weights = [weight for _, weight in terms.terms]
    with ExitStack() as stack:
        sides = [stack.enter_context(open_adapter(path)) for path, _ in terms.terms]
        if base is None:
            check_one_model(sides)
        dictionary, views = matched(sides, base)
        bound = bind_all(sides, views, base)
        folder = bound[0].as_folder if naming is None else naming == "peft"
        used = [side for side, weight in zip(bound, weights, strict=True) if weight]
        check_settings(used, folder)
        check_layers(used, as_base_delta)
        names = Names.of(bound[0], views[0], dictionary, naming)
        slots = output_slots(bound, views, weights, names)
        dtypes = [layer.dtype if layer.dtype in FACTOR_DTYPES else "F16" for side in bound for layer in side]
        dtype = max(dtypes, key=lambda name: DTYPES[name][0], default="F16")  # of those with 16 bits the first one's
        extras = collect_extras(bound, weights, names, dtype if DTYPES[dtype][0] > 1 else "F16")
        hashes = [sha256_file(side.store.files[0]) for side in bound]
        origins = [
            metadata.Summand(path.name, digest, weight, side.store.metadata)
            for (path, weight), digest, side in zip(terms.terms, hashes, bound, strict=True)
        ]
        store = _Store(terms.path, extras.tensors, metadata.summed(origins), bound)
        layers = tuple(slot.layer(names, dtype, store) for slot in slots)
        for layer in layers:
            if (vector := f"{layer.name}.diff") in extras.tensors:
                raise ShapeError(
                    f"{terms.path}: {vector} is a vector in one adapter, and the weight of that layer a matrix in "
                    "another. Merge adapters of one model."
                )
        settings = sum_settings(bound, layers, folder, naming)
        if folder:
            settings = {"": peft.with_saved(settings[""], extras.tensors)}
        if settings and not folder:
            store.metadata[peft.METADATA_KEY] = peft.to_metadata(settings)
        stack.pop_all()  # the store closes them
    configs = [sha256_file(side.path / peft.CONFIG_FILE) for side in bound if peft.is_folder(side.path)]
    contents = [hashes, configs, weights, base.fingerprint if base else "", naming, as_base_delta]
    return SumAdapter(
        path=terms.path,
        store=store,
        layers=layers,
        others=extras.kept,
        settings=settings,
        as_folder=folder,
        dropped=extras.dropped,
        sources=tuple(WeightedSource(str(path), weight) for path, weight in terms.terms),
        identity=hashlib.sha256(json.dumps(contents).encode()).hexdigest(),
    )


def variant_of(naming: str | None = None, *, as_base_delta: bool = False) -> str:
    """The options of a sum that change what is written, as text for metadata."""
    return f",naming={naming},as_base_delta={as_base_delta}"


def contents_sha256(adapter: Adapter) -> str:
    """SHA-256 of an adapter's contents: of its file, or of all that a sum is made of."""
    if isinstance(adapter, SumAdapter):
        return adapter.identity
    return sha256_store(adapter.store) if adapter.store.files else sha256_tensors(adapter.store, repr(adapter.settings))


def sources_of(adapter: Adapter) -> tuple[WeightedSource, ...]:
    """What the adapter is a sum of; () if it is none."""
    return adapter.sources if isinstance(adapter, SumAdapter) else ()


class _Store(ComputedStore):
    """The tensors beside the layers; the adapters stay open as long as it."""

    def __init__(
        self, path: Path, tensors: Mapping[str, LazyTensor], entries: Mapping[str, str], sides: Sequence[Adapter]
    ) -> None:
        self._sides = tuple(sides)
        stores = [side.store for side in sides]
        files = [file for store in stores for file in store.files]
        super().__init__(path, tensors, entries, files, [header for store in stores for header in store.headers])

    def close(self) -> None:
        """Close the files of all adapters."""
        for side in self._sides:
            side.close()


# --- what cannot be added -----------------------------------------------------------------------


def check_one_model(sides: Sequence[Adapter]) -> None:
    """Raises FamilyMismatch if the adapters were made for different families of models, as far as they tell."""
    families = [(side, family) for side in sides if (family := adapter_family(side))]
    for (a, family_a), (b, family_b) in combinations(families, 2):
        if family_a != family_b:
            raise FamilyMismatch(
                f"{a.path} is an adapter for {family_title(family_a)}, {b.path} is one for "
                f"{family_title(family_b)}. Merge adapters of one model."
            )


def check_settings(sides: Sequence[Adapter], folder: bool) -> None:
    """Raises UsageError if a setting gives an adapter a meaning that the sum cannot have."""
    kept = [[only_in_peft(config) for config in side.settings.values()] for side in sides]
    for side, entries in zip(sides, kept, strict=True):
        if lost := next((item for item in side.others.items() if "factors of experts" in item[1]), None):
            raise UsageError(f"{side.path}: {lost[0]} cannot be added: {lost[1]}.")
        if any(entries) and not (folder and all(others == entries for others in kept)):
            raise UsageError(
                f"{side.path}: {next(key for entry in entries for key in entry)} is set, which a sum has only in a "
                "PEFT folder, and only if all of its adapters have the same. Merge such adapters alone."
            )


def check_layers(sides: Sequence[Adapter], as_base_delta: bool) -> None:
    """Raises UsageError if what a layer adds cannot be had, or is no sum."""
    for side in sides:
        for layer in side:
            dora = "magnitude" in layer.keys
            if dora and not as_base_delta:
                raise UsageError(
                    f"{side.path}: {layer.name} is DoRA, whose strength is not linear, so that no sum of factors is "
                    "right. With the checkpoint as --base, --as-base-delta merges what it makes of its weights."
                )
            if layer.family.changed_base and not layer.bound:
                raise UsageError(f"{side.path}: layer {layer.name}: {way_out(layer.family.changed_base)}")
            if not layer.bound or (dora and layer.weight is None):
                why = "DoRA changes the base weight itself" if dora else layer.family.needs.value
                raise UsageError(
                    f"{side.path}: {layer.name} is {layer.algo}: {why}. Give the checkpoint with --base; a norm table "
                    "is not enough."
                )


# --- PEFT's settings ----------------------------------------------------------------------------


def sum_settings(
    sides: Sequence[Adapter], layers: Sequence[SumLayer], folder: bool, naming: str | None
) -> peft.Settings:
    """Settings that name every module of the sum; {} where the first adapter has none, unless a folder needs them."""
    first = sides[0]
    if folder:
        if len(parts := {address(layer.name)[0] for layer in layers}) > 1:
            raise UsageError(
                f"the sum changes {len(parts)} models ({', '.join(sorted(parts))}), and a PEFT folder is for one. "
                "Name an adapter in one file first, or use --naming diffusers with a base."
            )
        shared, *others = [entries for side in sides if (entries := side.settings.get("", {}))] or [{}]
        agreed = {key: value for key, value in shared.items() if all(entries.get(key) == value for entries in others)}
        return _settings_of(layers, "base_model.model.", agreed)
    if naming not in (None, "diffusers") or peft.METADATA_KEY not in first.store.metadata:
        return {}
    components: dict[str, list[SumLayer]] = defaultdict(list)
    for layer in layers:
        components[layer.name.partition(".")[0]].append(layer)
    return {
        component: _settings_of(members, f"{component}.", first.settings.get(component, {}))[""]
        for component, members in components.items()
    }


def _settings_of(layers: Sequence[SumLayer], prefix: str, settings: Mapping[str, object]) -> peft.Settings:
    scales = {layer.name.removeprefix(prefix): (layer.rank, 1.0) for layer in layers}
    return peft.settings_for(scales, {**settings, "use_dora": False, "lora_bias": False})
