"""The base: a UNet and two text encoders in SDXL's form, trained together on latents and captions."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
from fit import Plan, Run, fit, seeded
from render import WIDTH, Pixels
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer
from vae import FACTOR, SCALE

PLAN = Plan(
    steps=2200, rate=1.5e-3, schedule=lambda progress: min(1.0, max(0.02, 2 - 2 * progress)), warmup=100, average=0.995
)
_BATCH = 64
_EMPTY = 0.1  # share of captions that are left out
_GAMMA = 5.0  # of min-SNR weighting, https://arxiv.org/abs/2303.09556
_TIME_IDS = (WIDTH, WIDTH, 0, 0, WIDTH, WIDTH)


def _encoder(kind: type, width: int, heads: int, act: str, tokenizer: CLIPTokenizer) -> nn.Module:
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=4 * width,
        projection_dim=width,
        num_hidden_layers=2,
        num_attention_heads=heads,
        hidden_act=act,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    encoder = kind(config)
    # The second-to-last layer's output has no norm of its own: with CLIP's small numbers the UNet would hardly hear it.
    for name, weight in encoder.named_parameters():
        if name.endswith("token_embedding.weight"):
            nn.init.normal_(weight, std=0.5)
        if name.endswith("position_embedding.weight"):
            nn.init.normal_(weight, std=0.2)
    return encoder


def make(tokenizers: Sequence[CLIPTokenizer]) -> nn.ModuleDict:
    """The untrained parts. The encoders' widths differ because single files tell them apart by their widths."""
    torch.manual_seed(2)
    unet = UNet2DConditionModel(
        sample_size=WIDTH // FACTOR,
        block_out_channels=(32, 48, 64),
        layers_per_block=2,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 1, 2),
        attention_head_dim=(1, 3, 4),
        norm_num_groups=8,
        cross_attention_dim=32 + 48,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=16,
        projection_class_embeddings_input_dim=48 + 6 * 16,
    )
    return nn.ModuleDict(
        {
            "unet": unet,
            "text_encoder": _encoder(CLIPTextModel, 32, 2, "quick_gelu", tokenizers[0]),
            "text_encoder_2": _encoder(CLIPTextModelWithProjection, 48, 4, "gelu", tokenizers[1]),
        }
    )


def scheduler() -> EulerDiscreteScheduler:
    return EulerDiscreteScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", timestep_spacing="leading", steps_offset=1
    )


def _tokens(tokenizer: CLIPTokenizer, captions: Sequence[str]) -> Tensor:
    return tokenizer(list(captions), padding="max_length", truncation=True, return_tensors="pt").input_ids


def train(
    latents: Tensor, captions: Sequence[str], tokenizers: Sequence[CLIPTokenizer], run: Run, plan: Plan = PLAN
) -> nn.ModuleDict:
    """The trained parts. `latents` [n, 4, 16, 16] are scaled."""
    parts = make(tokenizers)
    first_ids, second_ids = (_tokens(tokenizer, [*captions, ""]) for tokenizer in tokenizers)
    kept = scheduler().alphas_cumprod
    ratio = kept / (1 - kept)
    weights = ratio.clamp(max=_GAMMA) / ratio
    time_ids = torch.tensor([_TIME_IDS], dtype=torch.float32).expand(_BATCH, -1)

    def loss(step: int) -> Tensor:
        generator = seeded(3, step)
        drawn = torch.randint(len(latents), (_BATCH,), generator=generator)
        clean = latents[drawn]
        caption_index = torch.where(torch.rand(_BATCH, generator=generator) < _EMPTY, len(latents), drawn)
        times = torch.randint(len(kept), (_BATCH,), generator=generator)
        noise = torch.randn(clean.shape, generator=generator)
        share = kept[times][:, None, None, None]
        first = parts["text_encoder"](first_ids[caption_index], output_hidden_states=True)
        second = parts["text_encoder_2"](second_ids[caption_index], output_hidden_states=True)
        predicted = parts["unet"](
            share.sqrt() * clean + (1 - share).sqrt() * noise,
            times,
            encoder_hidden_states=torch.cat([first.hidden_states[-2], second.hidden_states[-2]], -1),
            added_cond_kwargs={"text_embeds": second.text_embeds, "time_ids": time_ids},
        ).sample
        errors = F.mse_loss(predicted, noise, reduction="none").mean((1, 2, 3))
        return (errors * weights[times]).mean()

    fit("base", parts, loss, plan, run)
    return parts


def pipeline(
    parts: nn.ModuleDict, vae: AutoencoderKL, tokenizers: Sequence[CLIPTokenizer]
) -> StableDiffusionXLPipeline:
    pipe = StableDiffusionXLPipeline(
        vae=vae,
        unet=parts["unet"],
        text_encoder=parts["text_encoder"],
        text_encoder_2=parts["text_encoder_2"],
        tokenizer=tokenizers[0],
        tokenizer_2=tokenizers[1],
        scheduler=scheduler(),
        force_zeros_for_empty_prompt=False,
        add_watermarker=False,
    )
    assert pipe.vae.config.scaling_factor == SCALE
    return pipe


def load(folder: Path) -> StableDiffusionXLPipeline:
    """A saved pipeline, in float32; nothing is downloaded."""
    pipe = StableDiffusionXLPipeline.from_pretrained(folder, local_files_only=True, add_watermarker=False)
    return pipe.to(torch.float32)


def paint(
    pipe: StableDiffusionXLPipeline, captions: Sequence[str], seed: int, *, steps: int = 20, guidance: float = 4.0
) -> list[Pixels]:
    """Pictures uint8 [64, 64, 3], the noise of each from its own seed."""
    pipe.set_progress_bar_config(disable=True)
    pictures: list[Pixels] = []
    for start in range(0, len(captions), 32):
        some = list(captions[start : start + 32])
        images = pipe(
            some,
            width=WIDTH,
            height=WIDTH,
            num_inference_steps=steps,
            guidance_scale=guidance,
            generator=[torch.Generator().manual_seed(seed + start + number) for number in range(len(some))],
            output_type="np",
        ).images
        pictures += list((images * 255).round().astype("uint8"))
    return pictures
