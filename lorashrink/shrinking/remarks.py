"""Warnings about an output: limits that layers break, encoders that loaders cannot read."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence

from lorashrink.adapters import Layer
from lorashrink.bases import views_id
from lorashrink.files.store import MIXTURES, TensorInfo
from lorashrink.recipes.grammar import CAPS, Recipe
from lorashrink.recipes.terms import LayerFacts
from lorashrink.shrinking.decomposed import Decomposed
from lorashrink.shrinking.encoders import Anchor
from lorashrink.shrinking.layout import Layout
from lorashrink.text import count_text

# A text encoder's layers in kohya's names.
_ENCODER = re.compile(r"lora_te\d?(?=_text_model_encoder_layers_)")


def output_warnings(decomposed: Decomposed, layout: Layout, widths: Sequence[int]) -> list[str]:
    """Warnings about the layers and the form of the output."""
    warnings = [*decomposed.adapter.notes]
    layers = decomposed.adapter.layers
    if not layout.written(widths):
        warnings.append(
            "no layer becomes smaller: its own form is already smaller than a LoRA of these ranks, or it cannot be a "
            "LoRA. The output is a copy of the input"
        )
    elif layout.no_fp8:
        # With a base, programs of the model read no other names of these layers.
        warnings.append(
            f"is in fp16: {layout.no_fp8}" + ("" if any(decomposed.views) else ". --base MODEL halves the file")
        )
    off = [layer.name for layer in layers if layer.off]
    if off:
        warnings.append(
            f"alpha is 0 in {count_text(len(off), 'layer')}, first {off[0]}; sd-scripts reads that as full strength"
        )
    coarse = [
        layer.name
        for layer, options, dtype, width in zip(layout.layers, layout.options, layout.dtypes, widths, strict=True)
        if width and dtype != options[0] and layout.dtype not in MIXTURES
    ]
    if coarse:
        warnings.append(
            f"{count_text(len(coarse), 'layer')}, first {coarse[0]}, stay in fp16: their numbers are outside of what "
            "fp8 has more than two digits for"
        )
    dora = sum("magnitude" in layer.keys for layer in layers)
    if dora:
        warnings.append(
            f"DoRA in {count_text(dora, 'layer')}: the errors are those of ΔW, before the magnitude is applied"
        )
    owners: dict[str, str] = {}
    for layer, views in zip(layers, decomposed.views, strict=True):
        first = owners.setdefault(views_id(views), layer.name) if views else layer.name
        if first != layer.name:
            warnings.append(f"{first} and {layer.name} change the same weight of the base")
    return warnings


def uncapped(recipe: Recipe, layout: Layout, facts: Sequence[LayerFacts], widths: Sequence[int]) -> list[str]:
    """Warnings about layers that have no base weight to limit them."""
    warnings = []
    judged = list(zip(layout.layers, facts, widths, strict=True))
    for key in recipe.caps:
        names = [layer.name for layer, of_layer, width in judged if width and not of_layer.base_norm(CAPS[key])]
        if names:
            reason = "they change no weight of the base, or one that is zero"
            warnings.append(f"{key}= does not limit {count_text(len(names), 'layer')}, first {names[0]}: {reason}")
    return warnings


def above_limits(recipe: Recipe, names: Sequence[str]) -> list[str]:
    """A warning that these layers are copied although they are above a limit."""
    if not names:
        return []
    return [
        f"{len(names)} layers, first {names[0]}, are above {' and '.join(f'{key}=' for key in recipe.caps)} but stay "
        "in their own form, where nothing can be limited; use --as lora"
    ]


def grown(layout: Layout, tensors: Mapping[str, TensorInfo]) -> list[str]:
    """A warning that the tensors of the output are larger than its input, and what asks for that."""
    store, recipe = layout.adapter.store, layout.recipe
    after = sum(info.nbytes for info in tensors.values())
    if after <= max(sum(info.nbytes for info in store.tensors.values()), store.nbytes):
        return []
    rounding = [key for key in ("min_rank", "multiple", "pow2", "uniform") if recipe.modifiers.get(key)]
    causes = {
        f"their dtype is {layout.dtype}": layout.dtype != "same",
        "all layers are LoRA": layout.form == "lora",
        f"{' and '.join(rounding)} pad ranks": bool(rounding),
    }
    why = ", ".join(cause for cause, holds in causes.items() if holds) or "the recipe keeps more than the file stores"
    return [f"is larger than its input: {why}"]


def kept_for_diffusers(anchors: Iterable[Anchor]) -> list[str]:
    """What is kept although the recipe would not keep it."""
    return [
        f"{anchor.encoder} keeps the best dimension of a self_attn_out_proj as well: diffusers 0.42 cannot load an "
        "encoder without one"
        for anchor in anchors
    ]


def below_precision(names: Sequence[str]) -> list[str]:
    """A warning that the numbers of these layers are rounded away, which changes the file by nothing to speak of."""
    if not names:
        return []
    return [
        f"{count_text(len(names), 'layer')}, first {names[0]}: so weak beside the others that numbers are below the "
        "precision of the dtype, and are rounded or become 0; -t fp32 or -t bf16 keeps them"
    ]


def unreadable_encoders(layers: Sequence[Layer], removed: Collection[str]) -> list[str]:
    """Warnings about encoders without out_proj: diffusers finds out the kind of keys by it, and refuses the file."""
    encoders: dict[str, list[str]] = {}
    for layer in layers:
        if match := _ENCODER.match(layer.name):
            encoders.setdefault(match[0], []).append(layer.name)
    return [
        f"{encoder} keeps other layers but no self_attn_out_proj, and diffusers 0.42 cannot load such a file. For "
        "diffusers: lorashrink convert --naming diffusers"
        for encoder, names in encoders.items()
        if any(name not in removed for name in names)
        and all(name in removed for name in names if name.endswith("out_proj"))
    ]
