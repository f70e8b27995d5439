"""The layers of a shrunk adapter whose factors are trained, and what they add to a running model."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from lorashrink.adapters import Adapter, Layer
from lorashrink.bases import Base
from lorashrink.calibration.sites import Watched, by_weight, forward_hooks, modules_of, pieces, watched
from lorashrink.engine.delta import Delta
from lorashrink.errors import InputError
from lorashrink.files.store import cast
from lorashrink.linking.matching import match


@dataclass(frozen=True, eq=False)
class TrainedLayer:
    """One layer of the shrunk adapter, and where it adds to the model."""

    layer: Layer
    up: Tensor  # [out, r] float32
    down: Tensor  # [r, in·kh·kw] float32
    scale: float
    sites: tuple[tuple[Watched, tuple[int, int]], ...]  # a module's rows, and those of `up` that belong there

    def rounded(self) -> dict[str, Tensor]:
        """Key in the file -> factor in its dtype: `up`, then `down`."""
        return {
            self.layer.keys[role]: cast(tensor.detach().cpu(), self.layer.infos[role].dtype)
            for role, tensor in (("up", self.up), ("down", self.down))
        }

    def change(self, module: nn.Module, inputs: Tensor, rows: tuple[int, int]) -> Tensor:
        """scale · up · down · x for some rows of `up`, in the dtype of x."""
        up, down = self.up[slice(*rows)].to(inputs.dtype), self.down.to(inputs.dtype)
        if isinstance(module, nn.Conv2d):
            weight = down.reshape(len(down), -1, *module.kernel_size)
            inner = functional.conv2d(inputs, weight, None, module.stride, module.padding, module.dilation)
            return functional.conv2d(inner, up[:, :, None, None]) * self.scale
        return functional.linear(functional.linear(inputs, down), up) * self.scale


def trained_layers(adapter: Adapter, pipeline: Any, base: Base, device: str) -> list[TrainedLayer]:
    """The layers of an adapter that change the model. Raises InputError if one of them is no LoRA of two factors."""
    by_key = by_weight(watched(modules_of(pipeline, base), "diffusers", base))
    layers = []
    for layer, views in zip(adapter.layers, match(adapter, base), strict=True):
        two_factors = layer.own.keys() == {"up", "down"} and layer.keys.keys() <= {"up", "down", "alpha"}
        if layer.family.name != "lora" or not two_factors:
            raise InputError(
                f"{adapter.path}: layer {layer.name} is {layer.algo}, and only LoRA of two factors is refined. "
                "Make one of it with `lorashrink resize --as lora -r energy=1`."
            )
        sites = tuple(pieces(views, by_key))
        if sites and not layer.off:
            delta = layer.delta
            assert isinstance(delta, Delta)
            up, down = (tensor.to(device, torch.float32).clone().requires_grad_() for tensor in (delta.up, delta.down))
            layers.append(TrainedLayer(layer, up, down, delta.scale, sites))
    if not layers:
        raise InputError(f"{adapter.path}: changes no layer of the loaded model.")
    return layers


@contextmanager
def layers_added(layers: Sequence[TrainedLayer]) -> Iterator[None]:
    """The layers add to the outputs of the model's modules for as long as this lasts."""
    by_module: dict[nn.Module, list[tuple[TrainedLayer, int, tuple[int, int]]]] = defaultdict(list)
    for layer in layers:
        for site, rows in layer.sites:
            by_module[site.module].append((layer, site.start, rows))

    def add(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        for layer, start, rows in by_module[module]:
            change = layer.change(module, inputs[0], rows)
            channel = 1 if isinstance(module, nn.Conv2d) else -1
            behind = output.shape[channel] - start - change.shape[channel]
            if start or behind:
                around = (0, 0) * (output.dim() - 2) if channel == 1 else ()
                change = functional.pad(change, (*around, start, behind))
            output = output + change
        return output

    with forward_hooks(by_module, add):
        yield
