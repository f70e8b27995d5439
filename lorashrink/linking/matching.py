"""Adapter and base together: which weight each layer changes, and which layers can be shrunk at all."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import partial

from lorashrink.adapters import Adapter, Layer, adapter_family
from lorashrink.adapters.family import Needs
from lorashrink.adapters.peft_keys import way_out
from lorashrink.bases import Base, Views, views_id, views_shape
from lorashrink.bases.families import family_title
from lorashrink.errors import FamilyMismatch, ShapeError, UsageError
from lorashrink.names import kind

FORMS = ("auto", "lora", "same")

# First layers, whose inputs differ between variants of one family: inpainting, control, image to video.
_FEW = 2


def match(adapter: Adapter, base: Base) -> list[Views]:
    """For each layer the base weight that it changes, () where the base has none such.

    A first layer that was made for another number of inputs changes none. Raises FamilyMismatch or ShapeError if
    adapter and base do not belong together, and UsageError if the adapter is for a model that repeats layers of the
    base, whose numbers are not the base's.
    """
    if _repeats_layers(adapter):
        raise UsageError(
            f"{adapter.path}: layer_replication is set, so that its layers are numbered as in a model that repeats "
            "layers of the base. Leave the base out, with a recipe that needs none, such as energy=0.95."
        )
    views = [base.find(layer.name) for layer in adapter.layers]
    misfits = [i for i, layer in enumerate(adapter.layers) if views[i] and not fits(layer, views[i])]
    variants = []
    for i in misfits:
        shape, weight = adapter.layers[i].shape, views_shape(views[i])
        if (
            len(shape) == len(weight) > 1
            and shape[1] != weight[1]
            and (shape[0], *shape[2:]) == (weight[0], *weight[2:])
        ):
            variants.append(i)
    if len(variants) <= _FEW < len(views):
        misfits = [i for i in misfits if i not in variants]
        for i in variants:
            views[i] = ()
    family = adapter_family(adapter)
    if (misfits or 2 * sum(map(bool, views)) < len(views)) and family and family != base.family.name:
        raise FamilyMismatch(
            f"{adapter.path}: looks like an adapter for {family_title(family)}, but {base.path} is "
            f"{base.family.title}. Give the base that it was trained on, or a relative of it."
        )
    if misfits:
        layer, layer_views = adapter.layers[misfits[0]], views[misfits[0]]
        raise ShapeError(
            f"{adapter.path}: layer {layer.name} changes a weight of {list(layer.shape)}, but {views_id(layer_views)} "
            f"of {base.path} is {list(views_shape(layer_views))}. Give the base that the adapter was trained on."
        )
    if adapter.layers and all(layer.family.name == "experts" for layer in adapter.layers) and not any(views):
        raise UsageError(
            f"{adapter.path}: holds factors of experts alone (target_parameters), which are not compared with a base. "
            "Leave the base out, with a recipe that needs none, such as energy=0.95."
        )
    if adapter.layers and not any(views):
        raise FamilyMismatch(
            f"{adapter.path}: none of its {len(adapter)} layers, such as {adapter.layers[0].name}, is in {base.path} "
            f"({base.family.title}). Give the base that it was trained on, or a relative of it."
        )
    return views


def find_fitting(adapter: Adapter, base: Base) -> list[Views]:
    """For each layer the base weight of its name, () where none such has its shape; nothing is an error."""
    if _repeats_layers(adapter):
        return [()] * len(adapter)
    views = [base.find(layer.name) for layer in adapter]
    return [rows if rows and fits(layer, rows) else () for layer, rows in zip(adapter, views, strict=True)]


def _repeats_layers(adapter: Adapter) -> bool:
    return any(config.get("layer_replication") for config in adapter.settings.values())


def misfits(adapter: Adapter, base: Base) -> dict[str, str]:
    """Layer -> why it changes no weight, of those for which the base has a weight of another shape."""
    weights = {layer: base.find(layer.name) for layer in adapter}
    return {
        layer.name: f"its ΔW is {list(layer.shape)}, but the weight of the base is {list(views_shape(views))}"
        for layer, views in weights.items()
        if views and not fits(layer, views)
    }


def fits(layer: Layer, views: Views) -> bool:
    """Whether a layer can be added to a weight of this shape, as far as the file tells."""
    shape = views_shape(views)
    if layer.family.needs in (Needs.MULTIPLICATION, Needs.SHAPE):
        return layer.shape[:1] in ((), shape[:1])
    if layer.family.flat(layer.infos):
        return (layer.shape[0], math.prod(layer.shape[1:])) == (shape[0], math.prod(shape[1:]))
    return same_matrix(layer.shape, shape)


def same_matrix(a: tuple[int, ...], b: tuple[int, ...]) -> bool:
    """Whether two shapes mean the same matrix: a 1×1 convolution is a linear layer."""

    def squeezed(shape: tuple[int, ...]) -> tuple[int, ...]:
        return shape[:2] if all(side == 1 for side in shape[2:]) else shape

    return squeezed(a) == squeezed(b)


def bind(adapter: Adapter, views: Sequence[Views], base: Base | None) -> Adapter:
    """The adapter with what its layers need of the base: open shapes, and weights that are a part of ΔW."""
    readable = base if base and base.store else None
    layers = [
        layer.on(views_shape(rows), partial(readable.weight, rows) if readable else None) if rows else layer
        for layer, rows in zip(adapter.layers, views, strict=True)
    ]
    return replace(adapter, layers=tuple(layers))


def part(adapter: Adapter, views: Sequence[Views], form: str) -> tuple[Adapter, list[Views]]:
    """(the adapter with the layers that can be shrunk, their views); the others go to `Adapter.others`.

    `form` is one of `FORMS`. Raises UsageError if ΔW depends on a base that is not there.
    """
    check_true_base(adapter)
    others = dict(adapter.others)
    reasons = [_reason_to_stay(layer, form) for layer in adapter.layers]
    if adapter.as_folder and (first := next(filter(None, reasons), None)):
        # its configuration knows one kind of layers, so that all of that kind are LoRA, or none
        reasons = [None if layer.family.written else first for layer in adapter.layers]
    layers, kept_views = [], []
    for layer, layer_views, reason in zip(adapter.layers, views, reasons, strict=True):
        if reason:
            others |= dict.fromkeys([*layer.keys.values(), *layer.common.values()], reason)
        else:
            layers.append(layer)
            kept_views.append(layer_views)
    return replace(adapter, layers=tuple(layers), others=others), kept_views


def check_true_base(adapter: Adapter) -> None:
    """Raises UsageError if PEFT changes the base of this adapter at load, and there is no base to take it from."""
    for layer in adapter.layers:
        if layer.family.changed_base and not layer.bound:
            raise UsageError(f"{adapter.path}: layer {layer.name}: {way_out(layer.family.changed_base)}")


def _reason_to_stay(layer: Layer, form: str) -> str | None:
    """Why a layer cannot be shrunk, or should not."""
    if layer.family.written:
        return None
    if form == "same":
        return f"{layer.algo}, kept in its own form as asked"
    if layer.family.needs is Needs.MULTIPLICATION and form != "lora":
        return f"{layer.algo}: {layer.family.needs.value}; with a base, --as lora makes a LoRA of it"
    if not layer.bound:
        return f"{layer.algo}: {layer.family.needs.value}, and there is none"
    if not layer.shape_known and kind(layer.name, ()) not in ("attn", "mlp", "te"):
        return f"{layer.algo}: only the base tells whether this is a convolution"
    return None
