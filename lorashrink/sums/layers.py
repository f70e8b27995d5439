"""The layers of a sum of adapters: what several layers add to the same weight, as one LoRA."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from lorashrink.adapters import Layer
from lorashrink.engine.delta import Experts, fan_in
from lorashrink.errors import NonFinite
from lorashrink.linking.rows import RowRun, covers
from lorashrink.sums.numbers import dora_delta, of_experts, side_by_side, summed_matrix

if TYPE_CHECKING:
    from lorashrink.engine.delta import AnyDelta


@dataclass(frozen=True, eq=False, slots=True)
class Part:
    """A layer of one of the adapters, and where it goes."""

    layer: Layer
    weight: float
    runs: tuple[RowRun, ...]

    def covers(self, rows: int) -> bool:
        """Whether a sum of so many rows has those of this layer, all of them and in their order."""
        return covers(self.runs, rows) and self.layer.shape[0] == rows

    def delta(self) -> AnyDelta:
        """What the layer adds at its weight. Raises NonFinite."""
        delta = dora_delta(self.layer) if "magnitude" in self.layer.keys else self.layer.delta
        factors = (bool(tensor.float().isfinite().all()) for tensor in delta.tensors)
        if not (math.isfinite(self.layer.scale) and all(factors)):
            raise NonFinite(
                f"{self.layer.store.path}: layer {self.layer.name} contains NaN or infinity. The training diverged, "
                "or the file is damaged; use an earlier checkpoint."
            )
        return delta.times(self.weight)


@dataclass(frozen=True, eq=False)
class SumLayer(Layer):
    """What several layers add to the same weight, as a LoRA; `keys` and `infos` are those of the output."""

    parts: tuple[Part, ...] = ()
    kind: str = "F16"  # dtype in which it is written by default

    @property
    def rank(self) -> int:
        """Σ of the stored ranks."""
        return sum(part.layer.rank for part in self.parts)

    @property
    def width(self) -> int:
        """Rank of `delta`, as far as headers tell."""
        if self.family.name == "experts":
            return self.rank
        return min(sum(part.layer.width for part in self.parts), self.shape[0], fan_in(self.shape))

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
        experts = [delta for delta in deltas if isinstance(delta, Experts)]
        if experts:
            return of_experts(experts, self.shape)
        if len(deltas) == 1 and self.parts[0].covers(self.shape[0]):
            return replace(deltas[0], shape=self.shape)
        runs = [part.runs for part in self.parts]
        if sum(delta.rank for delta in deltas) < min(self.shape[0], fan_in(self.shape)):
            return side_by_side([delta.factored() for delta in deltas], runs, self.shape)
        return summed_matrix(deltas, runs, self.shape)
