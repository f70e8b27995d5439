"""What the name of a layer tells."""

import fixtures
import pytest

from lorashrink.bases import open_base
from lorashrink.names import PREFIXES, address, block, kind, naming

ADDRESSES = [
    ("lora_unet_input_blocks_4_1_proj_in", "unet", "input_blocks_4_1_proj_in"),
    ("lora_unet__input_blocks_4_1_proj_in", "unet", "input_blocks_4_1_proj_in"),
    ("lora_te_text_model_encoder_layers_3_mlp_fc1", "te1", "text_model_encoder_layers_3_mlp_fc1"),
    ("lora_te1_text_model_encoder_layers_3_mlp_fc1", "te1", "text_model_encoder_layers_3_mlp_fc1"),
    ("lora_te2_text_model_encoder_layers_3_mlp_fc1", "te2", "text_model_encoder_layers_3_mlp_fc1"),
    ("lora_te3_encoder_block_0_layer_0_SelfAttention_q", "te3", "encoder_block_0_layer_0_SelfAttention_q"),
    ("unet.mid_block.attentions.0.proj_in", "unet", "mid_block_attentions_0_proj_in"),
    ("text_encoder.text_model.encoder.layers.0.mlp.fc2", "te1", "text_model_encoder_layers_0_mlp_fc2"),
    ("text_encoder_2.text_model.encoder.layers.0.mlp.fc2", "te2", "text_model_encoder_layers_0_mlp_fc2"),
    ("text_encoder_3.encoder.block.0.layer.0.SelfAttention.q", "te3", "encoder_block_0_layer_0_SelfAttention_q"),
    ("base_model.model.mid_block.attentions.0.proj_in", "", "mid_block_attentions_0_proj_in"),
    ("base_model.model.base_model.model.unet.conv_in", "unet", "conv_in"),
    ("unet.base_model.model.conv_in", "unet", "conv_in"),
    ("mid_block.attentions.0.proj_in", "", "mid_block_attentions_0_proj_in"),
    ("unet.a.attn1.processor.to_q", "unet", "a_attn1_to_q"),
    ("unet.a.attn1.processor.to_out", "unet", "a_attn1_to_out_0"),
    ("unet.a.attn1.to_out", "unet", "a_attn1_to_out_0"),
    ("unet.a.attn1.to_out.0", "unet", "a_attn1_to_out_0"),
    ("lora_unet_a_attn1_to_out", "unet", "a_attn1_to_out_0"),
    ("lora_unet_a_attn1_to_out_0", "unet", "a_attn1_to_out_0"),
    ("diffusion_model.double_blocks.0.img_attn.qkv", "unet", "double_blocks_0_img_attn_qkv"),
    ("model.diffusion_model.double_blocks.0.img_attn.qkv", "unet", "double_blocks_0_img_attn_qkv"),
    ("transformer.transformer_blocks.0.attn.to_q", "unet", "transformer_blocks_0_attn_to_q"),
    ("transformer.base_model.model.transformer_blocks.0.attn.to_q", "unet", "transformer_blocks_0_attn_to_q"),
    ("lora_transformer_transformer_blocks_0_attn_to_q", "unet", "transformer_blocks_0_attn_to_q"),
    ("lycoris_transformer_blocks_0_attn_to_q", "", "transformer_blocks_0_attn_to_q"),
    ("oft_unet_input_blocks_4_1_proj_in", "unet", "input_blocks_4_1_proj_in"),
    ("lora_prior_unet_down_blocks_0_2_attention_to_q", "unet", "down_blocks_0_2_attention_to_q"),
    ("lora_prior_te_text_model_encoder_layers_3_mlp_fc1", "te1", "text_model_encoder_layers_3_mlp_fc1"),
    ("prior.down_blocks.0.2.attention.to_q", "unet", "down_blocks_0_2_attention_to_q"),
    ("text_encoder_4.model.layers.0.mlp.up_proj", "te4", "model_layers_0_mlp_up_proj"),
    ("text_encoders.clip_l.transformer.text_model.encoder.layers.0.mlp.fc1", "te1",
     "text_model_encoder_layers_0_mlp_fc1"),
    ("text_encoders.clip_g.transformer.text_model.encoder.layers.0.mlp.fc1", "te2",
     "text_model_encoder_layers_0_mlp_fc1"),
    ("text_encoders.t5xxl.transformer.encoder.block.0.layer.0.SelfAttention.q", "te3",
     "encoder_block_0_layer_0_SelfAttention_q"),
    ("text_encoders.qwen3_06b.transformer.model.layers.0.mlp.up_proj", "te1", "model_layers_0_mlp_up_proj"),
    ("base_model.model.model.layers.0.mlp.up_proj", "", "model_layers_0_mlp_up_proj"),
    ("base_model.model.transformer.h.0.attn.c_attn", "unet", "h_0_attn_c_attn"),
    ("double_blocks.0.processor.qkv_lora1", "", "double_blocks_0_qkv_lora1"),
    ("diffusion_model.sformer_blocks.0.attn.to_q", "unet", "transformer_blocks_0_attn_to_q"),
    ("module.diffusion_model.blocks.0.ffn.0", "unet", "blocks_0_ffn_0"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "part", "module"), ADDRESSES, ids=[name for name, _, _ in ADDRESSES])
def test_a_layer_name_is_split_into_part_and_module(name, part, module):
    assert address(name) == (part, module)


def test_no_prefix_hides_a_longer_one():
    prefixes = [prefix for prefix, _ in PREFIXES]
    hidden = [
        (earlier, later)
        for index, earlier in enumerate(prefixes)
        for later in prefixes[index + 1 :]
        if later.startswith(earlier)
    ]
    assert hidden == []


# How the lists call a naming, where it is one of these under another name, and what has no prefix at all.
NAMINGS = {"musubi": "kohya", "ai-toolkit": "comfy", "diffusion-pipe": "diffusers"}
NAMINGS |= dict.fromkeys(("simpletuner", "xlabs", "bfl-control"), "other")
OTHERWISE = {
    "anima_lora_peft_diffusion_model": "comfy",
    "qwen_image_lora_diffusers_downup": "other",
    "qwen_image_lora_peft_default": "other",
}


@pytest.mark.parametrize("adapter", fixtures.ALL_ADAPTERS)
def test_the_naming_of_a_listed_adapter_is_told(adapter):
    listed = fixtures.about(adapter)["naming"]
    assert naming(fixtures.module_names(adapter)) == OTHERWISE.get(adapter, NAMINGS.get(listed, listed))


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["base_model.model.layers.0.q_proj"], "peft"),
        (["base_model.model.unet.conv_in"], "peft"),
        (["text_encoder_2.text_model.encoder.layers.0.mlp.fc1"], "diffusers"),
        (["transformer.blocks.0.attn1.to_q"], "diffusers"),
        (["prior.down_blocks.0.2.attention.to_q"], "diffusers"),
        (["lora_transformer_blocks_0_attn1_to_q"], "kohya"),
        (["oft_unet_input_blocks_4_1_proj_in"], "kohya"),
        (["text_encoders.clip_l.transformer.x", "diffusion_model.y"], "comfy"),
        (["double_blocks.0.img_attn.qkv"], "other"),
        (["lycoris_transformer_blocks_0_attn_to_q"], "other"),
        ([], "other"),
    ],
    ids=[
        "peft",
        "peft around diffusers",
        "text encoder alone",
        "transformer",
        "prior",
        "OneTrainer",
        "OFT",
        "ComfyUI",
        "no prefix",
        "LyCORIS",
        "nothing",
    ],
)
def test_the_naming_of_layers_is_told(names, expected):
    assert naming(names) == expected


BLOCKS = [
    ("lora_unet_input_blocks_4_1_proj_in", "IN04"),
    ("lora_unet_input_blocks_10_0_in_layers_2", "IN10"),
    ("lora_unet_middle_block_1_transformer_blocks_9_ff_net_2", "MID"),
    ("lora_unet_output_blocks_0_1_proj_out", "OUT00"),
    ("lora_unet_output_blocks_2_2_conv", "OUT02"),
    ("unet.down_blocks.1.attentions.0.proj_in", "IN04"),
    ("unet.down_blocks.0.resnets.1.conv1", "IN02"),
    ("unet.down_blocks.0.downsamplers.0.conv", "IN03"),
    ("unet.mid_block.resnets.1.conv2", "MID"),
    ("unet.up_blocks.2.resnets.1.conv_shortcut", "OUT07"),
    ("unet.up_blocks.0.upsamplers.0.conv", "OUT02"),
    ("lora_unet_up_blocks_1_attentions_2_transformer_blocks_0_attn1_to_q", "OUT05"),
    ("lora_te_text_model_encoder_layers_11_mlp_fc1", "TE1.11"),
    ("lora_te2_text_model_encoder_layers_31_mlp_fc1", "TE2.31"),
    ("lora_te2_transformer_resblocks_31_mlp_c_fc", "TE2.31"),
    ("text_encoder_2.text_projection", "TE2"),
    ("lora_unet_time_embed_0", "other"),
    ("lora_unet_out_2", "other"),
    ("lora_unet_double_blocks_7_img_attn_qkv", "D07"),
    ("transformer.joint_transformer_blocks.3.attn.to_q", "D03"),
    ("lora_unet_joint_blocks_23_x_block_attn_qkv", "D23"),
    ("diffusion_model.double_stream_blocks.15.block.attn1.to_q", "D15"),
    ("transformer.single_transformer_blocks.12.proj_out", "S12"),
    ("lora_unet_single_blocks_37_linear1", "S37"),
    ("transformer.transformer_blocks.5.attn.to_q", "L05"),
    ("lora_unet_blocks_29_ffn_0", "L29"),
    ("diffusion_model.layers.5.attention.to_q", "L05"),
    ("base_model.model.model.layers.5.mlp.up_proj", "L05"),
    ("base_model.model.model.language_model.layers.5.mlp.up_proj", "L05"),
    ("base_model.model.transformer.h.5.attn.c_attn", "L05"),
    ("diffusion_model.context_refiner.0.attention.to_q", "other"),
    ("lora_te3_encoder_block_23_layer_0_SelfAttention_q", "TE3.23"),
    ("lora_te_layers_5_mlp_up_proj", "TE1.05"),
]


@pytest.mark.parametrize(("name", "expected"), BLOCKS, ids=[name for name, _ in BLOCKS])
def test_the_block_of_a_layer(name, expected):
    assert block(name) == expected


KINDS = [
    ("lora_te1_text_model_encoder_layers_0_self_attn_q_proj", (768, 768), "te"),
    ("lora_unet_input_blocks_1_0_in_layers_2", (320, 320, 3, 3), "conv"),
    ("lora_unet_input_blocks_4_1_transformer_blocks_0_attn2_to_k", (640, 2048), "attn"),
    ("lora_unet_input_blocks_4_1_transformer_blocks_0_ff_net_0_proj", (5120, 640), "mlp"),
    ("lora_unet_input_blocks_4_1_proj_in", (640, 640), "proj"),
    ("lora_unet_down_blocks_0_attentions_0_proj_in", (320, 320, 1, 1), "proj"),
    ("lora_unet_input_blocks_1_0_emb_layers_1", (320, 1280), "time"),
    ("unet.down_blocks.0.resnets.0.time_emb_proj", (320, 1280), "time"),
    ("unet.up_blocks.0.resnets.0.conv_shortcut", (1280, 2560, 1, 1), "other"),
    ("lora_unet_double_blocks_0_img_attn_qkv", (9216, 3072), "attn"),
    ("lora_unet_double_blocks_0_txt_mlp_2", (3072, 12288), "mlp"),
    ("lora_unet_double_blocks_0_img_mod_lin", (18432, 3072), "mod"),
    ("transformer.transformer_blocks.0.norm1_context.linear", (18432, 3072), "mod"),
    ("transformer.transformer_blocks.0.img_mod.1", (18432, 3072), "mod"),
    ("transformer.single_transformer_blocks.0.norm.linear", (9216, 3072), "mod"),
    ("diffusion_model.layers.0.adaLN_modulation.0", (15360, 256), "mod"),
    ("lora_unet_single_blocks_0_linear1", (21504, 3072), "attn"),
    ("lora_unet_single_blocks_0_linear2", (3072, 15360), "proj"),
    ("transformer.single_transformer_blocks.0.proj_mlp", (12288, 3072), "mlp"),
    ("transformer.single_transformer_blocks.0.proj_out", (3072, 15360), "proj"),
    ("diffusion_model.layers.0.attention.out", (3840, 3840), "attn"),
    ("diffusion_model.layers.0.feed_forward.w1", (10240, 3840), "mlp"),
    ("diffusion_model.blocks.0.ffn.0", (8960, 1536), "mlp"),
    ("diffusion_model.blocks.0.cross_attn.k_img", (1536, 1536), "attn"),
    ("transformer.patch_embedding", (1536, 16, 1, 2, 2), "conv"),
    ("base_model.model.model.layers.0.self_attn.q_proj", (2048, 2048), "attn"),
    ("base_model.model.model.layers.0.mlp.up_proj", (8192, 2048), "mlp"),
    ("base_model.model.model.embed_tokens", (128256, 2048), "other"),
    ("base_model.model.lm_head", (128256, 2048), "other"),
    ("lora_te3_encoder_block_0_layer_1_DenseReluDense_wo", (4096, 10240), "te"),
]


@pytest.mark.parametrize(("name", "shape", "expected"), KINDS, ids=[name for name, _, _ in KINDS])
def test_the_kind_of_a_layer(name, shape, expected):
    assert kind(name, shape) == expected


@pytest.mark.parametrize("family", ["sdxl", "sd15", "sd2"])
def test_block_and_kind_do_not_depend_on_the_layout(family, tmp_path):
    path = fixtures.write_base(tmp_path, f"{family} UNet in LDM names")
    with open_base(path) as base:
        answers = {}
        for (part, name), views in base.weights.items():
            layer = f"lora_{part}_{name}"
            answers.setdefault(views[0].key, set()).add((block(layer), kind(layer, views[0].shape)))
    assert {key: pairs for key, pairs in answers.items() if len(pairs) > 1} == {}
