"""What a decomposed adapter offers to choose from: its dimensions with what they are worth and what they cost."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from lorashrink.packing.allocation import Dimensions
from lorashrink.shrinking.decomposed import Decomposed
from lorashrink.shrinking.plan import Outline

if TYPE_CHECKING:
    from lorashrink.packing.allocation import Values


def dimensions_of(decomposed: Decomposed, outlined: Outline, decided_by: str) -> Dimensions:
    """All dimensions of the layers that are judged."""
    squares, counts, spread, needed = [], [], [], []
    rest = 0.0
    for index, facts in zip(outlined.judged, outlined.facts, strict=True):
        rank, layer = facts.rank, decomposed.adapter.layers[index]
        weight = 1.0 / facts.base_fro**2 if decided_by == "base" and facts.base_fro else 1.0
        squares.append(weight * facts.sigma[:rank] ** 2)
        rest += weight * facts.tail
        sides = (layer.shape[0], math.prod(layer.shape[1:]))
        counts.append(np.tile(np.array(sides, dtype=np.float64), (rank, 1)))
        spread.append(_spread(decomposed, index, rank))
        needed.append(np.arange(rank) < (0 if facts.removable else 1))
    if not squares:
        none = np.empty((0, 2))
        return Dimensions(np.empty(0), none, none, np.empty(0, dtype=bool), rest)
    return Dimensions(
        np.concatenate(squares), np.concatenate(counts), np.concatenate(spread), np.concatenate(needed), rest
    )


def _spread(decomposed: Decomposed, index: int, rank: int) -> Values:
    """[rank, 2]: how much noise in a vector matters, by what it would if all directions were like the vector's own.

    Without the covariances of a layer they count as equal.
    """
    spectrum = decomposed.spectra[index]
    statistics = decomposed.statistics[index] if decomposed.statistics else None
    noise = statistics.noise() if statistics else None
    if noise is None or spectrum.plain is None or spectrum.left is None or spectrum.right is None:
        return np.ones((rank, 2))
    grams = spectrum.plain.grams
    to_up, to_down = spectrum.left[:, :rank].double(), spectrum.right[:rank].double()
    ups = ((grams.up @ to_up) * to_up).sum(0).numpy()  # ‖u‖², where uᵀGu is σ
    downs = ((to_down @ grams.down) * to_down).sum(1).numpy()
    sigma = spectrum.sigma[:rank].numpy()
    sides = np.stack([ups * noise.up, downs * noise.down], axis=1)
    ratios: Values = np.maximum(sides / sigma[:, None], 1e-6)
    return ratios
