"""Text encoders CLIP and T5, on their own; and how the weights of any text encoder are called.

open_clip keeps q, k and v of CLIP as equal thirds, in this order, of the rows of `attn.in_proj_weight`, and the
projection as a bare matrix that multiplies from the right.
"""

from __future__ import annotations

from collections.abc import Callable

from lorashrink.bases import language
from lorashrink.bases.family import BaseFamily, Header, marks
from lorashrink.bases.rules import Rules, rule

# Hugging Face name -> open_clip name
_LAYER = {
    "self_attn.out_proj": "attn.out_proj",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
}
_NAMES = {
    **{f"encoder.layers.{{}}.{ours}": f"transformer.resblocks.{{}}.{theirs}" for ours, theirs in _LAYER.items()},
    "embeddings.token_embedding": "token_embedding",
    "embeddings.position_embedding": "positional_embedding",
    "final_layer_norm": "ln_final",
}
_QKV = tuple(f"encoder.layers.{{}}.self_attn.{letter}_proj" for letter in "qkv")
_WITH_LEVEL = tuple(f"text_model.{name}" for name in _QKV)
# transformers >= 5 drops the level text_model from CLIPTextModel, and some adapters follow it
_CLIP = (
    rule(_WITH_LEVEL, _WITH_LEVEL, _QKV, "transformer.resblocks.{}.attn.in_proj"),
    *(rule(f"text_model.{ours}", f"text_model.{ours}", ours, theirs) for ours, theirs in _NAMES.items()),
)
RULES = Rules((*_CLIP, *language.ENCODER))

# Bare parameters (without `.weight`) that are stored the other way round.
TRANSPOSED = ("text_projection",)

_HUGGING_FACE = "encoder.layers.0.self_attn.q_proj.weight"
_OPEN_CLIP = "transformer.resblocks.0.attn.in_proj_weight"
_WIDTH_OF_G = 1280


def _clip(larger: bool) -> Callable[[Header], bool]:
    """CLIP-G is the second of two text encoders wherever it is used, CLIP-L and CLIP-H are the first or only one."""

    def recognise(header: Header) -> bool:
        shape = header.shape(_HUGGING_FACE) or header.shape(_OPEN_CLIP)
        return bool(shape) and header.has("token_embedding.weight") and (shape[-1] >= _WIDTH_OF_G) == larger

    return recognise


def _where(part: str) -> dict[str, str]:
    return dict.fromkeys(("", "module.", "text_encoder.", "text_encoder_2.", "text_encoder_3."), part)


FAMILIES = (
    BaseFamily("clip-g", "CLIP-G", _where("te2"), _clip(True), encoders=2),
    BaseFamily("clip-l", "CLIP", _where("te1"), _clip(False)),
    BaseFamily(
        "t5",
        "T5",
        _where("te3"),
        marks(("encoder.block.0.layer.0.SelfAttention.q.weight",)),
        encoders=3,
        instead={"te1": "te3", "te2": "te3"},
    ),
)
