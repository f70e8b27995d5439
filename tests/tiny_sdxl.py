"""A model with SDXL's architecture and names, so small that training it is a matter of seconds; its weights are noise.

The tokenizers know bytes only (514 words): real CLIP tokenizers in format and behaviour, without its vocabulary.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from diffusers import AutoencoderKL, EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
from PIL import Image
from tokenizers.pre_tokenizers import ByteLevel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

BOS, EOS = "<|startoftext|>", "<|endoftext|>"


def write_tokenizer(folder: Path, pad: str) -> CLIPTokenizer:
    """A CLIP tokenizer whose words are single bytes."""
    folder.mkdir(parents=True, exist_ok=True)
    letters = sorted(ByteLevel.alphabet())
    words = [*letters, *(f"{letter}</w>" for letter in letters), BOS, EOS]
    (folder / "vocab.json").write_text(json.dumps({word: number for number, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    settings = {
        "tokenizer_class": "CLIPTokenizer",
        "model_max_length": 77,
        "bos_token": BOS,
        "eos_token": EOS,
        "unk_token": EOS,
        "pad_token": pad,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return CLIPTokenizer.from_pretrained(folder)


def text_encoder(kind: type, width: int, tokenizer: CLIPTokenizer) -> torch.nn.Module:
    """A text encoder of two layers."""
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=2 * width,
        projection_dim=width,
        num_hidden_layers=2,
        num_attention_heads=2,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return kind(config)


def write_model(folder: Path, *, seed: int = 0) -> Path:
    """The model as a diffusers folder (float32, about 2 MB)."""
    torch.manual_seed(seed)
    tokenizers = [write_tokenizer(folder / "tokenizer", EOS), write_tokenizer(folder / "tokenizer_2", "!")]
    # The widths differ because diffusers tells the encoders of a single file apart by them.
    encoders = [
        text_encoder(CLIPTextModel, 16, tokenizers[0]),
        text_encoder(CLIPTextModelWithProjection, 24, tokenizers[1]),
    ]
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(16, 32, 32),
        layers_per_block=2,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 1, 1),
        attention_head_dim=(2, 2, 2),
        norm_num_groups=8,
        cross_attention_dim=40,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=4,
        projection_class_embeddings_input_dim=24 + 6 * 4,
    )
    vae = AutoencoderKL(
        block_out_channels=(8, 8, 8, 8),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=64,
        scaling_factor=0.13025,
    )
    pipeline = StableDiffusionXLPipeline(
        vae=vae,
        text_encoder=encoders[0],
        text_encoder_2=encoders[1],
        tokenizer=tokenizers[0],
        tokenizer_2=tokenizers[1],
        unet=unet,
        scheduler=EulerDiscreteScheduler(
            beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1
        ),
        add_watermarker=False,
    )
    pipeline.save_pretrained(folder)
    return folder


def write_pictures(folder: Path, sizes: dict[str, tuple[int, int]], captions: dict[str, str] | None = None) -> Path:
    """Pictures of noise with these names and sizes (width, height), and caption files beside them."""
    folder.mkdir(parents=True, exist_ok=True)
    for index, (name, (width, height)) in enumerate(sizes.items()):
        generator = torch.Generator().manual_seed(index)
        pixels = torch.randint(0, 256, (height, width, 3), generator=generator, dtype=torch.uint8)
        Image.fromarray(pixels.numpy()).save(folder / name)
    for name, caption in (captions or {}).items():
        (folder / name).with_suffix(".txt").write_text(caption, encoding="utf-8")
    return folder
