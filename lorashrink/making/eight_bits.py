"""An adapter with its LoRA factors in 8-bit floats; nothing else of it changes."""

from __future__ import annotations

import math
from functools import partial
from typing import TYPE_CHECKING

from lorashrink.adapters import Adapter, Layer
from lorashrink.errors import NonFinite
from lorashrink.files.store import DTYPES, FLOATS, ComputedStore, TensorStore, tensor_info
from lorashrink.linking.renaming import LazyTensor
from lorashrink.making.narrowing import balanced, narrowed
from lorashrink.shrinking.layout import FP8, FP16, READ_WITH_ALPHA
from lorashrink.text import count_text

if TYPE_CHECKING:
    from torch import Tensor

    from lorashrink.engine.rounding import Rounded

# Layers that 8 bits change by more than this part of their norm stay in 16.
_COARSE = 0.25


def in_8_bits(adapter: Adapter, family: str | None, losses: dict[str, float]) -> tuple[TensorStore, list[str]]:
    """(the adapter's tensors with LoRA factors in e4m3, warnings). Other floats have at most 16 bits.

    losses: gets key -> share of its norm that is lost, when a tensor of 16 bits is read that loses a noteworthy part.

    family: of models. The scale of a layer with an alpha goes into its factors; for models whose 8-bit files are read
    with an alpha, that is 1. Raises NonFinite.
    """
    import torch

    store, keeps_alpha = adapter.store, family in READ_WITH_ALPHA

    def read_16_bits(key: str) -> Tensor:
        return narrowed(store.read(key), FP16, key, store.path, losses)

    tensors: dict[str, LazyTensor] = {
        key: (tensor_info(FP16, info.shape), partial(read_16_bits, key))
        if info.shape and info.dtype in FLOATS and DTYPES[info.dtype][0] > 2
        else (info, partial(store.read, key))
        for key, info in store.tensors.items()
    }
    alphas, coarse = set(), []
    for layer in adapter.layers:
        if layer.family.name != "lora" or "mid" in layer.keys or DTYPES[layer.dtype][0] == 1:
            continue
        rounded = _rounded(layer, keeps_alpha)
        if not math.isfinite(rounded.norm):
            raise NonFinite(f"{store.path}: layer {layer.name} contains NaN or infinity. Use an earlier checkpoint.")
        small = rounded.error <= _COARSE * rounded.norm
        if not small:
            coarse.append(layer.name)
        for role in ("up", "down"):
            info = tensor_info(FP8 if small else FP16, layer.infos[role].shape)
            tensors[layer.keys[role]] = (info, partial(_factor, layer, keeps_alpha, role, small, losses))
        if "alpha" in layer.keys:
            alphas.add(layer.keys["alpha"])
            if "bias" in layer.keys:  # programs multiply it with the scale of the factors
                tensors[layer.keys["bias"]] = (
                    tensor_info(FP16, layer.infos["bias"].shape),
                    partial(_bias, layer, keeps_alpha, losses),
                )
    for key in alphas:
        if keeps_alpha:
            tensors[key] = (tensor_info("F32", ()), partial(torch.tensor, 1.0))
        else:
            del tensors[key]
    metadata = dict(store.metadata)
    if "ss_network_alpha" in metadata and alphas:
        metadata["ss_network_alpha"] = "1" if keeps_alpha else metadata.get("ss_network_dim", "1")
    warnings = []
    if coarse:
        what = f"{count_text(len(coarse), 'layer')}, first {coarse[0]}"
        warnings.append(f"{what}, stay in fp16: fp8 would round away more than a quarter of them")
    return ComputedStore(store.path, tensors, metadata, store.files, store.headers), warnings


def _factor_of_scale(layer: Layer, keeps_alpha: bool) -> float:
    """What goes out of the alpha into the numbers."""
    return (layer.scale * (layer.rank if keeps_alpha else 1)) if "alpha" in layer.keys else 1.0


def _bias(layer: Layer, keeps_alpha: bool, losses: dict[str, float]) -> Tensor:
    bias = layer.store.read(layer.keys["bias"]).double() * _factor_of_scale(layer, keeps_alpha)
    return narrowed(bias, FP16, layer.keys["bias"], layer.store.path, losses)


def _scaled(layer: Layer, keeps_alpha: bool) -> tuple[Tensor, Tensor]:
    """up [out, r] and down [r, n] as they are written: with the scale of an alpha that is no more, or is 1 now."""
    up, down = (layer.store.read(layer.keys[role]).flatten(1).double() for role in ("up", "down"))
    factor = _factor_of_scale(layer, keeps_alpha)
    half = math.sqrt(abs(factor))
    return up * math.copysign(half, factor), down * half


def _rounded(layer: Layer, keeps_alpha: bool) -> Rounded:
    from lorashrink.engine.rounding import to_float8

    return to_float8(*_scaled(layer, keeps_alpha))


def _factor(layer: Layer, keeps_alpha: bool, role: str, small: bool, losses: dict[str, float]) -> Tensor:
    if small:
        rounded = _rounded(layer, keeps_alpha)
        return rounded.up if role == "up" else rounded.down
    up, down = balanced(*_scaled(layer, keeps_alpha), FP16)
    return narrowed(up if role == "up" else down, FP16, layer.keys[role], layer.store.path, losses)
