"""Video models and their relatives for pictures: HunyuanVideo, HunyuanImage, Wan, LTX-Video, Cosmos and Anima."""

from __future__ import annotations

from lorashrink.bases.family import ONE_ENCODER, BaseFamily, Header, containers, marks
from lorashrink.bases.flux import ADDED, QKV, SINGLE
from lorashrink.bases.rules import Rule, Rules, below, embedder, parts, rule, sequential, swapped

# --- Hunyuan: the original names (which trainers flatten), diffusers', ComfyUI's; HunyuanImage may be split ---------


def _stream(name: str, diffusers: tuple[str, ...], out: str, mlp: str, norm: str) -> tuple[Rule, ...]:
    return below(
        "double_blocks.{}",
        "transformer_blocks.{}",
        (f"{name}_attn_qkv", diffusers, f"{name}_attn.qkv", tuple(f"{name}_attn_{letter}" for letter in "qkv")),
        (f"{name}_attn_proj", out, f"{name}_attn.proj"),
        (f"{name}_mlp.fc1", f"{mlp}.net.0.proj", f"{name}_mlp.0"),
        (f"{name}_mlp.fc2", f"{mlp}.net.2", f"{name}_mlp.2"),
        (f"{name}_mod.linear", f"{norm}.linear", f"{name}_mod.lin"),
    )


def _two_layers(native: str, diffusers: str) -> tuple[Rule, ...]:
    return tuple(
        rule(f"{native}.mlp.{2 * i}", f"{diffusers}.linear_{i + 1}", f"{native}.{side}_layer")
        for i, side in enumerate(("in", "out"))
    )


_REFINER = "context_embedder.time_text_embed"
_HUNYUAN = (
    *_stream("img", QKV, "attn.to_out.0", "ff", "norm1"),
    *_stream("txt", ADDED, "attn.to_add_out", "ff_context", "norm1_context"),
    *below(
        "single_blocks.{}",
        "single_transformer_blocks.{}",
        ("linear1", SINGLE, parts("linear1_q", "linear1_k", "linear1_v", "linear1_mlp", shares=SINGLE.shares)),
        ("linear2", "proj_out", "linear2.fc"),
        ("modulation.linear", "norm.linear", "modulation.lin"),
    ),
    *below(
        "txt_in.individual_token_refiner.blocks.{}",
        "context_embedder.token_refiner.refiner_blocks.{}",
        ("self_attn_qkv", QKV, "self_attn.qkv"),
        ("self_attn_proj", "attn.to_out.0", "self_attn.proj"),
        ("mlp.fc1", "ff.net.0.proj", "mlp.0"),
        ("mlp.fc2", "ff.net.2", "mlp.2"),
        ("adaLN_modulation.1", "norm_out.linear"),
    ),
    *_two_layers("txt_in.t_embedder", f"{_REFINER}.timestep_embedder"),
    *(
        rule(
            f"txt_in.c_embedder.linear_{number}",
            f"{_REFINER}.text_embedder.linear_{number}",
            f"txt_in.c_embedder.{side}_layer",
        )
        for number, side in ((1, "in"), (2, "out"))
    ),
    rule("txt_in.input_embedder", "context_embedder.proj_in"),
    rule("img_in.proj", "x_embedder.proj"),
    rule("final_layer.linear", "proj_out"),
    rule("final_layer.adaLN_modulation.1", swapped("norm_out.linear")),
)
_HUNYUAN_VIDEO = (
    *_HUNYUAN,
    *_two_layers("time_in", "time_text_embed.timestep_embedder"),
    *_two_layers("guidance_in", "time_text_embed.guidance_embedder"),
    *embedder("vector_in", "time_text_embed.text_embedder"),
)
_HUNYUAN_IMAGE = (
    *_HUNYUAN,
    *_two_layers("time_in", "time_guidance_embed.timestep_embedder"),
    *_two_layers("time_r_in", "time_guidance_embed.timestep_embedder_r"),
    *_two_layers("guidance_in", "time_guidance_embed.guidance_embedder"),
    *(rule(f"byt5_in.fc{number}", f"context_embedder_2.linear_{number}") for number in (1, 2, 3)),
)
_TOKEN_REFINER = "token_refiner.refiner_blocks.0.attn.to_q.weight"


def _is_hunyuan(header: Header) -> bool:
    return (
        header.has(_TOKEN_REFINER)
        or header.has("txt_in.individual_token_refiner.blocks.0.norm1.weight")
        or header.has("double_blocks.0.img_attn_qkv.weight")
        or header.has("double_blocks.0.img_attn_q.weight")
    )


# --- Wan ----------------------------------------------------------------------------------------

_WAN_BLOCK = (
    *(
        (f"{native}.{letter}", f"{diffusers}.{name}")
        for native, diffusers in (("self_attn", "attn1"), ("cross_attn", "attn2"))
        for letter, name in (("q", "to_q"), ("k", "to_k"), ("v", "to_v"), ("o", "to_out.0"))
    ),
    ("cross_attn.k_img", "attn2.add_k_proj"),
    ("cross_attn.v_img", "attn2.add_v_proj"),
    ("ffn.0", "ffn.net.0.proj"),
    ("ffn.2", "ffn.net.2"),
    ("modulation", "scale_shift_table"),
)
_WAN = (
    *below("blocks.{}", "blocks.{}", *_WAN_BLOCK),
    *below("vace_blocks.{}", "vace_blocks.{}", *_WAN_BLOCK, ("before_proj", "proj_in"), ("after_proj", "proj_out")),
    *below(
        "face_adapter.fuser_blocks.{}",
        "face_adapter.{}",
        ("linear1_kv", ("to_k", "to_v")),
        ("linear1_q", "to_q"),
        ("linear2", "to_out"),
    ),
    *sequential("time_embedding", "condition_embedder.time_embedder"),
    *sequential("text_embedding", "condition_embedder.text_embedder"),
    rule("time_projection.1", "condition_embedder.time_proj"),
    rule("img_emb.proj.1", "condition_embedder.image_embedder.ff.net.0.proj"),
    rule("img_emb.proj.3", "condition_embedder.image_embedder.ff.net.2"),
    rule("head.head", "proj_out"),
    rule("head.modulation", "scale_shift_table"),
)

# --- LTX-Video ----------------------------------------------------------------------------------

_LTX = (
    rule("patchify_proj", "proj_in"),
    rule("adaln_single.{}", "time_embed.{}"),
    rule("audio_patchify_proj", "audio_proj_in"),
    rule("audio_adaln_single.{}", "audio_time_embed.{}"),
    rule("av_ca_video_scale_shift_adaln_single.{}", "av_cross_attn_video_scale_shift.{}"),
    rule("av_ca_audio_scale_shift_adaln_single.{}", "av_cross_attn_audio_scale_shift.{}"),
    rule("av_ca_a2v_gate_adaln_single.{}", "av_cross_attn_video_a2v_gate.{}"),
    rule("av_ca_v2a_gate_adaln_single.{}", "av_cross_attn_audio_v2a_gate.{}"),
    *below(
        "transformer_blocks.{}",
        "transformer_blocks.{}",
        ("scale_shift_table_a2v_ca_video", "video_a2v_cross_attn_scale_shift_table"),
        ("scale_shift_table_a2v_ca_audio", "audio_a2v_cross_attn_scale_shift_table"),
    ),
)

# --- Cosmos-Predict2 and Anima; Cosmos 1 has other native names --------------------------------------


def _cosmos_attention(number: int, native: str) -> tuple[tuple[str, str, str], ...]:
    names = (("q_proj", "to_q", "to_q.0"), ("k_proj", "to_k", "to_k.0"), ("v_proj", "to_v", "to_v.0"))
    return tuple(
        (f"{native}.{ours}", f"attn{number}.{theirs}", f"blocks.{number - 1}.block.attn.{first}")
        for ours, theirs, first in (*names, ("output_proj", "to_out.0", "to_out.0"))
    )


_COSMOS_BLOCK = (
    *_cosmos_attention(1, "self_attn"),
    *_cosmos_attention(2, "cross_attn"),
    ("mlp.layer1", "ff.net.0.proj", "blocks.2.block.layer1"),
    ("mlp.layer2", "ff.net.2", "blocks.2.block.layer2"),
    *(
        (
            f"adaln_modulation_{name}.{i}",
            f"norm{number}.linear_{i}",
            f"blocks.{number - 1}.adaLN_modulation.{i}",
        )
        for number, name in ((1, "self_attn"), (2, "cross_attn"), (3, "mlp"))
        for i in (1, 2)
    ),
)
_COSMOS = (
    *(
        rule(f"blocks.{{}}.{ours}", f"transformer_blocks.{{}}.{theirs}", f"blocks.block{{}}.{first}")
        for ours, theirs, first in _COSMOS_BLOCK
    ),
    rule("x_embedder.proj.1", "patch_embed.proj"),
    rule("t_embedder.1.{}", "time_embed.t_embedder.{}"),
    rule("final_layer.linear", "proj_out"),
    *(
        rule(f"final_layer.adaln_modulation.{i}", f"norm_out.linear_{i}", f"final_layer.adaLN_modulation.{i}")
        for i in (1, 2)
    ),
    rule("llm_adapter.{}", "text_conditioner.{}"),
)

FAMILIES = (
    BaseFamily(
        "hunyuan-image",
        "HunyuanImage",
        containers(te1=("text_encoder", "qwen25_7b"), te2=("text_encoder_2", "byt5_small")),
        # Pictures are embedded by a 2-D convolution, videos by a 3-D one.
        lambda header: (
            _is_hunyuan(header)
            and len(header.shape("img_in.proj.weight") or header.shape("x_embedder.proj.weight")) == 4
        ),
        Rules(_HUNYUAN_IMAGE),
        encoders=2,
    ),
    BaseFamily(
        "hunyuan",
        "HunyuanVideo",
        containers(te1=("text_encoder", "llama"), te2=("text_encoder_2", "clip_l")),
        _is_hunyuan,
        Rules(_HUNYUAN_VIDEO),
        encoders=2,
    ),
    BaseFamily(
        "wan",
        "Wan",
        containers(te1=("text_encoder", "umt5xxl")),
        marks(
            ("blocks.0.self_attn.q.weight", "blocks.0.ffn.0.weight"),
            ("blocks.0.attn1.to_q.weight", "blocks.0.ffn.net.0.proj.weight"),
        ),
        Rules(_WAN),
        instead=ONE_ENCODER,
    ),
    BaseFamily(
        "ltxv",
        "LTX-Video",
        containers(te1=("text_encoder", "t5xxl")),
        marks(
            ("patchify_proj.weight", "transformer_blocks.0.attn1.to_q.weight"),
            (
                "proj_in.weight",
                "time_embed.emb.timestep_embedder.linear_1.weight",
                "transformer_blocks.0.attn1.to_q.weight",
            ),
        ),
        Rules(_LTX),
        instead=ONE_ENCODER,
    ),
    BaseFamily(
        "anima",
        "Cosmos or Anima",
        containers(te1=("text_encoder", "qwen3_06b", "t5xxl")),
        marks(
            ("blocks.0.adaln_modulation_self_attn.1.weight",),
            ("blocks.block0.blocks.0.block.attn.to_q.0.weight",),
            ("transformer_blocks.0.norm1.linear_1.weight", "patch_embed.proj.weight"),
        ),
        Rules(_COSMOS),
        instead=ONE_ENCODER,
    ),
)
