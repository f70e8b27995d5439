"""How far one adapter is from another, in what they add to the base: per layer, per block, and over the whole.

Everything is taken of ΔW, never of factors, so that it does not matter how an adapter was factored, named or scaled.
Where both sides are factors, ΔW is not formed: with the factors of A and B side by side, U = [up_a, up_b] and
V = [down_a; down_b], all norms and products are sums over the blocks of UᵀU ∘ VVᵀ. Sums lose digits where A and B are
nearly the same; there R factors of U and Vᵀ replace the Gram matrices, and A − B is taken before it is squared.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from lorashrink._version import __version__
from lorashrink.adapters import Adapter, adapter_family, layer_name, open_adapter, peft
from lorashrink.bases import Base, open_base
from lorashrink.engine.devices import core_device, pick_device, worker_pool
from lorashrink.errors import Progress, UsageError
from lorashrink.insight.differences import FIRST, SECOND, InnerProducts, inner_products
from lorashrink.linking.inputs import find_adapters
from lorashrink.linking.matching import bind
from lorashrink.linking.pairing import Unit, in_base, matched, units
from lorashrink.names import address, block, naming
from lorashrink.results.comparison import (
    BlockDifference,
    Comparison,
    LayerDifference,
    MetadataDifference,
    OtherDifference,
    Side,
)


def compare(
    a: str | Path,
    b: str | Path,
    *,
    base: str | Path | None = None,
    device: str = "auto",
    jobs: int | None = None,
    progress: Progress | None = None,
) -> Comparison:
    """Compare what two adapters add to the base. The base, or its norm table, tells which layers belong together.

    Without one, equal names do, and names of two programs where one of them writes dots. Layers that multiply the base
    weight need the base itself. Raises InputError if a file cannot be used, FamilyMismatch or ShapeError if the
    adapters were made for different models, and UsageError if only a base could tell which layers are the same.
    """
    device = pick_device(device)
    with ExitStack() as stack:
        sides = [stack.enter_context(open_adapter(_only_one(each))) for each in (a, b)]
        opened = stack.enter_context(open_base(base)) if base is not None else None
        names, views = matched(sides, opened)
        bound = [bind(side, in_base(side, each), opened) for side, each in zip(sides, views, strict=True)]
        found = units(bound, views)
        pool = stack.enter_context(worker_pool(jobs))
        rows, sums = [], []
        for unit, each in zip(found, pool.map(partial(inner_products, device=core_device(device)), found), strict=True):
            rows.append(_row(unit, each))
            sums.append(each)
            if progress:
                progress("comparing", len(rows), len(found))
        if sums and not any(sums):
            raise UsageError(
                f"{a} and {b}: {rows[0].algo_a or rows[0].algo_b} exists only together with the base weight. Give the "
                "checkpoint with --base; a norm table is not enough."
            )
        others, equal = _others(bound, names)
        return Comparison(
            version=__version__,
            base=opened.info if opened else None,
            a=_side(bound[FIRST]),
            b=_side(bound[SECOND]),
            total=_together("total", sums),
            blocks=_blocks(rows, sums),
            layers=tuple(row for row in rows if row.names_a and row.names_b),
            only_a=tuple(row for row in rows if not row.names_b),
            only_b=tuple(row for row in rows if not row.names_a),
            others=tuple(others),
            others_equal=equal,
            metadata=_metadata(*bound),
        )


def _only_one(path: str | Path) -> Path:
    found = find_adapters([path])
    if len(found) != 1:
        raise UsageError(f"{path}: stands for {len(found)} adapters, and two are compared, one by one. Name one file.")
    return found[0]


def _numbers(sums: InnerProducts) -> dict[str, float | None]:
    a, b, difference = (math.sqrt(max(0.0, each)) for each in (sums.a, sums.b, sums.difference))
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


# --- tables -------------------------------------------------------------------------------------


def _row(unit: Unit, sums: InnerProducts | None) -> LayerDifference:
    a, b = unit.of(FIRST), unit.of(SECOND)
    fewest = min((each for each in (a, b) if each), key=len)
    return LayerDifference(
        name=fewest[0].name,
        names_a=tuple(layer.name for layer in a),
        names_b=tuple(layer.name for layer in b),
        block=block((a or b)[0].name),
        shape=(unit.rows, *fewest[0].shape[1:]),
        algo_a=_joined(layer.algo for layer in a),
        algo_b=_joined(layer.algo for layer in b),
        rank_a=max((layer.rank for layer in a), default=None),
        rank_b=max((layer.rank for layer in b), default=None),
        dtype_a=_joined(layer.dtype for layer in a),
        dtype_b=_joined(layer.dtype for layer in b),
        flags=_flags(sums, bool(a), bool(b)),
        **(_numbers(sums) if sums and sums.finite else {}),
    )


def _joined(words: Iterable[str]) -> str | None:
    return "+".join(sorted(set(words))) or None


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
    known = [each for each in sums if each and each.finite]
    if sums and not known:
        return BlockDifference(name, len(sums), len(sums))
    whole = InnerProducts(*(math.fsum(each[place] for each in known) for place in range(4)))
    return BlockDifference(name, len(sums), len(sums) - len(known), **_numbers(whole))


def _blocks(rows: Sequence[LayerDifference], sums: Sequence[InnerProducts | None]) -> tuple[BlockDifference, ...]:
    members: dict[str, list[InnerProducts | None]] = {}
    for row, each in zip(rows, sums, strict=True):
        members.setdefault(row.block, []).append(each)
    return tuple(_together(name, each) for name, each in sorted(members.items()))


def _side(adapter: Adapter) -> Side:
    ranks = [layer.rank for layer in adapter]
    return Side(
        path=str(adapter.path),
        bytes=sum(path.stat().st_size for path in adapter.store.files),
        family=adapter_family(adapter),
        algo=_joined(layer.algo for layer in adapter) or "none",
        naming=naming([layer.name for layer in adapter]),
        dtype=_joined(layer.dtype for layer in adapter) or "none",
        layers=len(adapter),
        ranks=(min(ranks), max(ranks)) if ranks else (),
    )


# --- what is not ΔW -----------------------------------------------------------------------------


@dataclass(frozen=True, eq=False, slots=True)
class _Other:
    key: str
    reason: str
    scale: float = 1.0


# Parts of a layer that are no part of its ΔW.
_BESIDE = {"magnitude": "DoRA's magnitude", "bias": "a bias beside the factors"}


def _others(sides: Sequence[Adapter], names: Base | None) -> tuple[list[OtherDifference], int]:
    """(tensors outside of all ΔW that differ, how many do not)."""
    one, other = (_beside(side, names) for side in sides)
    found, equal = [], 0
    for place in {**one, **other}:
        a, b = one.get(place), other.get(place)
        if a and b:
            differs, relative = _apart(*(_numbers_of(*each) for each in zip(sides, (a, b), strict=True)))
            if not differs:
                equal += 1
                continue
        else:
            relative = None
        reason = (a or b).reason  # type: ignore[union-attr]  # one of them is there
        found.append(OtherDifference(a.key if a else None, b.key if b else None, reason, relative))
    return found, equal


def _beside(side: Adapter, names: Base | None) -> dict[tuple[object, str], _Other]:
    """(what it belongs to, what it is) -> tensor."""
    found: dict[tuple[object, str], _Other] = {}
    for layer in side:
        for role, reason in _BESIDE.items():
            if role in layer.keys:
                # PEFT multiplies a bias as it multiplies the factors
                scale = layer.scale if role == "bias" else 1.0
                found[_owner(layer.name, names), role] = _Other(layer.keys[role], reason, scale)
    for key, reason in side.others.items():
        name = layer_name(key)
        ending = key[len(name) :]
        found[_owner(name, names), "bias" if ending == ".diff_b" else ending] = _Other(key, reason)
    return found


def _owner(name: str, names: Base | None) -> object:
    return (names.find(name) if names else ()) or address(name)


def _numbers_of(side: Adapter, other: _Other) -> Tensor:
    tensor = side.store.read(other.key)
    return tensor.to(torch.complex128 if tensor.is_complex() else torch.float64) * other.scale


def _apart(a: Tensor, b: Tensor) -> tuple[bool, float | None]:
    """(whether they differ, ‖a − b‖ / ‖a‖)."""
    if a.numel() != b.numel():
        return True, None
    size, difference = float(a.norm()), float((a.flatten() - b.flatten()).norm())
    return difference != 0, difference / size if size and math.isfinite(difference / size) else None


def _metadata(a: Adapter, b: Adapter) -> tuple[MetadataDifference, ...]:
    one, other = _entries(a), _entries(b)
    return tuple(
        MetadataDifference(key, one.get(key), other.get(key))
        for key in sorted(one.keys() | other.keys())
        if one.get(key) != other.get(key)
    )


def _entries(adapter: Adapter) -> dict[str, str]:
    settings: Mapping[str, object] = adapter.settings.get("", {}) if adapter.as_folder else {}
    texts = {f"{peft.CONFIG_FILE}: {key}": json.dumps(value, sort_keys=True) for key, value in settings.items()}
    return {**adapter.store.metadata, **texts}
