"""The score terms of recipes, one table row each, and what they may know about a layer."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np

    Values = np.ndarray[tuple[int], np.dtype[np.float64]]
    Indices = np.ndarray[tuple[int], np.dtype[np.int64]]


@dataclass(frozen=True, eq=False)
class LayerFacts:
    """The facts about one layer that scores and selections use."""

    sigma: Values  # [r] float64, largest first, 0 past the numerical rank
    numbers: int  # out + in·kh·kw: numbers stored per rank
    bytes_per_rank: int  # in the output dtype
    kernel: bool  # a convolution larger than 1×1
    removable: bool = True  # False where even a ΔW of zero would change the model: DoRA
    together: str = ""  # layers of one name are written with one rank
    base_fro: float | None = None
    base_spn: float | None = None
    base_alignment: Values | None = None  # [r], |u_iᵀ·W·v_i|
    tail: float = 0.0  # Σσ² of dimensions that were not computed, because no recipe can keep them
    file_norm: float | None = None  # sqrt(Σσ²) over the file, of calibrated σ, which are comparable across layers
    # [r]: what rounding to the output dtype changes, relative to σ². None where that is nothing beside what is dropped
    noise: Values | None = None

    @cached_property
    def total(self) -> float:
        """Σσ², all dimensions included: ‖ΔW‖_F², where σ is not calibrated."""
        return float((self.sigma**2).sum()) + self.tail

    @cached_property
    def rank(self) -> int:
        """The numerical rank."""
        return int((self.sigma > 0).sum())

    def base_norm(self, name: str) -> float | None:
        """A norm of the base weight, "fro" or "spn"; None without a base weight."""
        return {"fro": self.base_fro, "spn": self.base_spn}[name]


# Norms of a base weight: Frobenius and spectral.
NORMS = frozenset({"fro", "spn"})


@dataclass(frozen=True, slots=True)
class Term:
    """A reference that σ is divided by.

    needs: what must be looked up for it: "layer", "fro" or "spn" (norms of the base weight), "weight" or "calibration".
    `reference` is asked only where that was found.
    """

    needs: str
    reference: Callable[[LayerFacts], float | Values | None]
    of_adapter: bool = False  # a norm of the adapter itself, which moves with `rescale`
    alone: bool = False  # stands beside no other term


TERMS: dict[str, Term] = {
    "spn_lora": Term("layer", lambda facts: float(facts.sigma[0]), of_adapter=True),
    "spn_ckpt": Term("spn", lambda facts: facts.base_spn),
    "fro_lora": Term("layer", lambda facts: math.sqrt(facts.total), of_adapter=True),
    "fro_ckpt": Term("fro", lambda facts: facts.base_fro),
    "subspace": Term("weight", lambda facts: facts.base_alignment),
    "params": Term("layer", lambda facts: float(facts.numbers)),
    "calib": Term("calibration", lambda facts: facts.file_norm, of_adapter=True, alone=True),
}

# Not a term: its weight is not normalised, and it divides by the square root of the bytes of one rank.
BYTES = "bytes"
