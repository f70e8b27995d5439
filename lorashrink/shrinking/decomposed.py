"""A decomposed adapter: its layers, their spectra, and what recipes ask about them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

import torch

from lorashrink.adapters import Adapter, Layer
from lorashrink.bases import Base, Views, views_id
from lorashrink.bases.norms import Norms
from lorashrink.engine.accelerators import computed
from lorashrink.engine.delta import fan_in
from lorashrink.engine.spectrum import Spectrum, alignment
from lorashrink.errors import NonFinite
from lorashrink.files.store import DTYPES
from lorashrink.recipes.terms import LayerFacts

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, eq=False)
class Decomposed:
    """An adapter with everything that recipes ask about its layers."""

    adapter: Adapter
    views: Sequence[Views]  # per layer; () without a base weight
    spectra: Sequence[Spectrum]
    norms: Norms
    alignments: Sequence[Tensor | None]
    # Per layer whether its spectrum is calibrated, where the recipe needs that; else ().
    calibrated: Sequence[bool] = ()
    misfits: Mapping[str, str] = field(default_factory=dict)  # see `linking.matching.misfits`

    def __post_init__(self) -> None:
        for layer, spectrum in zip(self.adapter.layers, self.spectra, strict=True):
            if not spectrum.finite:
                keys = [key for role, key in {**layer.keys, **layer.common}.items() if role != "alpha"]
                damaged = (f" (in {key})" for key in keys if not torch.isfinite(layer.store.read(key).float()).all())
                raise NonFinite(
                    f"{self.adapter.path}: layer {layer.name} contains NaN or infinity{next(damaged, '')}. "
                    "The training diverged, or the file is damaged; use an earlier checkpoint."
                )

    def facts(self, index: int, dtype: str) -> LayerFacts:
        """The facts about a layer for scores; `dtype` is the dtype of the format that it will have."""
        layer, views, aligned = self.adapter.layers[index], self.views[index], self.alignments[index]
        norms = self.norms.get(views_id(views), {}) if views else {}
        numbers = layer.shape[0] + fan_in(layer.shape)
        return LayerFacts(
            sigma=self.spectra[index].sigma.numpy(),
            numbers=numbers,
            bytes_per_rank=numbers * DTYPES[dtype][0],
            kernel=any(side > 1 for side in layer.shape[2:]),
            removable=not more_than_delta(layer),
            base_fro=norms.get("fro"),
            base_spn=norms.get("spn"),
            base_alignment=None if aligned is None else aligned.abs().numpy(),
            tail=self.spectra[index].tail,
            file_norm=self._file_norm,
        )

    @cached_property
    def _file_norm(self) -> float | None:
        if not self.calibrated:
            return None
        pairs = zip(self.spectra, self.calibrated, strict=True)
        return math.sqrt(sum(float((spectrum.sigma**2).sum()) for spectrum, calibrated in pairs if calibrated))


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
