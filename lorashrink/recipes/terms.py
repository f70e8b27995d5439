"""Score terms and recipe keys, one table row each."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np

if TYPE_CHECKING:
    Values = np.ndarray[tuple[int], np.dtype[np.float64]]
    Indices = np.ndarray[tuple[int], np.dtype[np.int64]]


@dataclass(frozen=True, eq=False, slots=True)
class LayerFacts:
    """What a recipe may know about one layer."""

    sigma: Values  # [r] float64, largest first, 0 past the numerical rank
    numbers: int  # out + in·kh·kw: numbers stored per rank
    bytes_per_rank: int  # in the output dtype
    kernel: bool  # a convolution larger than 1×1
    removable: bool = True  # False where even a ΔW of zero would change the model: DoRA
    base_fro: float | None = None
    base_spn: float | None = None
    base_alignment: Values | None = None  # [r], |u_iᵀ·W·v_i|
    tail: float = 0.0  # Σσ² of dimensions that were not computed, because no recipe can keep them
    whole: float | None = None  # sqrt(Σσ²) over the whole file, of σ that are comparable across layers: calibrated ones

    @property
    def total(self) -> float:
        """Σσ², all dimensions included: ‖ΔW‖_F², where σ is not calibrated."""
        return float((self.sigma**2).sum()) + self.tail

    @property
    def rank(self) -> int:
        """The numerical rank."""
        return int((self.sigma > 0).sum())

    def base_norm(self, name: str) -> float | None:
        """A norm of the base weight, "fro" or "spn"."""
        return {"fro": self.base_fro, "spn": self.base_spn}[name]


@dataclass(frozen=True, slots=True)
class Term:
    """A reference that σ is divided by. `needs`: "layer", "norms", "weight" or "calibration"."""

    needs: str
    reference: Callable[[LayerFacts], float | Values]
    of_adapter: bool = False  # a norm of the adapter itself, which moves with `rescale`
    alone: bool = False  # stands beside no other term


def _known(value: float | Values | None) -> float | Values:
    assert value is not None, "the caller looks up what Recipe.needs names"
    return value


TERMS: dict[str, Term] = {
    "spn_lora": Term("layer", lambda f: float(f.sigma[0]), True),
    "spn_ckpt": Term("norms", lambda f: _known(f.base_spn)),
    "fro_lora": Term("layer", lambda f: math.sqrt(f.total), True),
    "fro_ckpt": Term("norms", lambda f: _known(f.base_fro)),
    "subspace": Term("weight", lambda f: _known(f.base_alignment)),
    "params": Term("layer", lambda f: float(f.numbers)),
    "calib": Term("calibration", lambda f: _known(f.whole), True, alone=True),
}

BYTES = "bytes"
