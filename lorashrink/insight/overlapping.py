"""How several adapters get along on one base: what they share, what their weighted sum does, and at which weights.

Adapters are added to a base one on top of the other, so what counts is the sum of all w_i·ΔW_i. Everything is taken of
ΔW, never of factors, and layers belong together where they change the same weight, as in `compare`.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Executor
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from itertools import combinations
from pathlib import Path

import torch
from torch import Tensor

from lorashrink._version import __version__
from lorashrink.adapters import Adapter, adapter_family, open_adapter
from lorashrink.bases import Base, Views, open_base, views_id, views_shape
from lorashrink.bases.norms import BaseNorms, Norms
from lorashrink.engine.devices import core_device, pick_device, worker_pool
from lorashrink.engine.interaction import Interaction, factors, interaction
from lorashrink.errors import LorashrinkError, NonFinite, Progress, UsageError
from lorashrink.insight.health import SPIKE
from lorashrink.insight.stack_advice import advise, kind_of
from lorashrink.linking.inputs import find_adapters, split_weight
from lorashrink.linking.matching import bind, match
from lorashrink.linking.pairing import Unit, in_base, matched, stacked_up, units, wide
from lorashrink.names import block, naming
from lorashrink.results.overlap import (
    BlockOverlap,
    LayerOverlap,
    LayerSum,
    Overlap,
    Pair,
    Stack,
    StackMember,
    Table,
)
from lorashrink.results.shrinking import Failure

# How much stronger than any adapter alone a sum is that is worth a word.
AMPLIFIED = 1.05


def overlap(
    adapters: Sequence[str | Path],
    *,
    base: str | Path | None = None,
    limit: float | None = None,
    device: str = "auto",
    jobs: int | None = None,
    progress: Progress | None = None,
) -> Overlap:
    """How adapters get along, each a path with or without a weight, as in `style.safetensors:0.7`.

    cosine: <A, B> / (‖A‖·‖B‖) of ΔW, whatever the weights. subspace: how much the singular subspaces of the dimensions
    with 90 % of the energy overlap, from 0 to 1 (see `interaction`); over several layers their mean, weighted by
    ‖A‖·‖B‖ as in the cosine. limit: the σ_1 that no layer of the sum is to exceed, with a base as part of the base
    weight's σ_1; default is the highest that one adapter reaches alone.

    Adapters that cannot be used (unreadable, not for this base, NaN in a tensor) are in `Overlap.failed`, and the
    others go on. Raises that error if fewer than two are left, UsageError if fewer than two or one of them twice are
    given, or only a base could tell which layers are the same, and FamilyMismatch or ShapeError if they were made for
    different models.
    """
    device = pick_device(device)
    if limit is not None and not 0 < limit < math.inf:
        raise UsageError(f"limit: {limit:g} is not above 0.")
    weighted = _weighted(adapters)
    failed: dict[Path, LorashrinkError] = {}
    with ExitStack() as stack:
        opened = stack.enter_context(open_base(base)) if base is not None else None
        members = _opened(stack, weighted, opened, failed)
        pool = stack.enter_context(worker_pool(jobs))
        while True:
            if len(members) < 2:
                raise next(iter(failed.values()))
            _, rows = matched(members, opened)
            views = [in_base(member, each) for member, each in zip(members, rows, strict=True)]
            bound = [bind(member, each, opened) for member, each in zip(members, views, strict=True)]
            found = units(bound, rows)
            weights = [weighted[member.path] for member in members]
            work = partial(_numbers, weights=weights, device=core_device(device))
            numbers: list[Interaction | None] = []
            for each in pool.map(work, found):
                numbers.append(each)
                if progress:
                    progress("overlap", len(numbers), len(found))
            broken = _broken(bound, found, numbers)
            if not broken:
                break
            failed |= broken
            members = [member for member in members if member.path not in broken]
        _check_any(bound, numbers)
        norms = _norms(opened, found, views, bound, pool, progress)
        failures = tuple(Failure(str(path), str(error)) for path, error in failed.items())
        return _report(opened, bound, weights, found, numbers, norms, limit, failures)


# --- inputs -------------------------------------------------------------------------------------


def _weighted(given: Sequence[str | Path]) -> dict[Path, float]:
    """Path of each adapter -> its weight."""
    found: dict[Path, float] = {}
    places: set[str] = set()
    for entry in given:
        name, weight = split_weight(entry)
        for path in find_adapters([name]):
            place = os.path.realpath(path)
            if place in places:
                raise UsageError(f"{path}: is given twice. Give it once, with the sum of its weights.")
            places.add(place)
            found[path] = weight
    if len(found) < 2:
        raise UsageError(f"overlap: takes two adapters or more, and was given {len(found)}.")
    return found


def _opened(
    stack: ExitStack, paths: Iterable[Path], base: Base | None, failed: dict[Path, LorashrinkError]
) -> list[Adapter]:
    """Those that can be opened and fit the base; the others go to `failed`."""
    members = []
    for path in paths:
        try:
            adapter = stack.enter_context(open_adapter(path))
            if base:
                match(adapter, base)
        except LorashrinkError as error:
            failed[path] = error
        else:
            members.append(adapter)
    return members


def _numbers(unit: Unit, weights: Sequence[float], device: torch.device) -> Interaction | None:
    """None if a layer needs a base weight that is not there."""
    if not all(layer.bound for _, layer in unit.members):
        return None
    deltas = [factors(layer.delta) for _, layer in unit.members]
    ranks = dict.fromkeys(_adapters_of(unit), 0)
    for (number, _), delta in zip(unit.members, deltas, strict=True):
        ranks[number] += delta.rank
    ups, downs = stacked_up(deltas, unit.pieces), torch.cat([wide(delta.down) for delta in deltas])
    scales = [delta.scale for delta in deltas for _ in range(delta.rank)]
    return interaction(ups, downs, scales, list(ranks.values()), [weights[number] for number in ranks], device)


def _adapters_of(unit: Unit) -> list[int]:
    return sorted({number for number, _ in unit.members})


def _broken(
    members: Sequence[Adapter], found: Sequence[Unit], numbers: Sequence[Interaction | None]
) -> dict[Path, LorashrinkError]:
    """The adapters with layers that hold NaN or infinity."""
    errors: dict[Path, LorashrinkError] = {}
    for unit, each in zip(found, numbers, strict=True):
        for place in each.broken if each else ():
            number = _adapters_of(unit)[place]
            path = members[number].path
            text = f"{path}: layer {unit.of(number)[0].name} contains NaN or infinity. Use another copy of the file."
            errors.setdefault(path, NonFinite(text))
    return errors


def _check_any(members: Sequence[Adapter], numbers: Sequence[Interaction | None]) -> None:
    if numbers and not any(numbers):
        raise UsageError(
            f"{members[0].path} and others: their layers add something only together with the base weight. Give the "
            "checkpoint with --base; a norm table is not enough."
        )


def _norms(
    base: Base | None,
    found: Sequence[Unit],
    views: Sequence[Sequence[Views]],
    members: Sequence[Adapter],
    pool: Executor,
    progress: Progress | None,
) -> list[Mapping[str, float]]:
    """‖W‖_F and σ_1 of the base weight behind each unit; {} where it is not one weight of the base."""
    if base is None:
        return [{}] * len(found)
    by_name = [
        {layer.name: each for layer, each in zip(member, lines, strict=True)}
        for member, lines in zip(members, views, strict=True)
    ]
    whole = [_views_of(unit, by_name) for unit in found]
    report = partial(progress, "norms of the base") if progress else None
    known: Norms = BaseNorms(base).look_up([each for each in whole if each], ("fro", "spn"), pool=pool, progress=report)
    return [known[views_id(each)] if each else {} for each in whole]


def _views_of(unit: Unit, by_name: Sequence[Mapping[str, Views]]) -> Views:
    """The rows of the base that all layers of a unit change together, as its widest layer sees them."""
    candidates = [by_name[number][layer.name] for number, layer in unit.members]
    return next((each for each in candidates if each and views_shape(each)[0] == unit.rows), ())


# --- tables -------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False, slots=True)
class _Sums:
    """Per layer, float64 [L, N, N], zero for adapters that do not change it."""

    products: Tensor
    left: Tensor
    right: Tensor
    chance: Tensor

    def __getitem__(self, places: Sequence[int]) -> _Sums:
        index = torch.tensor(places, dtype=torch.long)
        return _Sums(self.products[index], self.left[index], self.right[index], self.chance[index])

    @property
    def squares(self) -> Tensor:
        """[L, N] ‖ΔW_i‖_F²."""
        return self.products.diagonal(dim1=1, dim2=2).clamp(min=0)

    @property
    def fro(self) -> Tensor:
        """[N] over these layers."""
        return self.squares.sum(0).sqrt()

    def tables(self) -> dict[str, Table]:
        """Cosines and overlaps over these layers together; None where one of the two is zero."""
        fro = self.fro
        sizes = torch.outer(fro, fro)
        cosine = (self.products.sum(0) / sizes).clamp(-1, 1)
        left, right = self.mean(self.left), self.mean(self.right)
        found = {"cosine": cosine, "subspace": (left + right) / 2, "left": left, "right": right}
        return {name: _table(each, sizes > 0) for name, each in found.items()}

    def mean(self, overlaps: Tensor) -> Tensor:
        """[N, N] over these layers, weighted by ‖ΔW_i‖·‖ΔW_j‖; 0 where two adapters have no layer in common."""
        norms = self.squares.sqrt()
        weights = norms[:, :, None] * norms[:, None, :]
        whole = weights.sum(0)
        return torch.where(whole > 0, (weights * overlaps).sum(0) / whole, 0)


def _table(values: Tensor, known: Tensor) -> Table:
    return tuple(
        tuple(value if good else None for value, good in zip(line, mask, strict=True))
        for line, mask in zip(values.tolist(), known.tolist(), strict=True)
    )


def _sums(found: Sequence[Unit], numbers: Sequence[Interaction | None], count: int) -> _Sums:
    tables = [torch.zeros(len(found), count, count, dtype=torch.float64) for _ in range(4)]
    for place, (unit, each) in enumerate(zip(found, numbers, strict=True)):
        if each is None:
            continue
        here = torch.tensor(_adapters_of(unit))
        larger = torch.maximum(each.dimensions[:, None], each.dimensions)
        sides = unit.rows, math.prod(unit.members[0][1].shape[1:])
        chance = sum(larger / side for side in sides) / 2
        for table, part in zip(tables, (each.products, each.left, each.right, chance), strict=True):
            table[place, here[:, None], here] = part
    return _Sums(*tables)


def _report(
    base: Base | None,
    members: Sequence[Adapter],
    weights: Sequence[float],
    found: Sequence[Unit],
    numbers: Sequence[Interaction | None],
    norms: Sequence[Mapping[str, float]],
    limit: float | None,
    failed: tuple[Failure, ...],
) -> Overlap:
    sums = _sums(found, numbers, len(members))
    layers = tuple(
        _layer(unit, each, sums[[place]], weights, known)
        for place, (unit, each, known) in enumerate(zip(found, numbers, norms, strict=True))
    )
    described = tuple(map(_member, members, weights, sums.fro.tolist()))
    tables = sums.tables()
    pairs = _pairs(tables, sums)
    whole = _stack(layers, weights, limit, base is not None)
    return Overlap(
        version=__version__,
        base=base.info if base else None,
        adapters=described,
        **tables,
        sum=whole,
        pairs=pairs,
        advice=tuple(advise(described, pairs, whole, layers)),
        blocks=_blocks(layers, sums),
        layers=layers,
        failed=failed,
    )


def _member(adapter: Adapter, weight: float, fro: float) -> StackMember:
    ranks = [layer.rank for layer in adapter]
    return StackMember(
        path=str(adapter.path),
        weight=weight,
        bytes=sum(path.stat().st_size for path in adapter.store.files),
        family=adapter_family(adapter),
        algo=_joined(layer.algo for layer in adapter),
        naming=naming([layer.name for layer in adapter]),
        dtype=_joined(layer.dtype for layer in adapter),
        layers=len(adapter),
        ranks=(min(ranks), max(ranks)) if ranks else (),
        fro=fro,
    )


def _joined(words: Iterable[str]) -> str:
    return "+".join(sorted(set(words))) or "none"


def _layer(
    unit: Unit, numbers: Interaction | None, sums: _Sums, weights: Sequence[float], norms: Mapping[str, float]
) -> LayerOverlap:
    here = _adapters_of(unit)
    first = min((unit.of(number) for number in here), key=len)[0]
    spectral = [0.0] * len(weights)
    for place, number in enumerate(here if numbers else ()):
        spectral[number] = float(numbers.spectral[place])  # type: ignore[union-attr]
    fro = tuple(sums.fro.tolist())
    whole = _layer_sum(here, numbers, fro, spectral, weights, norms) if numbers else None
    return LayerOverlap(
        name=first.name,
        block=block(first.name),
        shape=(unit.rows, *first.shape[1:]),
        adapters=tuple(here),
        ranks=tuple(sum(layer.rank for layer in unit.of(number)) for number in here),
        fro=fro,
        spectral=tuple(spectral),
        **sums.tables(),
        base_fro=norms.get("fro"),
        base_spectral=norms.get("spn"),
        sum=whole,
        flags=_flags(whole, len(here)),
    )


def _layer_sum(
    here: Sequence[int],
    numbers: Interaction,
    fro: Sequence[float],
    spectral: Sequence[float],
    weights: Sequence[float],
    norms: Mapping[str, float],
) -> LayerSum:
    size, first, second = numbers.total
    shares = dict(zip(here, numbers.shares.tolist(), strict=True))
    return LayerSum(
        fro=size,
        spectral=first,
        second=second,
        fro_amplification=_quotient(size, max(abs(w) * each for w, each in zip(weights, fro, strict=True))),
        amplification=_quotient(first, max(abs(w) * each for w, each in zip(weights, spectral, strict=True))),
        fro_ratio=_quotient(size, norms.get("fro")),
        spectral_ratio=_quotient(first, norms.get("spn")),
        shares=tuple(shares.get(number, 0.0) for number in range(len(weights))),
    )


def _quotient(value: float, by: float | None) -> float | None:
    return value / by if by else None


def _flags(whole: LayerSum | None, adapters: int) -> tuple[str, ...]:
    if whole is None:
        return ("needs_base",)
    tests = {
        "alone": adapters == 1,
        "zero": whole.fro == 0,
        "amplified": (whole.amplification or 0.0) > AMPLIFIED,
        "spike": whole.second > 0 and whole.spectral > SPIKE * whole.second,
    }
    return tuple(flag for flag, present in tests.items() if present)


def _blocks(layers: Sequence[LayerOverlap], sums: _Sums) -> tuple[BlockOverlap, ...]:
    places: dict[str, list[int]] = {}
    for place, layer in enumerate(layers):
        places.setdefault(layer.block, []).append(place)
    return tuple(_block(name, [layers[i] for i in each], sums[each]) for name, each in sorted(places.items()))


def _block(name: str, layers: Sequence[LayerOverlap], sums: _Sums) -> BlockOverlap:
    known = [layer for layer in layers if layer.sum]
    return BlockOverlap(
        block=name,
        layers=len(layers),
        left_out=len(layers) - len(known),
        fro=tuple(sums.fro.tolist()),
        **sums.tables(),
        sum_fro=math.hypot(*(layer.sum.fro for layer in known if layer.sum)),
        fro_ratio=_fro_ratio(known),
    )


def _fro_ratio(layers: Sequence[LayerOverlap]) -> float | None:
    known = [(layer.sum.fro, layer.base_fro) for layer in layers if layer.sum and layer.base_fro]
    return math.hypot(*(fro for fro, _ in known)) / math.hypot(*(norm for _, norm in known)) if known else None


# --- what it means ------------------------------------------------------------------------------


def _pairs(tables: Mapping[str, Table], sums: _Sums) -> tuple[Pair, ...]:
    chance = sums.mean(sums.chance).clamp(max=1).tolist()
    count = len(chance)
    found = []
    for a, b in combinations(range(count), 2):
        cosine, subspace = tables["cosine"][a][b], tables["subspace"][a][b]
        by_chance = None if cosine is None else chance[a][b]
        found.append(Pair(a, b, cosine, subspace, by_chance, kind_of(cosine, subspace, by_chance)))
    return tuple(found)


def _stack(layers: Sequence[LayerOverlap], weights: Sequence[float], limit: float | None, has_base: bool) -> Stack:
    known = [(layer, layer.sum) for layer in layers if layer.sum]
    scales = [(layer, whole, 1 / layer.base_spectral) for layer, whole in known if layer.base_spectral]
    if not has_base:
        scales = [(layer, whole, 1.0) for layer, whole in known]
    strengths = [(whole.spectral * scale, layer.name) for layer, whole, scale in scales]
    singles = [
        (abs(weight) * sigma * scale, layer.name, number)
        for layer, _, scale in scales
        for number, (weight, sigma) in enumerate(zip(weights, layer.spectral, strict=True))
    ]
    strongest, strongest_layer = max(strengths, default=(None, None))
    alone, alone_layer, alone_adapter = max(singles, default=(None, None, None))
    limit = limit or alone
    factor = limit / strongest if limit and strongest else None
    return Stack(
        fro=math.hypot(*(whole.fro for _, whole in known)),
        fro_ratio=_fro_ratio(layers),
        measure="spectral_ratio" if has_base else "spectral",
        strongest=strongest,
        strongest_layer=strongest_layer,
        alone=alone,
        alone_layer=alone_layer,
        alone_adapter=alone_adapter,
        limit=limit,
        factor=factor,
        weights=tuple(weight * min(1.0, factor or 1.0) for weight in weights),
        amplified=sum("amplified" in layer.flags for layer in layers),
        spikes=sum("spike" in layer.flags for layer in layers),
    )
