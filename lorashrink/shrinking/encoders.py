"""Text encoders in kohya's names, which diffusers 0.42 reads only with a `self_attn_out_proj` among their layers.

It finds out the kind of keys by that name. Where a recipe keeps other layers of an encoder and no out_proj, the best
dimension of the best out_proj is kept too.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from lorashrink.adapters import Layer
from lorashrink.recipes.grammar import Recipe

_ENCODER = re.compile(r"lora_te\d?(?=_text_model_encoder_layers_)")


@dataclass(frozen=True, slots=True)
class Anchor:
    """The layer that makes an encoder readable. Positions are indices into the layers that a recipe judges."""

    encoder: str
    position: int
    projections: tuple[int, ...]  # all out_proj of the encoder
    copied: bool  # layers of the encoder are in the output whatever the recipe keeps
    others: tuple[int, ...]

    def missing(self, widths: Sequence[int]) -> bool:
        """Whether these ranks leave the encoder without an out_proj."""
        needed = self.copied or any(widths[position] for position in self.others)
        return needed and not any(widths[position] for position in self.projections)


def anchors(layers: Sequence[Layer], best: Sequence[float], copied: Collection[str]) -> list[Anchor]:
    """One for each encoder that has an out_proj only among the judged layers.

    best: per layer the score of its best dimension. copied: the keys that are copied.
    """
    encoders: dict[str, list[int]] = {}
    for position, layer in enumerate(layers):
        if match := _ENCODER.match(layer.name):
            encoders.setdefault(match[0], []).append(position)
    result = []
    for encoder, positions in encoders.items():
        projections = tuple(position for position in positions if layers[position].name.endswith("out_proj"))
        inside = [key for key in copied if key.startswith(f"{encoder}_")]
        if projections and not any("out_proj" in key for key in inside):
            others = tuple(position for position in positions if position not in projections)
            chosen = max(projections, key=lambda position: best[position])
            result.append(Anchor(encoder, chosen, projections, bool(inside), others))
    return result


def readable(recipe: Recipe, missing: Sequence[Anchor], widths: Sequence[int]) -> list[int]:
    """The ranks with an out_proj for each encoder that has none."""
    result = list(widths)
    for anchor in missing:
        if anchor.missing(widths):
            result[anchor.position] = max(widths) if recipe.uniform and any(widths) else recipe.rounded_rank(1)
    return result
