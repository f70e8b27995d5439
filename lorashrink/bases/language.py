"""Language models, as bases and as text encoders.

Their own names are those that PEFT adapters use, but the levels above the layers differ: with a head or without, alone
or inside of a model that sees images too, in transformers before and since 4.52. GPT-2 stores what its `Conv1D`
layers hold as [in, out].
"""

from __future__ import annotations

from lorashrink.bases.family import BaseFamily, marks
from lorashrink.bases.rules import Rules, adapter_only, rule, same

_ABOVE = ("model.", "model.language_model.", "language_model.", "language_model.model.")


def _levels(name: str) -> tuple[str, ...]:
    return tuple(level + name for level in _ABOVE)


# As part of another model the level above is left out.
ENCODER = (
    rule("layers.{}", "layers.{}", *_levels("layers.{}")),
    rule("embed_tokens", "embed_tokens", *_levels("embed_tokens")),
    rule("visual.{}", "visual.{}", "model.visual.{}"),
)
_LANGUAGE = (
    same(*_levels("layers.{}"), "layers.{}"),
    same(*_levels("embed_tokens"), "embed_tokens", adapter_only("lm_head")),  # a file with a tied head does not hold it
    same("visual.{}", "model.visual.{}"),
)
_GPT2 = (
    same("transformer.h.{}", "h.{}"),
    same("transformer.wte", "wte", adapter_only("lm_head")),
    same("transformer.wpe", "wpe"),
)
_CONV1D = ("c_attn", "c_proj", "c_fc", "q_attn")
_WHERE = {"": "unet", "module.": "unet"}


FAMILIES = (
    BaseFamily(
        "gpt2",
        "GPT-2",
        _WHERE,
        # Others with the same names have linear layers, and GGUF files have them the usual way round.
        lambda header: len(shape := header.shape("h.0.attn.c_attn.weight")) == 2 and shape[1] == 3 * shape[0],
        Rules(_GPT2),
        denoiser="",
        encoders=0,
        transposed=tuple(f".{name}" for name in _CONV1D),
    ),
    BaseFamily(
        "llm",
        "a language model",
        _WHERE,
        marks(
            ("layers.0.self_attn.q_proj.weight",),
            ("layers.0.self_attn.qkv_proj.weight",),
            ("layers.0.self_attn.o_proj.weight",),
            ("layers.0.mlp.down_proj.weight",),
            ("layers.0.attention.query_key_value.weight",),
            ("h.0.self_attention.query_key_value.weight",),
            ("h.0.attn.q_proj.weight",),
            ("h.0.attn.c_attn.weight",),
        ),
        Rules((*_LANGUAGE, *_GPT2)),
        denoiser="",
        encoders=0,
        instead={"te1": "unet"},
    ),
)
