"""What reports say of an adapter as a whole, and of its layers together."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any, Protocol

from lorashrink.adapters import Adapter, adapter_family
from lorashrink.names import naming


class Row(Protocol):
    """A row of a table of layers."""

    @property
    def block(self) -> str: ...


def summary(adapter: Adapter) -> dict[str, Any]:
    """What results have in common: path, bytes, family, algo, naming, dtype, layers, ranks (lowest and highest)."""
    ranks = [layer.rank for layer in adapter]
    return {
        "path": str(adapter.path),
        "bytes": adapter.store.nbytes,
        "family": adapter_family(adapter),
        "algo": joined(layer.algo for layer in adapter) or "none",
        "naming": naming([layer.name for layer in adapter]),
        "dtype": joined(layer.dtype for layer in adapter) or "none",
        "layers": len(adapter),
        "ranks": (min(ranks), max(ranks)) if ranks else (),
    }


def joined(words: Iterable[str]) -> str:
    """Each word once, as in `lora+lokr`; "" without words."""
    return "+".join(sorted(set(words)))


def by_block(rows: Sequence[Row]) -> list[tuple[str, list[int]]]:
    """(block, indices of its rows), by the blocks' names."""
    indices: dict[str, list[int]] = defaultdict(list)
    for index, row in enumerate(rows):
        indices[row.block].append(index)
    return sorted(indices.items())


def norm_ratio(pairs: Iterable[tuple[float | None, float | None]]) -> float | None:
    """‖ΔW‖_F / ‖W‖_F over the layers of which both are known, and the second is not 0; None if there are none."""
    defined = [(norm, base) for norm, base in pairs if norm is not None and base]
    return math.hypot(*(norm for norm, _ in defined)) / math.hypot(*(base for _, base in defined)) if defined else None
