"""A decomposed adapter: its layers, their spectra, and what recipes ask about them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import torch

from lorashrink.adapters import Adapter, Layer
from lorashrink.bases import Base, Views, views_id
from lorashrink.bases.norms import Norms
from lorashrink.calibration.statistics import LayerStatistics, Noise
from lorashrink.engine.accelerators import computed
from lorashrink.engine.delta import fan_in
from lorashrink.engine.rounding import FLOAT8, relative_error
from lorashrink.engine.spectrum import Spectrum, alignment
from lorashrink.errors import NonFinite
from lorashrink.files.store import DTYPES
from lorashrink.recipes.terms import LayerFacts

if TYPE_CHECKING:
    from torch import Tensor

    from lorashrink.recipes.terms import Values


@dataclass(frozen=True, eq=False)
class Decomposed:
    """An adapter with everything that recipes ask about its layers."""

    adapter: Adapter
    views: Sequence[Views]  # per layer; () without a base weight
    spectra: Sequence[Spectrum]
    norms: Norms
    alignments: Sequence[Tensor | None]
    statistics: Sequence[LayerStatistics | None] = ()  # per layer, where its spectrum is calibrated by them
    misfits: Mapping[str, str] = field(default_factory=dict)  # see `linking.matching.misfits`

    def __post_init__(self) -> None:
        for layer, spectrum in zip(self.adapter.layers, self.spectra, strict=True):
            if not spectrum.finite:
                keys = [key for role, key in {**layer.keys, **layer.common}.items() if role != "alpha"]
                stored = [key for key in keys if key in layer.store.tensors]  # none of a sum, which only its parts have
                damaged = (f" (in {key})" for key in stored if not torch.isfinite(layer.store.read(key).float()).all())
                raise NonFinite(
                    f"{self.adapter.path}: layer {layer.name} contains NaN or infinity{next(damaged, '')}. "
                    "The training diverged, or the file is damaged; use an earlier checkpoint."
                )

    def facts(self, index: int, dtype: str, *, with_alpha: bool = False) -> LayerFacts:
        """The facts about a layer for scores; `dtype` is the dtype of the format that it will have.

        with_alpha: its factors are written for an alpha of 1.
        """
        layer, views, aligned = self.adapter.layers[index], self.views[index], self.alignments[index]
        norms = self.norms.get(views_id(views), {}) if views else {}
        return LayerFacts(
            sigma=self.spectra[index].sigma.numpy(),
            numbers=layer.numbers,
            bytes_per_rank=layer.numbers * DTYPES[dtype][0],
            kernel=any(side > 1 for side in layer.shape[2:]),
            removable=not more_than_delta(layer),
            together=layer.together,
            base_fro=norms.get("fro"),
            base_spn=norms.get("spn"),
            base_alignment=None if aligned is None else aligned.abs().numpy(),
            tail=self.spectra[index].tail,
            file_norm=self._file_norm,
            noise=self.noise(index, with_alpha) if DTYPES[dtype][0] == 1 else None,
        )

    def noise(self, index: int, with_alpha: bool) -> Values:
        """[r]: what rounding to e4m3 changes of each dimension if it is the last one that is kept, relative to σ²."""
        spectrum, shape = self.spectra[index], self.adapter.layers[index].shape
        up, down = spectrum.lengths()
        rms = np.sqrt(up * down) / (shape[0] * fan_in(shape)) ** 0.25
        if with_alpha:  # then factors are larger by √(rank / alpha) in both
            rms = rms * np.sqrt(np.arange(1, len(rms) + 1))
        errors = relative_error(rms, FLOAT8) ** 2
        statistics = self.statistics[index] if self.statistics else None
        if statistics is None:
            return 2 * errors
        sigma = spectrum.sigma.numpy()
        # Noise has no direction; a kept dimension mostly lies in those that matter more.
        noise = statistics.noise() or Noise(*(float(sigma.sum() / (side**2).sum()) for side in (down, up)))
        shares = (down**2 * noise.down + up**2 * noise.up) / np.maximum(sigma, 1e-300)
        return np.where(sigma > 0, errors * shares * noise.remaining, 0.0)

    @cached_property
    def _file_norm(self) -> float | None:
        if not self.statistics:
            return None
        pairs = zip(self.spectra, self.statistics, strict=True)
        return math.sqrt(sum(float((spectrum.sigma**2).sum()) for spectrum, statistics in pairs if statistics))


def more_than_delta(layer: Layer) -> bool:
    """Whether the layer would change the model even with a ΔW of zero."""
    return bool({"magnitude", "bias"} & layer.keys.keys())


def aligned(
    adapter: Adapter, views: Sequence[Views], spectra: Sequence[Spectrum], base: Base, device: torch.device, index: int
) -> Tensor | None:
    """The alignment of a layer's singular pairs with its base weight, None without one."""
    if not views[index] or not spectra[index].rank:
        return None
    delta, weight = adapter.layers[index].delta, base.weight(views[index])
    (products,) = computed(lambda spectra, gpu: [alignment(delta, spectra[0], weight, gpu)], [spectra[index]], device)
    return products
