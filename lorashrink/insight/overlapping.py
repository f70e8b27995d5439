"""How several adapters get along on one base: what they share, what their weighted sum does, and at which weights.

Adapters are added to a base one on top of the other, so what counts is the sum of all w_i·ΔW_i. All numbers are those
of ΔW, not of factors, and layers belong together where they change the same weight, as in `compare`.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Executor
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from lorashrink._version import __version__
from lorashrink.adapters import Adapter, open_adapter
from lorashrink.bases import Base, Views, use_base, views_id, views_shape
from lorashrink.bases.norms import BaseNorms
from lorashrink.engine.accelerators import computed
from lorashrink.engine.devices import core_device, pick_device, worker_pool
from lorashrink.engine.interaction import Interaction, interaction
from lorashrink.errors import LorashrinkError, NonFinite, Progress, UsageError, boundary
from lorashrink.insight.overlap_tables import OverlapSums, block_overlaps, layer_overlap, pairs_of, stack_of
from lorashrink.insight.stack_advice import advise
from lorashrink.insight.summaries import summary
from lorashrink.linking.inputs import find_adapters, split_weight
from lorashrink.linking.matching import match
from lorashrink.linking.pairing import Unit, bind_all, in_base, matched, stacked_up, units, wide
from lorashrink.results.overlap import Overlap, StackMember
from lorashrink.results.shrinking import Failure


def overlap(
    adapters: Sequence[str | Path],
    *,
    base: str | Path | Mapping[str, Tensor] | Base | None = None,
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
    others go on. Raises that error if fewer than two remain; UsageError for fewer than two adapters, for one of them
    twice, or if only a base could tell which layers are the same; and FamilyMismatch or ShapeError if they were made
    for different models.
    """
    if limit is not None and not 0 < limit < math.inf:
        raise UsageError(f"limit: {limit:g} is not above 0.")
    weights = weights_of(adapters)
    device = pick_device(device, [*weights] * len(weights))  # the work grows with the square of their number
    failed: dict[Path, LorashrinkError] = {}
    with ExitStack() as stack:
        opened = stack.enter_context(use_base(base)) if base is not None else None
        members = []
        for path in weights:
            with boundary(path, partial(failed.__setitem__, path)):
                adapter = stack.enter_context(open_adapter(path))
                if opened:
                    match(adapter, opened)
                members.append(adapter)
        pool = stack.enter_context(worker_pool(jobs))
        while True:
            if len(members) < 2:
                raise next(iter(failed.values()))
            try:
                measured = _Measured.of(members, weights, opened, core_device(device), pool, progress)
                broken = measured.broken()
            except Exception:
                broken = _unreadable(members)
                if not broken:
                    raise
            if not broken:
                break
            failed |= broken
            members = [member for member in members if member.path not in broken]
        if measured.units and not any(measured.interactions):
            raise UsageError(
                f"{members[0].path} and others: their layers add something only together with the base weight. Give "
                "the checkpoint with --base; a norm table is not enough."
            )
        failures = tuple(Failure(str(path), str(error)) for path, error in failed.items())
        return measured.report(measured.base_norms(pool, device, progress), limit, failures)


# --- inputs -------------------------------------------------------------------------------------


def weights_of(entries: Sequence[str | Path]) -> dict[Path, float]:
    """Path of each adapter -> its weight. Raises UsageError for fewer than two adapters, or one of them twice."""
    weights: dict[Path, float] = {}
    real_paths: set[str] = set()
    for entry in entries:
        name, weight = split_weight(entry)
        for path in find_adapters([name]):
            real_path = os.path.realpath(path)
            if real_path in real_paths:
                raise UsageError(f"{path}: is given twice. Give it once, with the sum of its weights.")
            real_paths.add(real_path)
            weights[path] = weight
    if len(weights) < 2:
        raise UsageError(f"overlap: takes two adapters or more, and was given {len(weights)}.")
    return weights


def _unreadable(members: Iterable[Adapter]) -> dict[Path, LorashrinkError]:
    """The adapters whose layers cannot all be read: none of them spoils the others' numbers."""
    failed: dict[Path, LorashrinkError] = {}
    for adapter in members:
        with boundary(adapter.path, partial(failed.__setitem__, adapter.path)):
            for layer in adapter:
                if layer.bound:
                    _ = layer.delta
    return failed


# --- numbers ------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Measured:
    """Adapters on one base, the layers that belong together, and the numbers of these."""

    base: Base | None
    members: Sequence[Adapter]
    weights: Sequence[float]
    views: Sequence[Sequence[Views]]  # base weights of each member's layers
    units: Sequence[Unit]
    interactions: Sequence[Interaction | None]  # of each unit; None if a layer needs a base weight that is not there

    @classmethod
    def of(
        cls,
        members: Sequence[Adapter],
        weights: Mapping[Path, float],
        base: Base | None,
        device: torch.device,
        pool: Executor,
        progress: Progress | None,
    ) -> _Measured:
        """Match the adapters' layers, and measure what they do to each weight."""
        _, rows = matched(members, base)
        bound = bind_all(members, rows, base)
        matching = units(bound, rows)
        in_order = [weights[member.path] for member in members]
        interactions: list[Interaction | None] = []
        for numbers in pool.map(partial(interaction_of, weights=in_order, device=device), matching):
            interactions.append(numbers)
            if progress:
                progress("overlap", len(interactions), len(matching))
        views = [in_base(member, member_rows) for member, member_rows in zip(members, rows, strict=True)]
        return cls(base, bound, in_order, views, matching, interactions)

    def broken(self) -> dict[Path, LorashrinkError]:
        """The adapters with layers that hold NaN or infinity."""
        errors: dict[Path, LorashrinkError] = {}
        for unit, numbers in zip(self.units, self.interactions, strict=True):
            for index in numbers.broken if numbers else ():
                number = unit.adapters[index]
                path = self.members[number].path
                text = (
                    f"{path}: layer {unit.of(number)[0].name} contains NaN or infinity. Use another copy of the file."
                )
                errors.setdefault(path, NonFinite(text))
        return errors

    def base_norms(self, pool: Executor, device: str, progress: Progress | None) -> list[Mapping[str, float]]:
        """‖W‖_F and σ_1 of the base weight behind each unit; {} where it is not one weight of the base."""
        if self.base is None:
            return [{}] * len(self.units)
        by_name = [
            {layer.name: layer_views for layer, layer_views in zip(member, member_views, strict=True)}
            for member, member_views in zip(self.members, self.views, strict=True)
        ]
        weights: list[Views] = []
        for unit in self.units:
            # all rows that its layers change together, as its widest layer sees them
            candidates = [by_name[number][layer.name] for number, layer in unit.members]
            weights.append(next((views for views in candidates if views and views_shape(views)[0] == unit.rows), ()))
        report = partial(progress, "norms of the base") if progress else None
        norms = BaseNorms(self.base).look_up(
            list(filter(None, weights)), ("fro", "spn"), pool=pool, device=device, progress=report
        )
        return [norms[views_id(views)] if views else {} for views in weights]

    def report(
        self, norms: Sequence[Mapping[str, float]], limit: float | None, failures: tuple[Failure, ...]
    ) -> Overlap:
        """All tables, and what they mean."""
        sums = OverlapSums.of(self.units, self.interactions, len(self.members))
        fro, by_layer = sums.squares.sqrt().tolist(), sums.tables_by_layer()
        layers = tuple(
            layer_overlap(unit, numbers, layer_fro, layer_tables, self.weights, base_norms)
            for unit, numbers, layer_fro, layer_tables, base_norms in zip(
                self.units, self.interactions, fro, by_layer, norms, strict=True
            )
        )
        members = tuple(
            StackMember(weight=weight, fro=fro, **summary(adapter))
            for adapter, weight, fro in zip(self.members, self.weights, sums.fro.tolist(), strict=True)
        )
        tables = sums.tables()
        pairs = pairs_of(tables, sums)
        stack = stack_of(layers, self.weights, limit, self.base is not None)
        return Overlap(
            version=__version__,
            base=self.base.info if self.base else None,
            adapters=members,
            **tables,
            sum=stack,
            pairs=pairs,
            advice=tuple(advise(members, pairs, stack, layers)),
            blocks=block_overlaps(layers, sums),
            layers=layers,
            failed=failures,
        )


def interaction_of(unit: Unit, weights: Sequence[float], device: torch.device) -> Interaction | None:
    """None if a layer needs a base weight that is not there."""
    if not unit.bound:
        return None
    deltas = [layer.delta.factored(torch.float64) for _, layer in unit.members]
    ranks = dict.fromkeys(unit.adapters, 0)
    for (number, _), delta in zip(unit.members, deltas, strict=True):
        ranks[number] += delta.rank
    ups, downs = stacked_up(deltas, unit.pieces), torch.cat([wide(delta.down) for delta in deltas])
    scales = [delta.scale for delta in deltas for _ in range(delta.rank)]
    arguments = ups, downs, scales, list(ranks.values()), [weights[number] for number in ranks]
    (result,) = computed(lambda _, gpu: [interaction(*arguments, gpu)], [unit], device)
    return result
