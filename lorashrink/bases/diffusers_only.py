"""Models that are at hand under diffusers' names alone; adapters have the same names.

Source: `transformer_*.py` of diffusers 0.42. LTX-2 is a larger LTX-Video, and stands there.
"""

from __future__ import annotations

from lorashrink.bases.family import ONE_ENCODER, BaseFamily, containers, marks

FAMILIES = tuple(
    BaseFamily(name, title, containers(te1=("text_encoder",)), marks(endings), instead=ONE_ENCODER)
    for name, title, endings in (
        ("minimax-h3", "MiniMax-H3", ("transformer_blocks.0.adaln_proj.linear.weight", "context_embedder.weight")),
        ("ideogram4", "Ideogram 4", ("layers.0.adaln_modulation.weight", "llm_cond_proj.weight")),
        ("flux3", "FLUX.3", ("mode_blocks.image.0.attn.to_q.weight",)),
        ("ernie-image", "ERNIE-Image", ("layers.0.self_attention.to_q.weight", "layers.0.mlp.linear_fc2.weight")),
        ("ace-step", "ACE-Step", ("layers.0.self_attn.to_q.weight", "layers.0.cross_attn.to_q.weight")),
    )
)
