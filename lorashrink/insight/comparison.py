"""How far one adapter is from another, in what they add to the base: per layer, per block, and in total.

All numbers are those of ΔW, not of factors, so that it does not matter how an adapter was factored, named or scaled.
Where both sides are factors, ΔW is not formed: with the factors of A and B side by side, U = [up_a, up_b] and
V = [down_a; down_b], all norms and products are sums over the blocks of UᵀU ∘ VVᵀ. Sums lose digits where A and B are
nearly the same; there R factors of U and Vᵀ replace the Gram matrices, and A − B is taken before it is squared.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from lorashrink._version import __version__
from lorashrink.adapters import Adapter, Source, in_memory, layer_name, open_adapter, peft
from lorashrink.bases import Base, use_base
from lorashrink.engine.devices import core_device, pick_device, worker_pool
from lorashrink.errors import Progress, UsageError
from lorashrink.insight.differences import FIRST, SECOND, InnerProducts, inner_products
from lorashrink.insight.summaries import by_block, joined, summary
from lorashrink.linking.inputs import only_adapter
from lorashrink.linking.pairing import Unit, bind_all, matched, units
from lorashrink.names import address, block
from lorashrink.results.comparison import (
    BlockDifference,
    Comparison,
    LayerDifference,
    MetadataDifference,
    OtherDifference,
    Side,
)

_ONE_BY_ONE = "two are compared, one by one"


def compare(
    a: Source,
    b: Source,
    *,
    base: str | Path | Mapping[str, Tensor] | Base | None = None,
    device: str = "auto",
    jobs: int | None = None,
    progress: Progress | None = None,
) -> Comparison:
    """Compare what two adapters add to the base. The base, or its norm table, tells which layers belong together.

    a, b: paths, mappings of names to tensors, PeftModels, or pipelines. base: also the tensors of a model by name.
    Without one, equal names do, and names of two programs where one of them writes dots. Layers that multiply the base
    weight need the base itself. Raises InputError if a file cannot be used, FamilyMismatch or ShapeError if the
    adapters were made for different models, and UsageError if only a base could tell which layers are the same.
    """
    with ExitStack() as stack:
        sides = [
            stack.enter_context(open_adapter(in_memory(side) or only_adapter(side, needed=_ONE_BY_ONE)))
            for side in (a, b)
        ]
        device = pick_device(device, [path for side in sides for path in side.store.files])
        opened = stack.enter_context(use_base(base)) if base is not None else None
        dictionary, views = matched(sides, opened)
        bound = bind_all(sides, views, opened)
        pairs = units(bound, views)
        pool = stack.enter_context(worker_pool(jobs))
        rows, sums = [], []
        measured = pool.map(partial(inner_products, device=core_device(device)), pairs)
        for unit, products in zip(pairs, measured, strict=True):
            rows.append(_row(unit, products))
            sums.append(products)
            if progress:
                progress("comparing", len(rows), len(pairs))
        if sums and not any(sums):
            raise UsageError(
                f"{a} and {b}: {rows[0].algo_a or rows[0].algo_b} exists only together with the base weight. Give the "
                "checkpoint with --base; a norm table is not enough."
            )
        others, equal = _others(bound, dictionary)
        return Comparison(
            version=__version__,
            base=opened.info if opened else None,
            a=Side(**summary(bound[FIRST])),
            b=Side(**summary(bound[SECOND])),
            total=_together("total", sums),
            blocks=tuple(_together(name, [sums[i] for i in indices]) for name, indices in by_block(rows)),
            layers=tuple(row for row in rows if row.names_a and row.names_b),
            only_a=tuple(row for row in rows if not row.names_b),
            only_b=tuple(row for row in rows if not row.names_a),
            others=tuple(others),
            others_equal=equal,
            metadata=_metadata(*bound),
        )


# --- tables -------------------------------------------------------------------------------------


def _row(unit: Unit, sums: InnerProducts | None) -> LayerDifference:
    a, b = unit.of(FIRST), unit.of(SECOND)
    shortest = min((layers for layers in (a, b) if layers), key=len)
    return LayerDifference(
        name=shortest[0].name,
        names_a=tuple(layer.name for layer in a),
        names_b=tuple(layer.name for layer in b),
        block=block((a or b)[0].name),
        shape=(unit.rows, *shortest[0].shape[1:]),
        algo_a=joined(layer.algo for layer in a) or None,
        algo_b=joined(layer.algo for layer in b) or None,
        rank_a=max((layer.rank for layer in a), default=None),
        rank_b=max((layer.rank for layer in b), default=None),
        dtype_a=joined(layer.dtype for layer in a) or None,
        dtype_b=joined(layer.dtype for layer in b) or None,
        flags=_flags(sums, bool(a), bool(b)),
        **(_numbers(sums) if sums and sums.finite else {}),
    )


def _flags(sums: InnerProducts | None, in_a: bool, in_b: bool) -> tuple[str, ...]:
    if sums is None:
        return ("needs_base",)
    tests = {
        "nan_a": not math.isfinite(sums.a),
        "nan_b": not math.isfinite(sums.b),
        "zero_a": in_a and sums.a == 0,
        "zero_b": in_b and sums.b == 0,
    }
    return tuple(flag for flag, present in tests.items() if present)


def _together(name: str, sums: Sequence[InnerProducts | None]) -> BlockDifference:
    finite = [products for products in sums if products and products.finite]
    if sums and not finite:
        return BlockDifference(name, len(sums), len(sums))
    total = InnerProducts(*(math.fsum(products[i] for products in finite) for i in range(4)))
    return BlockDifference(name, len(sums), len(sums) - len(finite), **_numbers(total))


def _numbers(sums: InnerProducts) -> dict[str, float | None]:
    a, b, difference = (math.sqrt(max(0.0, square)) for square in (sums.a, sums.b, sums.difference))
    relative = difference / a if a else None
    cosine = max(-1.0, min(1.0, sums.product / a / b)) if a and b else None
    return {
        "fro_a": a,
        "fro_b": b,
        "difference": difference,
        "cosine": 1.0 if cosine is not None and difference == 0 else cosine,
        "relative_difference": relative,
        "energy_kept": None if relative is None else 1 - relative**2,
    }


# --- what is not ΔW -----------------------------------------------------------------------------


@dataclass(frozen=True, eq=False, slots=True)
class _Other:
    """A tensor of one side that belongs to none of its ΔW."""

    side: Adapter
    key: str
    reason: str
    scale: float = 1.0

    def read(self) -> Tensor:
        """The tensor in double precision, times its scale."""
        tensor = self.side.store.read(self.key)
        return tensor.to(torch.complex128 if tensor.is_complex() else torch.float64) * self.scale


# Parts of a layer that are no part of its ΔW.
_BESIDE = {"magnitude": "DoRA's magnitude", "bias": "a bias beside the factors"}


def _others(sides: Sequence[Adapter], dictionary: Base | None) -> tuple[list[OtherDifference], int]:
    """(tensors outside of all ΔW that differ, how many do not)."""
    others_a, others_b = (_beside(side, dictionary) for side in sides)
    differences, equal = [], 0
    for owner in {**others_a, **others_b}:
        a, b = others_a.get(owner), others_b.get(owner)
        relative = None
        if a and b:
            differs, relative = _difference(a.read(), b.read())
            if not differs:
                equal += 1
                continue
        reason = (a or b).reason  # type: ignore[union-attr]  # one of them is there
        differences.append(OtherDifference(a.key if a else None, b.key if b else None, reason, relative))
    return differences, equal


def _beside(side: Adapter, dictionary: Base | None) -> dict[tuple[object, str], _Other]:
    """(what it belongs to, what it is) -> tensor."""

    def owner(name: str) -> object:
        return (dictionary.find(name) if dictionary else ()) or address(name)

    others: dict[tuple[object, str], _Other] = {}
    for layer in side:
        for role, reason in _BESIDE.items():
            if role in layer.keys:
                # PEFT multiplies a bias as it multiplies the factors
                scale = layer.scale if role == "bias" else 1.0
                others[owner(layer.name), role] = _Other(side, layer.keys[role], reason, scale)
    for key, reason in side.others.items():
        name = layer_name(key)
        ending = key[len(name) :]
        others[owner(name), "bias" if ending == ".diff_b" else ending] = _Other(side, key, reason)
    return others


def _difference(a: Tensor, b: Tensor) -> tuple[bool, float | None]:
    """(whether they differ, ‖a − b‖ / ‖a‖)."""
    if a.numel() != b.numel():
        return True, None
    size, difference = float(a.norm()), float((a.flatten() - b.flatten()).norm())
    return difference != 0, difference / size if size and math.isfinite(difference / size) else None


def _metadata(a: Adapter, b: Adapter) -> tuple[MetadataDifference, ...]:
    entries_a, entries_b = _entries(a), _entries(b)
    return tuple(
        MetadataDifference(key, entries_a.get(key), entries_b.get(key))
        for key in sorted(entries_a.keys() | entries_b.keys())
        if entries_a.get(key) != entries_b.get(key)
    )


def _entries(adapter: Adapter) -> dict[str, str]:
    """Metadata, and the settings of a PEFT folder."""
    settings: Mapping[str, object] = adapter.settings.get("", {}) if adapter.as_folder else {}
    texts = {f"{peft.CONFIG_FILE}: {key}": json.dumps(value, sort_keys=True) for key, value in settings.items()}
    return {**adapter.store.metadata, **texts}
