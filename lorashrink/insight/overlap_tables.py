"""The tables of `overlap`: per layer, per block, per pair of adapters, and of the whole sum."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

import torch
from torch import Tensor

from lorashrink.engine.delta import fan_in
from lorashrink.engine.interaction import Interaction
from lorashrink.insight.health import SPIKE
from lorashrink.insight.stack_advice import kind_of
from lorashrink.insight.summaries import by_block, norm_ratio
from lorashrink.linking.pairing import Unit
from lorashrink.names import block
from lorashrink.results.overlap import BlockOverlap, LayerOverlap, LayerSum, Pair, Stack, Table

# How much stronger than any adapter alone a sum is that is worth a word.
AMPLIFIED = 1.05


@dataclass(frozen=True, eq=False, slots=True)
class OverlapSums:
    """Per layer, float64 [L, N, N], zero for adapters that do not change it."""

    products: Tensor
    left: Tensor
    right: Tensor
    chance: Tensor  # overlap of random subspaces of the same dimensions

    @classmethod
    def of(cls, units: Sequence[Unit], interactions: Sequence[Interaction | None], count: int) -> OverlapSums:
        """Gather the numbers of all layers; `count` is the number of adapters."""
        sums = cls(*(torch.zeros(len(units), count, count, dtype=torch.float64) for _ in range(4)))
        for index, (unit, numbers) in enumerate(zip(units, interactions, strict=True)):
            if numbers is None:
                continue
            adapters = torch.tensor(unit.adapters)
            cells = index, adapters[:, None], adapters
            larger = torch.maximum(numbers.dimensions[:, None], numbers.dimensions)
            lengths = unit.rows, fan_in(unit.members[0][1].shape)
            sums.products[cells], sums.left[cells], sums.right[cells] = numbers.products, numbers.left, numbers.right
            sums.chance[cells] = sum(larger / length for length in lengths) / 2
        return sums

    def __getitem__(self, layers: Sequence[int]) -> OverlapSums:
        index = torch.tensor(layers, dtype=torch.long)
        return OverlapSums(self.products[index], self.left[index], self.right[index], self.chance[index])

    @property
    def squares(self) -> Tensor:
        """[L, N] ‖ΔW_i‖_F²."""
        return self.products.diagonal(dim1=1, dim2=2).clamp(min=0)

    @property
    def fro(self) -> Tensor:
        """[N] over these layers."""
        return self.squares.sum(0).sqrt()

    def tables(self) -> dict[str, Table]:
        """Cosines and overlaps over these layers together; None where one of the two adapters is zero."""
        sums = self.fro, self.products.sum(0), self.mean(self.left), self.mean(self.right)
        (tables,) = _tables(*(total[None] for total in sums))
        return tables

    def tables_by_layer(self) -> list[dict[str, Table]]:
        """The same of every layer alone."""
        return _tables(self.squares.sqrt(), self.products, self.left, self.right)

    def mean(self, overlaps: Tensor) -> Tensor:
        """[N, N] over these layers, weighted by ‖ΔW_i‖·‖ΔW_j‖; 0 where two adapters have no layer in common."""
        norms = self.squares.sqrt()
        weights = norms[:, :, None] * norms[:, None, :]
        total = weights.sum(0)
        return torch.where(total > 0, (weights * overlaps).sum(0) / total, 0)


def _tables(fro: Tensor, products: Tensor, left: Tensor, right: Tensor) -> list[dict[str, Table]]:
    """For each of L sets of layers, from norms [L, N] and the others [L, N, N]."""
    sizes = fro[:, :, None] * fro[:, None, :]
    defined = sizes > 0
    values = {
        "cosine": (products / sizes).clamp(-1, 1),
        "subspace": torch.where(defined, (left + right) / 2, 0),
        "left": torch.where(defined, left, 0),
        "right": torch.where(defined, right, 0),
    }
    columns = [_pages(stack, defined) for stack in values.values()]
    return [dict(zip(values, pages, strict=True)) for pages in zip(*columns, strict=True)]


def _pages(values: Tensor, defined: Tensor) -> list[Table]:
    """Tables of [L, N, N] numbers, with None where they are not defined."""
    pages: list[Table] = []
    for lines, masks, complete in zip(values.tolist(), defined.tolist(), defined.all(2).all(1).tolist(), strict=True):
        if not complete:
            lines = [
                [value if good else None for value, good in zip(line, mask, strict=True)]
                for line, mask in zip(lines, masks, strict=True)
            ]
        pages.append(tuple(map(tuple, lines)))
    return pages


def layer_overlap(
    unit: Unit,
    numbers: Interaction | None,
    fro: Sequence[float],
    tables: Mapping[str, Table],
    weights: Sequence[float],
    norms: Mapping[str, float],
) -> LayerOverlap:
    """The row of one weight of the base. `fro` and `tables` are of all adapters, `norms` of the base weight."""
    adapters = unit.adapters
    first = min((unit.of(number) for number in adapters), key=len)[0]
    spectral = [0.0] * len(weights)
    total = None
    if numbers:
        for number, sigma in zip(adapters, numbers.spectral.tolist(), strict=True):
            spectral[number] = sigma
        total = layer_sum(adapters, numbers, fro, spectral, weights, norms)
    flags = {
        "needs_base": total is None,
        "alone": total and len(adapters) == 1,
        "zero": total and total.fro == 0,
        "amplified": total and (total.amplification or 0.0) > AMPLIFIED,
        "spike": total and total.second > 0 and total.spectral > SPIKE * total.second,
    }
    return LayerOverlap(
        name=first.name,
        block=block(first.name),
        shape=(unit.rows, *first.shape[1:]),
        adapters=tuple(adapters),
        ranks=tuple(sum(layer.rank for layer in unit.of(number)) for number in adapters),
        fro=tuple(fro),
        spectral=tuple(spectral),
        **tables,
        base_fro=norms.get("fro"),
        base_spectral=norms.get("spn"),
        sum=total,
        flags=tuple(flag for flag, present in flags.items() if present),
    )


def layer_sum(
    adapters: Sequence[int],
    numbers: Interaction,
    fro: Sequence[float],
    spectral: Sequence[float],
    weights: Sequence[float],
    norms: Mapping[str, float],
) -> LayerSum:
    """What the adapters add to one weight together. `adapters`: those that change it; the rest is of all adapters."""
    size, first, second = numbers.total
    shares = dict(zip(adapters, numbers.shares.tolist(), strict=True))
    return LayerSum(
        fro=size,
        spectral=first,
        second=second,
        fro_amplification=_quotient(size, max(abs(w) * norm for w, norm in zip(weights, fro, strict=True))),
        amplification=_quotient(first, max(abs(w) * sigma for w, sigma in zip(weights, spectral, strict=True))),
        fro_ratio=_quotient(size, norms.get("fro")),
        spectral_ratio=_quotient(first, norms.get("spn")),
        shares=tuple(shares.get(number, 0.0) for number in range(len(weights))),
    )


def _quotient(value: float, by: float | None) -> float | None:
    return value / by if by else None


def block_overlaps(layers: Sequence[LayerOverlap], sums: OverlapSums) -> tuple[BlockOverlap, ...]:
    """The rows of all blocks, by their names."""
    blocks = []
    for name, indices in by_block(layers):
        block_sums, members = sums[indices], [layers[i] for i in indices]
        norms = [layer.sum.fro for layer in members if layer.sum]
        blocks.append(
            BlockOverlap(
                block=name,
                layers=len(members),
                left_out=len(members) - len(norms),
                fro=tuple(block_sums.fro.tolist()),
                **block_sums.tables(),
                sum_fro=math.hypot(*norms),
                fro_ratio=norm_ratio((layer.sum.fro, layer.base_fro) for layer in members if layer.sum),
            )
        )
    return tuple(blocks)


def pairs_of(tables: Mapping[str, Table], sums: OverlapSums) -> tuple[Pair, ...]:
    """Every two adapters, over all layers; `tables` are those of `sums`."""
    chance = sums.mean(sums.chance).clamp(max=1).tolist()
    pairs = []
    for a, b in combinations(range(len(chance)), 2):
        cosine, subspace = tables["cosine"][a][b], tables["subspace"][a][b]
        by_chance = None if cosine is None else chance[a][b]
        pairs.append(Pair(a, b, cosine, subspace, by_chance, kind_of(cosine, subspace, by_chance)))
    return tuple(pairs)


def stack_of(layers: Sequence[LayerOverlap], weights: Sequence[float], limit: float | None, has_base: bool) -> Stack:
    """The sum as a whole: where it is strongest, and what brings it to the limit."""
    sums = [(layer, layer.sum) for layer in layers if layer.sum]
    # strengths as parts of the base weight's σ_1, where there is a base
    units = [(layer, total, layer.base_spectral) for layer, total in sums if layer.base_spectral]
    if not has_base:
        units = [(layer, total, 1.0) for layer, total in sums]
    strengths = [(total.spectral / unit, layer.name) for layer, total, unit in units]
    singles = [
        (abs(weight) * sigma / unit, layer.name, number)
        for layer, _, unit in units
        for number, (weight, sigma) in enumerate(zip(weights, layer.spectral, strict=True))
    ]
    strongest, strongest_layer = max(strengths, default=(None, None))
    alone, alone_layer, alone_adapter = max(singles, default=(None, None, None))
    limit = limit or alone
    factor = limit / strongest if limit and strongest else None
    return Stack(
        fro=math.hypot(*(total.fro for _, total in sums)),
        fro_ratio=norm_ratio((total.fro, layer.base_fro) for layer, total in sums),
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
