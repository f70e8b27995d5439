"""One optimizer step: batches through the model and back, gradients averaged, clipped and applied."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from lorashrink.train.data.batches import Batch
from lorashrink.train.data.caches import posterior
from lorashrink.train.data.scanning import Data
from lorashrink.train.flags.options import Options
from lorashrink.train.model.loading import LATENT_SCALE, Model, encode_pixels, weight_dtype
from lorashrink.train.model.network import Network, NormReport
from lorashrink.train.run.objective import Objective
from lorashrink.train.text import Encoded, encode, tokenize

# Gradients of several processes are averaged in pieces of about this many numbers.
_AVERAGED_AT_ONCE = 2**24


@dataclass(slots=True)
class Stepper:
    """What a step needs: the model, what is trained on it, and what is minimised."""

    options: Options
    accelerator: Accelerator
    seed: int
    data: Data
    model: Model
    network: Network
    objective: Objective
    optimizer: Optimizer
    scheduler: LRScheduler
    parameters: Sequence[Tensor]
    trains_text: bool

    def accumulate(self, batch: Batch) -> Tensor:
        """Add the gradients of one batch, and return its loss (0-dim, without a graph)."""
        device = self.accelerator.device
        with self.accelerator.autocast():
            text = self._text(batch)
            noised = self.objective.noised(self._latents(batch).to(device) * LATENT_SCALE, _keys(batch), self.seed)
            dtype = weight_dtype(self.options)
            prediction = self.model.unet(
                noised.noisy.to(dtype),
                noised.timesteps,
                text.context.to(dtype),
                added_cond_kwargs={"text_embeds": text.pooled.to(dtype), "time_ids": batch.time_ids.to(device)},
                return_dict=False,
            )[0]
        loss = self.objective.loss(prediction, noised, batch.weights)
        self.accelerator.backward(loss)
        return loss.detach()

    def apply(self) -> NormReport | None:
        """Change the parameters by what was accumulated. Returns what --scale_weight_norms did."""
        # accelerate's optimizer and scheduler do nothing while gradients are accumulated, which is not their business
        # here: this is called when all are there.
        self.accelerator.sync_gradients = True
        if self.accelerator.num_processes > 1:
            self._average_gradients()
        if self.options.max_grad_norm > 0:
            self.accelerator.clip_grad_norm_(self.parameters, self.options.max_grad_norm)
        self.optimizer.step()
        self.scheduler.step()
        self.optimizer.zero_grad(set_to_none=True)
        limit = self.options.scale_weight_norms
        return self.network.limit_norms(limit) if limit else None

    def _latents(self, batch: Batch) -> Tensor:
        if batch.latents is not None:
            return batch.latents
        assert batch.pixels is not None
        pictures = [self.data.datasets[draw.dataset].pictures[draw.picture] for draw in batch.draws]
        generators = [posterior(self.seed, *each) for each in zip(pictures, batch.flipped, strict=True)]
        at_once = max(self.options.vae_batch_size, 1)
        parts = (slice(start, start + at_once) for start in range(0, len(generators), at_once))
        return torch.cat([encode_pixels(self.model.vae, batch.pixels[part], generators[part]) for part in parts])

    def _text(self, batch: Batch) -> Encoded:
        if batch.text is not None:
            return batch.text.to(self.accelerator.device, weight_dtype(self.options))
        tokens = [
            tokenize(tokenizer, batch.captions, self.options.max_token_length) for tokenizer in self.model.tokenizers
        ]
        with torch.set_grad_enabled(self.trains_text):
            return encode(self.model.encoders, *tokens)

    def _average_gradients(self) -> None:
        """Give every process the mean of all gradients: DDP would not see the calls of the adapter's layers."""
        has = torch.tensor([float(each.grad is not None) for each in self.parameters], device=self.accelerator.device)
        anywhere = self.accelerator.reduce(has, "sum").tolist()
        # Without a gradient anywhere a parameter is not touched, as in a single process.
        shared = [each for each, count in zip(self.parameters, anywhere, strict=True) if count]
        for piece in _pieces(shared):
            flat = torch.cat([(torch.zeros_like(each) if each.grad is None else each.grad).flatten() for each in piece])
            means = self.accelerator.reduce(flat, "mean").split([each.numel() for each in piece])
            for each, mean in zip(piece, means, strict=True):
                each.grad = mean.view_as(each)


def _keys(batch: Batch) -> list[tuple[str | int, ...]]:
    return [(draw.epoch, draw.dataset, draw.picture, draw.repeat) for draw in batch.draws]


def _pieces(parameters: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    piece: list[Tensor] = []
    for each in parameters:
        piece.append(each)
        if sum(one.numel() for one in piece) >= _AVERAGED_AT_ONCE:
            yield piece
            piece = []
    if piece:
        yield piece
