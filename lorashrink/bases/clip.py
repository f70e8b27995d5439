"""CLIP text encoders: Hugging Face names against open_clip's, whose attention is fused.

open_clip keeps q, k and v as equal thirds, in this order, of the rows of `attn.in_proj_weight`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

_LAYER = re.compile(r"^transformer\.resblocks\.(\d+)\.(.+)$")
_HF_LAYER = re.compile(r"^(?:text_model\.)?encoder\.layers\.(\d+)\.(.+)$")
_INNER = {
    "attn.out_proj": "self_attn.out_proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
}
_OUTER = {
    "token_embedding": "text_model.embeddings.token_embedding",
    "positional_embedding": "text_model.embeddings.position_embedding",
    "ln_final": "text_model.final_layer_norm",
    "text_projection": "text_projection",
}
FUSED = "attn.in_proj"
THIRDS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")


def aliases(module: str) -> Iterator[str]:
    """Every name of the module, its own first; names of thirds and of fused modules are not among them."""
    yield module
    if found := _LAYER.match(module):
        if found[2] in _INNER:
            yield from _layer_names(found[1], _INNER[found[2]])
    elif found := _HF_LAYER.match(module):
        yield from _layer_names(found[1], found[2])
        for open_clip, hugging_face in _INNER.items():
            if found[2] == hugging_face:
                yield f"transformer.resblocks.{found[1]}.{open_clip}"
    elif module in _OUTER:
        yield _OUTER[module]
    else:
        for open_clip, hugging_face in _OUTER.items():
            if module in (hugging_face, hugging_face.removeprefix("text_model.")):
                yield hugging_face
                yield open_clip


def _layer_names(number: str, inner: str) -> Iterator[str]:
    # transformers >= 5 drops this level from CLIPTextModel, and some adapters follow it
    for level in ("text_model.", ""):
        yield f"{level}encoder.layers.{number}.{inner}"


def thirds(module: str) -> Iterator[tuple[int, str]]:
    """(0, 1 or 2, a name of q, k or v) of a fused open_clip attention, nothing if the module is something else."""
    found = _LAYER.match(module)
    if found and found[2] == FUSED:
        for number, third in enumerate(THIRDS):
            for name in _layer_names(found[1], third):
                yield number, name


def fused(module: str) -> str | None:
    """The name of the fused attention that begins with this q projection, None if it is something else."""
    found = _HF_LAYER.match(module)
    if not found or found[2] != THIRDS[0]:
        return None
    return f"transformer.resblocks.{found[1]}.{FUSED}"
