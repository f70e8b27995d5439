"""The autoencoder of the shapes: 64x64 pixels to 16x16 latents of four channels and back."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from fit import Plan, Run, fit, seeded
from torch import Tensor

SCALE = 0.13025  # SDXL's own
FACTOR = 4
_LOG_VARIANCE = -12.0

PLAN = Plan(steps=2000, rate=2e-3, schedule=lambda progress: 0.5 + 0.5 * math.cos(math.pi * progress), warmup=50)
_BATCH = 8


def make() -> AutoencoderKL:
    torch.manual_seed(1)
    return AutoencoderKL(
        block_out_channels=(16, 32, 32),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=64,
        scaling_factor=SCALE,
        force_upcast=False,
    )


def _loss(vae: AutoencoderKL, pixels: Tensor, step: int) -> Tensor:
    """Of pixels and their means over blocks; early on three latent channels are led towards the mean colours.

    The noise on the latents takes the place of a sampled posterior and its divergence.
    """
    noise = seeded(2, step)
    latents = vae.encode(pixels).latent_dist.mean
    shown = vae.decode(latents + 0.05 * torch.randn(latents.shape, generator=noise)).sample
    loss = F.l1_loss(shown, pixels) + 2 * F.mse_loss(shown, pixels)
    for block in (4, 16):
        loss = loss + 2 * F.mse_loss(F.avg_pool2d(shown, block), F.avg_pool2d(pixels, block))
    guidance = 3 * max(0.05, 1 - 3 * step / PLAN.steps)
    loss = loss + guidance * F.mse_loss(latents[:, :3], F.avg_pool2d(pixels, FACTOR))
    return loss + 1e-4 * latents.square().mean()


def train(pixels: Tensor, run: Run) -> AutoencoderKL:
    """A trained autoencoder whose scaled latents have mean 0 and deviation 1. `pixels` [n, 3, 64, 64] in -1..1."""
    vae = make()

    def loss(step: int) -> Tensor:
        drawn = torch.randint(len(pixels), (_BATCH,), generator=seeded(1, step))
        return _loss(vae, pixels[drawn], step)

    fit("vae", vae, loss, PLAN, run)
    _fold(vae, encode(vae, pixels[:2048]))
    return vae


@torch.no_grad()
def encode(vae: AutoencoderKL, pixels: Tensor) -> Tensor:
    """Unscaled latents [n, 4, 16, 16]: the means."""
    return torch.cat([vae.encode(part).latent_dist.mean for part in pixels.split(64)])


@torch.no_grad()
def decode(vae: AutoencoderKL, latents: Tensor) -> Tensor:
    """Pixels of unscaled latents, in -1..1."""
    return torch.cat([vae.decode(part).sample for part in latents.split(64)]).clamp(-1, 1)


@torch.no_grad()
def _fold(vae: AutoencoderKL, latents: Tensor) -> None:
    """Move the latents' mean and deviation per channel into the convolutions on either side of them."""
    mean, deviation = latents.mean((0, 2, 3)), latents.std((0, 2, 3)) * SCALE
    out, back = vae.quant_conv, vae.post_quant_conv
    out.weight[:4] /= deviation[:, None, None, None]
    out.bias[:4] = (out.bias[:4] - mean) / deviation
    out.weight[4:] = 0
    out.bias[4:] = _LOG_VARIANCE
    back.bias += back.weight[:, :, 0, 0] @ mean
    back.weight *= deviation[None, :, None, None]


def decibels(vae: AutoencoderKL, pixels: Tensor) -> float:
    """Peak signal-to-noise ratio of pictures through the autoencoder."""
    error = F.mse_loss(decode(vae, encode(vae, pixels)), pixels).item()
    return 10 * math.log10(4 / error)
