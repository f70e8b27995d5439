"""Tiny models of every kind that pictures are drawn with, LoRAs for them, and a tiny CLIP; all weights are noise."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import tiny_sdxl
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from fixtures import write_tensors
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    PreTrainedTokenizerFast,
    T5Config,
    T5EncoderModel,
)

import lorashrink as ls


def autoencoder(**settings: object) -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(8,) * 4,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        norm_num_groups=4,
        **settings,
    )


def write_sd1(folder: Path) -> Path:
    torch.manual_seed(0)
    tokenizer = tiny_sdxl.write_tokenizer(folder / "tokenizer", tiny_sdxl.EOS)
    unet = UNet2DConditionModel(
        block_out_channels=(16, 32),
        layers_per_block=2,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        attention_head_dim=2,
        norm_num_groups=8,
        cross_attention_dim=16,
    )
    StableDiffusionPipeline(
        vae=autoencoder(), text_encoder=tiny_sdxl.text_encoder(CLIPTextModel, 16, tokenizer), tokenizer=tokenizer,
        unet=unet, scheduler=DDIMScheduler(steps_offset=1, clip_sample=False),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    ).save_pretrained(folder)  # fmt: skip
    return folder


def bytes_for_t5() -> PreTrainedTokenizerFast:
    """Like T5's in what comes out: words of single bytes, and an end."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = {word: number for number, word in enumerate(["<pad>", "</s>", *letters])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="</s>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.ByteLevel(add_prefix_space=False), pre_tokenizers.Split("", "isolated")]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", model_max_length=64)


def write_flux(folder: Path) -> Path:
    torch.manual_seed(0)
    clip, t5 = tiny_sdxl.write_tokenizer(folder / "tokenizer", tiny_sdxl.EOS), bytes_for_t5()
    transformer = FluxTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=12,
        pooled_projection_dim=16,
        guidance_embeds=True,
        axes_dims_rope=(4, 4, 8),
    )
    encoder = T5EncoderModel(T5Config(vocab_size=len(t5), d_model=12, d_kv=4, d_ff=16, num_layers=1, num_heads=2))
    FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=autoencoder(latent_channels=4, scaling_factor=0.36, shift_factor=0.12),
        text_encoder=tiny_sdxl.text_encoder(CLIPTextModel, 16, clip),
        tokenizer=clip,
        text_encoder_2=encoder,
        tokenizer_2=t5,
        transformer=transformer,
    ).save_pretrained(folder)
    return folder


def write_sd3(folder: Path) -> Path:
    torch.manual_seed(0)
    tokenizers = [tiny_sdxl.write_tokenizer(folder / f"tokenizer{end}", tiny_sdxl.EOS) for end in ("", "_2")]
    encoders = [tiny_sdxl.text_encoder(CLIPTextModelWithProjection, 16, tokenizer) for tokenizer in tokenizers]
    transformer = SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        caption_projection_dim=32,
        pooled_projection_dim=32,
        out_channels=4,
    )
    StableDiffusion3Pipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=autoencoder(latent_channels=4, scaling_factor=1.5, shift_factor=0.06),
        text_encoder=encoders[0],
        tokenizer=tokenizers[0],
        text_encoder_2=encoders[1],
        tokenizer_2=tokenizers[1],
        text_encoder_3=None,
        tokenizer_3=None,
        transformer=transformer,
    ).save_pretrained(folder)
    return folder


WRITERS: Mapping[str, Callable[[Path], Path]] = {
    "StableDiffusionXLPipeline": tiny_sdxl.write_model,
    "StableDiffusionPipeline": write_sd1,
    "FluxPipeline": write_flux,
    "StableDiffusion3Pipeline": write_sd3,
}
# A layer of attention, one besides it, and one of a text encoder, in diffusers' names and in kohya's.
LAYERS: Mapping[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "StableDiffusionXLPipeline": (
        (
            "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q",
            "unet.up_blocks.0.resnets.0.conv1",
            "text_encoder_2.text_model.encoder.layers.0.mlp.fc1",
        ),
        ("lora_unet_middle_block_1_transformer_blocks_0_attn1_to_q", "lora_te2_text_model_encoder_layers_0_mlp_fc1"),
    ),
    "StableDiffusionPipeline": (
        (
            "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q",
            "text_encoder.text_model.encoder.layers.0.mlp.fc1",
        ),
        ("lora_unet_down_blocks_0_attentions_0_proj_in", "lora_te_text_model_encoder_layers_0_mlp_fc1"),
    ),
    # The transformer's own proj_out has the name that ends those of the blocks.
    "FluxPipeline": (
        (
            "transformer.transformer_blocks.0.attn.to_q",
            "transformer.proj_out",
            "text_encoder.text_model.encoder.layers.0.mlp.fc1",
        ),
        ("lora_unet_double_blocks_0_img_attn_qkv", "lora_unet_single_blocks_0_linear1"),
    ),
    "StableDiffusion3Pipeline": (
        ("transformer.transformer_blocks.0.attn.to_q", "transformer.proj_out"),
        ("lora_unet_joint_blocks_0_x_block_attn_qkv", "lora_te2_text_model_encoder_layers_0_mlp_fc1"),
    ),
}


# --- adapters ---


def write_adapter(path: Path, model: Path, names: tuple[str, ...]) -> Path:
    """A LoRA of rank 3 in the names of diffusers or kohya."""
    generator, tensors = torch.Generator().manual_seed(1), {}
    with ls.open_base(model) as base:
        for name in names:
            (out, fan_in, *kernel) = ls.bases.views_shape(base.find(name))
            kohya = name.startswith("lora_")
            up, down = ("lora_up", "lora_down") if kohya else ("lora_B", "lora_A")
            tensors[f"{name}.{up}.weight"] = torch.randn(out, 3, *[1] * len(kernel), generator=generator)
            tensors[f"{name}.{down}.weight"] = torch.randn(3, fan_in, *kernel, generator=generator)
    return write_tensors(path, tensors)


SDXL_MODULES = {
    "unet": [
        "down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_q",
        "down_blocks_1_attentions_0_transformer_blocks_0_attn2_to_v",
        "mid_block_attentions_0_transformer_blocks_0_ff_net_2",
        "up_blocks_0_attentions_1_transformer_blocks_0_attn1_to_out_0",
        "up_blocks_0_resnets_0_conv1",
    ],
    "te1": [f"text_model_encoder_layers_1_self_attn_{name}_proj" for name in ("q", "k", "v", "out")],
    "te2": ["text_model_encoder_layers_0_mlp_fc1"],
}


def write_sdxl_adapter(
    path: Path, model: Path, layers: dict[str, list[str]] = SDXL_MODULES, *, dora: bool = False, strength: float = 1.0
) -> Path:
    """A LoRA of rank 6 in kohya's names whose singular values fall by halves."""
    generator, tensors = torch.Generator().manual_seed(1), {}
    with ls.open_base(model) as base:
        for part, modules in layers.items():
            for module in modules:
                name = f"lora_{part}_{module}"
                (view,) = base.find(name)
                out, fan_in, *kernel = view.shape
                up = strength * torch.randn(out, 6, generator=generator) * 0.5 ** torch.arange(6)
                tensors[f"{name}.lora_up.weight"] = up.reshape(out, 6, *[1] * len(kernel))
                tensors[f"{name}.lora_down.weight"] = torch.randn(6, fan_in, *kernel, generator=generator)
                tensors[f"{name}.alpha"] = torch.tensor(3.0)
                if dora:
                    norms = base.weight((view,)).norm(dim=1) * 1.2
                    tensors[f"{name}.dora_scale"] = norms.reshape(out, *[1] * (len(view.shape) - 1))
    return write_tensors(path, tensors)


# --- CLIP ---

CLIP_VISION = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 32,
    "patch_size": 8,
}


def write_clip(folder: Path) -> Path:
    """A CLIP model of random numbers for pictures of 32 × 32."""
    torch.manual_seed(0)
    text = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    CLIPModel(CLIPConfig(vision_config=CLIP_VISION, text_config=text, projection_dim=8)).save_pretrained(folder)
    settings = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    return folder
