"""What training minimises: a batch goes in, noise is added to its latents, and the loss comes out.

The noise schedule is SDXL's. Names of options and what they do are those of sd-scripts.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from diffusers import DDPMScheduler
from diffusers.training_utils import compute_snr
from torch import Generator, Tensor, nn
from torch.nn import functional

from lorashrink.pictures.samplers import NOISE_SCHEDULE
from lorashrink.train.data.batches import Batch, chunks, generator, numbers
from lorashrink.train.data.caches import posterior
from lorashrink.train.data.scanning import Data
from lorashrink.train.flags.options import Options
from lorashrink.train.model.loading import LATENT_SCALE, Model, encode_captions, encode_pixels, weight_dtype
from lorashrink.train.model.network import Network

TIMESTEPS = 1000

# The first timesteps of the schedule have an SNR of up to 1175, and sd-scripts counts no more than this.
_LARGEST_SNR = 1000.0


class BatchLoss(nn.Module):
    """The loss of a batch as a module, for accelerate to wrap; `network` has been applied to `model`.

    Only the network is a child: what is frozen is neither copied to other processes nor saved with the state of a run.
    """

    def __init__(
        self, options: Options, data: Data, model: Model, network: Network, *, seed: int, trains_text: bool
    ) -> None:
        super().__init__()
        self.network = network
        self.objective = Objective(options)
        self._options, self._data, self._model = options, data, model
        self._seed, self._trains_text = seed, trains_text

    def forward(self, batch: Batch) -> Tensor:
        """The mean loss of the batch: float32, 0-dim."""
        options, model, unet = self._options, self._model, self._model.unet
        dtype = weight_dtype(options)
        if batch.text is not None:
            text = batch.text.to(unet.device, dtype)
        else:
            with torch.set_grad_enabled(self._trains_text):
                text = encode_captions(model, batch.captions, options.max_token_length)
        latents = batch.latents
        if latents is None:
            assert batch.pixels is not None
            shown, size = zip(self._data.pictures_of(batch.draws), batch.flipped, strict=True), options.vae_batch_size
            generators = [posterior(self._seed, picture, flipped) for picture, flipped in shown]
            parts = zip(torch.split(batch.pixels, size), chunks(generators, size), strict=True)
            latents = torch.cat([encode_pixels(model.vae, pixels, own) for pixels, own in parts])
        latents = latents.to(unet.device, non_blocking=True) * LATENT_SCALE
        keys = [(draw.epoch, draw.dataset, draw.picture, draw.repeat) for draw in batch.draws]
        noised = self.objective.noised(latents, keys, self._seed)
        prediction = unet(
            noised.noisy.to(dtype),
            noised.timesteps,
            text.context.to(dtype),
            added_cond_kwargs={
                "text_embeds": text.pooled.to(dtype),
                "time_ids": batch.time_ids.to(unet.device, non_blocking=True),
            },
            return_dict=False,
        )[0]
        return self.objective.loss(prediction, noised, batch.weights)


@dataclass(frozen=True, slots=True)
class Noised:
    """One batch for the UNet; all on the device of the latents."""

    noisy: Tensor  # [b, 4, h, w] float32, latents with noise
    timesteps: Tensor  # [b] int64, 0 to 999
    target: Tensor  # [b, 4, h, w] float32, what the UNet should predict: the noise, or v


class Objective:
    """The noise schedule and the loss that the options ask for.

    With --zero_terminal_snr the schedule ends in pure noise (Lin et al. 2023, algorithm 1).
    """

    def __init__(self, options: Options) -> None:
        to_zero = options.zero_terminal_snr
        self.noise_schedule = DDPMScheduler(TIMESTEPS, **NOISE_SCHEDULE, rescale_betas_zero_snr=to_zero)
        self._options = options
        first, end = options.min_timestep or 0, options.max_timestep or TIMESTEPS
        self._range = first, max(end, first + 1)  # equal limits mean that one timestep, as in sd-scripts
        self._weights = timestep_weights(options, compute_snr(self.noise_schedule, torch.arange(TIMESTEPS)))

    def noised(self, latents: Tensor, keys: Sequence[tuple[str | int, ...]], seed: int) -> Noised:
        """Add noise to scaled latents, [b, 4, h, w] float32; `keys` are unique for each showing of a picture.

        Every random number of a picture comes from a generator of its own, so batches, processes and resuming do not
        change it. It shares with its batch only the standard deviation that follows multi-resolution noise.
        """
        options, device, shape = self._options, latents.device, latents.shape[1:]
        levels, discount = options.multires_noise_iterations or 0, options.multires_noise_discount
        draws = []
        for key in keys:
            tensors, chance = generator(seed, "noise", *key), numbers(seed, "noise", *key)
            draw = (  # the order is part of what a seed means
                torch.randn(shape, generator=tensors),
                torch.randn((shape[0], 1, 1), generator=tensors),
                float(torch.rand((), generator=tensors)) if options.noise_offset_random_strength else 1.0,
                _coarse_noise(shape, levels, discount, tensors, chance),
                int(torch.randint(*self._range, (), generator=tensors)),
            )
            draws.append(draw)
        noises, shifts, strengths, coarse_noises, steps = zip(*draws, strict=True)
        noise = torch.stack(noises).to(device)
        if options.noise_offset:  # crosslabs.org, 2023
            offset = torch.tensor(strengths).view(-1, 1, 1, 1).to(device) * options.noise_offset
            if (adaptive := options.adaptive_noise_scale) is not None:
                offset = (offset + adaptive * latents.mean((2, 3), keepdim=True).abs()).clamp(min=0)
            noise = noise + offset * torch.stack(shifts).to(device)
        if options.multires_noise_iterations:
            noise = noise + torch.stack(coarse_noises).to(device)
            noise = noise / noise.std()
        timesteps = torch.tensor(steps, device=device)
        noisy = self.noise_schedule.add_noise(latents, noise, timesteps)
        v = options.v_parameterization
        return Noised(noisy, timesteps, self.noise_schedule.get_velocity(latents, noise, timesteps) if v else noise)

    def loss(self, prediction: Tensor, noised: Noised, weights: Tensor) -> Tensor:
        """The mean over the batch of each picture's mean squared error times its weight: float32, 0-dim.

        `prediction` is [b, 4, h, w] of any floating dtype; `weights`, [b] float32, hold --prior_loss_weight.
        """
        error = functional.mse_loss(prediction.float(), noised.target.float(), reduction="none").mean((1, 2, 3))
        by_timestep = self._weights.to(error.device)[noised.timesteps]
        return (error * weights.to(error.device) * by_timestep).mean()


def timestep_weights(options: Options, snr: Tensor) -> Tensor:
    """What the loss at each timestep is multiplied by.

    With S the signal-to-noise ratio of a timestep and g = --min_snr_gamma, the product of those that are asked for:
    min(S, g) / S, with v prediction min(S, g) / (S + 1) (Hang et al. 2023); S / (S + 1) to scale v prediction as noise
    prediction; 1 + w (S + 1) / S for --v_pred_like_loss w; 1 / sqrt(S), with v prediction 1 / (S + 1), for
    --debiased_estimation_loss. All but the first count an S above 1000 as 1000, as sd-scripts does, and 0 as the
    smallest that is not 0, because half of them divide by it.
    """
    v = options.v_parameterization
    bounded = snr.clamp(float(snr[snr > 0].min()), _LARGEST_SNR)
    like_noise = bounded / (bounded + 1)
    weights = torch.ones_like(snr)
    if options.min_snr_gamma:
        gamma = options.min_snr_gamma
        weights = weights * (snr.clamp(max=gamma) / (snr + 1) if v else (gamma / snr).clamp(max=1))
    if options.scale_v_pred_loss_like_noise_pred:
        weights = weights * like_noise
    if options.v_pred_like_loss:
        weights = weights * (1 + options.v_pred_like_loss / like_noise)
    if options.debiased_estimation_loss:
        weights = weights * (1 / (bounded + 1) if v else bounded.rsqrt())
    return weights


def _coarse_noise(shape: torch.Size, levels: int, discount: float, tensors: Generator, chance: random.Random) -> Tensor:
    """The noise of ever lower resolutions, enlarged and summed: multi-resolution noise (Whitaker 2023), [4, h, w]."""
    channels, height, width = shape
    total = torch.zeros(shape)
    for level in range(levels):
        shrink = chance.uniform(2, 4) ** level
        size = max(1, int(height / shrink)), max(1, int(width / shrink))
        coarse = torch.randn((1, channels, *size), generator=tensors)
        total += functional.interpolate(coarse, (height, width), mode="bilinear")[0] * discount**level
        if 1 in size:
            break
    return total
