"""Transformers for pictures beside FLUX: SD3, AuraFlow, Qwen-Image, Lumina 2, Z-Image, HiDream, PixArt, Sana, ..."""

from __future__ import annotations

from lorashrink.bases.family import ONE_ENCODER, BaseFamily, containers, marks
from lorashrink.bases.flux import ADDED, QKV
from lorashrink.bases.rules import Rules, below, parts, rule, sequential, swapped

_SPLIT = ("to_q", "to_k", "to_v")


def _attention(name: str) -> tuple[str, ...]:
    return tuple(f"{name}.{projection}" for projection in _SPLIT)


# The last block has no use for some of the text's modulation: two rows per input and not six, in the other order.
_SD3 = (
    *below(
        "joint_blocks.{}",
        "transformer_blocks.{}",
        ("x_block.attn.qkv", QKV),
        ("x_block.attn.proj", "attn.to_out.0"),
        ("x_block.attn2.qkv", _attention("attn2")),
        ("x_block.attn2.proj", "attn2.to_out.0"),
        ("x_block.mlp.fc1", "ff.net.0.proj"),
        ("x_block.mlp.fc2", "ff.net.2"),
        ("x_block.adaLN_modulation.1", "norm1.linear"),
        ("context_block.attn.qkv", ADDED),
        ("context_block.attn.proj", "attn.to_add_out"),
        ("context_block.mlp.fc1", "ff_context.net.0.proj"),
        ("context_block.mlp.fc2", "ff_context.net.2"),
        ("context_block.adaLN_modulation.1", swapped("norm1_context.linear")),
    ),
    *sequential("t_embedder.mlp", "time_text_embed.timestep_embedder"),
    *sequential("y_embedder.mlp", "time_text_embed.text_embedder"),
    rule("x_embedder.proj", "pos_embed.proj"),
    rule("pos_embed", "pos_embed.pos_embed"),
    rule("final_layer.linear", "proj_out"),
    rule("final_layer.adaLN_modulation.1", swapped("norm_out.linear")),
)

# Number 1 is the text and 2 the picture, but where there is one stream it has number 1.
_AURAFLOW = (
    *below(
        "double_layers.{}",
        "joint_transformer_blocks.{}",
        *(
            (f"attn.w{number}{letter}", f"attn.{name}")
            for number, names in ((1, (*(name[5:] for name in ADDED), "to_add_out")), (2, (*_SPLIT, "to_out.0")))
            for letter, name in zip("qkvo", names, strict=True)
        ),
        *(
            (f"mlp{side}.{native}", f"{ff}.{diffusers}")
            for side, ff in (("X", "ff"), ("C", "ff_context"))
            for native, diffusers in (("c_fc1", "linear_1"), ("c_fc2", "linear_2"), ("c_proj", "out_projection"))
        ),
        ("modX.1", "norm1.linear"),
        ("modC.1", "norm1_context.linear"),
    ),
    *below(
        "single_layers.{}",
        "single_transformer_blocks.{}",
        *((f"attn.w1{letter}", f"attn.{name}") for letter, name in zip("qkvo", (*_SPLIT, "to_out.0"), strict=True)),
        ("mlp.c_fc1", "ff.linear_1"),
        ("mlp.c_fc2", "ff.linear_2"),
        ("mlp.c_proj", "ff.out_projection"),
        ("modCX.1", "norm1.linear"),
    ),
    *sequential("t_embedder.mlp", "time_step_proj"),
    rule("cond_seq_linear", "context_embedder"),
    rule("init_x_linear", "pos_embed.proj"),
    rule("positional_encoding", "pos_embed.pos_embed"),
    rule("final_linear", "proj_out"),
    rule("modF.1", swapped("norm_out.linear")),
)

_REFINED_BLOCKS = ("layers.{}", "noise_refiner.{}", "context_refiner.{}")
# Lumina 2 has fewer heads for k and v than for q.
_LUMINA2 = (
    *(
        row
        for block in _REFINED_BLOCKS
        for row in below(
            block,
            block,
            ("attention.qkv", parts(*QKV, shares=(1, 0, 0)), _attention("attention")),
            ("attention.out", "attn.to_out.0", "attention.to_out.0"),
            *((f"feed_forward.w{i}", f"feed_forward.linear_{i}") for i in (1, 2, 3)),
            ("adaLN_modulation.1", "norm1.linear"),
        )
    ),
    rule("cap_embedder.{}", "time_caption_embed.caption_embedder.{}"),
    *sequential("t_embedder.mlp", "time_caption_embed.timestep_embedder"),
    rule("final_layer.adaLN_modulation.1", "norm_out.linear_1"),
    rule("final_layer.linear", "norm_out.linear_2"),
)
_Z_IMAGE = (
    *(
        row
        for block in _REFINED_BLOCKS
        for row in below(
            block, block, ("attention.qkv", _attention("attention")), ("attention.out", "attention.to_out.0")
        )
    ),
    rule("x_embedder", "all_x_embedder.2-1"),
    rule("final_layer.{}", "all_final_layer.2-1.{}"),
)

_PIXART = (
    *below(
        "blocks.{}",
        "transformer_blocks.{}",
        ("attn.qkv", _attention("attn1")),
        ("attn.proj", "attn1.to_out.0"),
        ("cross_attn.q_linear", "attn2.to_q"),
        ("cross_attn.kv_linear", ("attn2.to_k", "attn2.to_v")),
        ("cross_attn.proj", "attn2.to_out.0"),
        ("mlp.fc1", "ff.net.0.proj"),
        ("mlp.fc2", "ff.net.2"),
        ("mlp.inverted_conv.conv", "ff.conv_inverted"),
        ("mlp.depth_conv.conv", "ff.conv_depth"),
        ("mlp.point_conv.conv", "ff.conv_point"),
        ("scale_shift_table", "scale_shift_table"),
    ),
    rule("y_embedder.y_proj.fc1", "caption_projection.linear_1"),
    rule("y_embedder.y_proj.fc2", "caption_projection.linear_2"),
    rule("final_layer.linear", "proj_out"),
    rule("final_layer.scale_shift_table", "scale_shift_table"),
)
_SANA = (
    *_PIXART,
    rule("x_embedder.proj", "patch_embed.proj"),
    *sequential("t_embedder.mlp", "time_embed.emb.timestep_embedder"),
    rule("t_block.1", "time_embed.linear"),
)
_PIXART_ONLY = (
    *_PIXART,
    rule("x_embedder.proj", "pos_embed.proj"),
    *sequential("t_embedder.mlp", "adaln_single.emb.timestep_embedder"),
    *sequential("csize_embedder.mlp", "adaln_single.emb.resolution_embedder"),
    *sequential("ar_embedder.mlp", "adaln_single.emb.aspect_ratio_embedder"),
    rule("t_block.1", "adaln_single.linear"),
)
_HUNYUAN_DIT = (
    *below(
        "blocks.{}",
        "blocks.{}",
        ("attn1.Wqkv", _attention("attn1")),
        ("attn1.out_proj", "attn1.to_out.0"),
        ("attn2.q_proj", "attn2.to_q"),
        ("attn2.kv_proj", ("attn2.to_k", "attn2.to_v")),
        ("attn2.out_proj", "attn2.to_out.0"),
        ("mlp.fc1", "ff.net.0.proj"),
        ("mlp.fc2", "ff.net.2"),
        ("default_modulation.1", "norm1.linear"),
    ),
    rule("x_embedder.proj", "pos_embed.proj"),
    *sequential("t_embedder.mlp", "time_extra_emb.timestep_embedder"),
    *sequential("extra_embedder", "time_extra_emb.extra_embedder"),
    rule("pooler.{}", "time_extra_emb.pooler.{}"),
    *sequential("mlp_t5", "text_embedder"),
    rule("final_layer.linear", "proj_out"),
    rule("final_layer.adaLN_modulation.1", swapped("norm_out.linear")),
)

_KREA2_BLOCK = (
    *(
        (f"attn.{native}", f"attn.{diffusers}")
        for native, diffusers in (
            ("wq", "to_q"),
            ("wk", "to_k"),
            ("wv", "to_v"),
            ("wo", "to_out.0"),
            ("gate", "to_gate"),
        )
    ),
    *((f"mlp.{name}", f"ff.{name}") for name in ("gate", "up", "down")),
)
_KREA2 = (
    *below("blocks.{}", "transformer_blocks.{}", *_KREA2_BLOCK),
    *(
        row
        for name in ("layerwise_blocks", "refiner_blocks")
        for row in below(f"txtfusion.{name}.{{}}", f"text_fusion.{name}.{{}}", *_KREA2_BLOCK)
    ),
    rule("txtfusion.projector", "text_fusion.projector"),
    rule("first", "img_in"),
    rule("last.linear", "final_layer.linear"),
    rule("last.modulation.lin", "final_layer.scale_shift_table"),
    rule("tproj.1", "time_mod_proj"),
    *sequential("tmlp", "time_embed"),
    rule("txtmlp.1", "txt_in.linear_1"),
    rule("txtmlp.3", "txt_in.linear_2"),
)

FAMILIES = (
    BaseFamily(
        "sd3",
        "SD 3",
        containers(te1=("text_encoder", "clip_l"), te2=("text_encoder_2", "clip_g"), te3=("text_encoder_3", "t5xxl")),
        marks(
            ("joint_blocks.0.context_block.attn.qkv.weight",),
            (
                "pos_embed.proj.weight",
                "transformer_blocks.0.attn.add_q_proj.weight",
                "transformer_blocks.0.norm1_context.linear.weight",
            ),
        ),
        Rules(_SD3),
        encoders=3,
    ),
    BaseFamily(
        "qwen-image",
        "Qwen-Image",
        containers(te1=("text_encoder", "qwen25_7b")),
        marks(("transformer_blocks.0.img_mod.1.weight",)),
        instead=ONE_ENCODER,
    ),
    BaseFamily(
        "auraflow",
        "AuraFlow",
        containers(te1=("text_encoder", "pile_t5xl")),
        marks(("double_layers.0.attn.w2q.weight",), ("joint_transformer_blocks.0.attn.to_q.weight",)),
        Rules(_AURAFLOW),
        instead=ONE_ENCODER,
    ),
    BaseFamily(
        "hidream",
        "HiDream",
        containers(
            te1=("text_encoder", "clip_l"),
            te2=("text_encoder_2", "clip_g"),
            te3=("text_encoder_3", "t5xxl"),
            te4=("text_encoder_4", "llama"),
        ),
        marks(("double_stream_blocks.0.block.attn1.to_q.weight",)),
        encoders=4,
    ),
    BaseFamily(
        "z-image",
        "Z-Image",
        containers(te1=("text_encoder", "qwen3_4b")),
        marks(("layers.0.adaLN_modulation.0.weight", "layers.0.feed_forward.w1.weight")),
        Rules(_Z_IMAGE),
        instead=ONE_ENCODER,
    ),
    BaseFamily(
        "lumina2",
        "Lumina 2",
        containers(te1=("text_encoder", "gemma2_2b")),
        marks(
            ("layers.0.adaLN_modulation.1.weight", "layers.0.attention.qkv.weight"),
            ("layers.0.norm1.linear.weight", "layers.0.feed_forward.linear_1.weight"),
        ),
        Rules(_LUMINA2),
        instead=ONE_ENCODER,
    ),
    BaseFamily(
        "krea2",
        "Krea 2",
        containers(te1=("text_encoder",)),
        marks(
            ("blocks.0.attn.wq.weight", "blocks.0.attn.gate.weight"),
            ("transformer_blocks.0.attn.to_q.weight", "transformer_blocks.0.attn.to_gate.weight"),
        ),
        Rules(_KREA2),
        instead=ONE_ENCODER,
    ),
    BaseFamily(
        "sana",
        "Sana",
        containers(te1=("text_encoder", "gemma2_2b")),
        marks(("blocks.0.mlp.inverted_conv.conv.weight",), ("transformer_blocks.0.ff.conv_inverted.weight",)),
        Rules(_SANA),
        instead=ONE_ENCODER,
    ),
    BaseFamily(
        "pixart",
        "PixArt",
        containers(te1=("text_encoder", "t5xxl")),
        marks(
            ("blocks.0.cross_attn.kv_linear.weight",),
            ("adaln_single.linear.weight", "pos_embed.proj.weight", "transformer_blocks.0.attn1.to_q.weight"),
        ),
        Rules(_PIXART_ONLY),
        instead=ONE_ENCODER,
    ),
    BaseFamily(
        "hunyuan-dit",
        "HunyuanDiT",
        containers(te1=("text_encoder", "clip"), te2=("text_encoder_2", "t5")),
        marks(
            ("blocks.0.attn1.Wqkv.weight",),
            ("blocks.0.attn1.to_q.weight", "blocks.0.ff.net.0.proj.weight"),
        ),
        Rules(_HUNYUAN_DIT),
        encoders=2,
    ),
)
