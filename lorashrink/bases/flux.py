"""FLUX.1, Chroma and FLUX.2: blocks of two streams, then of one, whose q, k and v are fused natively.

Rows of `linear1` are q, k, v and the first layer of the MLP, which diffusers splits, except in FLUX.2.
"""

from __future__ import annotations

from lorashrink.bases.family import ONE_ENCODER, BaseFamily, containers, marks
from lorashrink.bases.rules import Rules, adapter_only, below, embedder, parts, rule, swapped

QKV = ("attn.to_q", "attn.to_k", "attn.to_v")
ADDED = ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj")
SINGLE = parts(*QKV, "proj_mlp", shares=(1, 1, 1, 0))

_FINAL = (
    rule("final_layer.linear", "proj_out"),
    rule("final_layer.adaLN_modulation.1", swapped("norm_out.linear")),
)
_OUTER = (rule("img_in", "x_embedder"), rule("txt_in", "context_embedder"), *_FINAL)
# XLabs names the processors of the blocks: 1 is the picture's stream, 2 the text's.
_DOUBLE = below(
    "double_blocks.{}",
    "transformer_blocks.{}",
    ("img_attn.qkv", QKV, adapter_only("qkv_lora1")),
    ("txt_attn.qkv", ADDED, adapter_only("qkv_lora2")),
    ("img_attn.proj", "attn.to_out.0", adapter_only("proj_lora1")),
    ("txt_attn.proj", "attn.to_add_out", adapter_only("proj_lora2")),
)
_FLUX1 = (
    *_OUTER,
    *_DOUBLE,
    *below(
        "double_blocks.{}",
        "transformer_blocks.{}",
        ("img_mlp.0", "ff.net.0.proj"),
        ("img_mlp.2", "ff.net.2"),
        ("txt_mlp.0", "ff_context.net.0.proj"),
        ("txt_mlp.2", "ff_context.net.2"),
        ("img_mod.lin", "norm1.linear"),
        ("txt_mod.lin", "norm1_context.linear"),
    ),
    *below(
        "single_blocks.{}",
        "single_transformer_blocks.{}",
        ("linear1", SINGLE, adapter_only("qkv_lora", "", shares=(3, 0))),
        ("linear2", "proj_out", adapter_only("proj_lora")),
        ("modulation.lin", "norm.linear"),
    ),
    *embedder("time_in", "time_text_embed.timestep_embedder"),
    *embedder("guidance_in", "time_text_embed.guidance_embedder"),
    *embedder("vector_in", "time_text_embed.text_embedder"),
)
_CHROMA = (
    *_FLUX1,
    *below(
        "distilled_guidance_layer.layers.{}",
        "distilled_guidance_layer.layers.{}",
        ("in_layer", "linear_1"),
        ("out_layer", "linear_2"),
    ),
)
_FLUX2 = (
    *_OUTER,
    *_DOUBLE,
    *below(
        "double_blocks.{}",
        "transformer_blocks.{}",
        ("img_mlp.0", "ff.linear_in"),
        ("img_mlp.2", "ff.linear_out"),
        ("txt_mlp.0", "ff_context.linear_in"),
        ("txt_mlp.2", "ff_context.linear_out"),
    ),
    *below(
        "single_blocks.{}",
        "single_transformer_blocks.{}",
        ("linear1", "attn.to_qkv_mlp_proj"),
        ("linear2", "attn.to_out"),
    ),
    *(
        rule(f"{name}.lin", f"{name}.linear")
        for name in ("double_stream_modulation_img", "double_stream_modulation_txt", "single_stream_modulation")
    ),
    *embedder("time_in", "time_guidance_embed.timestep_embedder"),
    *embedder("guidance_in", "time_guidance_embed.guidance_embedder"),
)

FAMILIES = (
    BaseFamily(
        "flux2",
        "FLUX.2",
        containers(te1=("text_encoder",)),
        marks(("double_stream_modulation_img.lin.weight",), ("double_stream_modulation_img.linear.weight",)),
        Rules(_FLUX2),
        instead=ONE_ENCODER,
    ),
    BaseFamily(
        "chroma",
        "Chroma",
        containers(te1=("text_encoder", "t5xxl")),
        marks(("distilled_guidance_layer.in_proj.weight",)),
        Rules(_CHROMA),
        instead=ONE_ENCODER,
    ),
    BaseFamily(
        "flux",
        "FLUX.1",
        # sd-scripts numbers T5 as in SD3, so there is no second encoder; others count it as the second
        containers(te1=("text_encoder", "clip_l"), te3=("text_encoder_2", "t5xxl")),
        marks(
            ("double_blocks.0.img_attn.qkv.weight", "double_blocks.0.img_mlp.0.weight"),
            ("single_transformer_blocks.0.proj_mlp.weight", "transformer_blocks.0.attn.add_q_proj.weight"),
        ),
        Rules(_FLUX1),
        encoders=3,
        instead={"te2": "te3"},
    ),
)
