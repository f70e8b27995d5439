"""A batch in, its loss out: the model with the network on it, and what is minimised."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lorashrink.train.data.batches import Batch
from lorashrink.train.data.caches import posterior
from lorashrink.train.data.scanning import Data
from lorashrink.train.flags.options import Options
from lorashrink.train.model.loading import LATENT_SCALE, Encoded, Model, encode, encode_pixels, tokenize, weight_dtype
from lorashrink.train.model.network import Network
from lorashrink.train.run.objective import Objective


class BatchLoss(nn.Module):
    """The loss of a batch as a module, for accelerate to wrap.

    Only the network is a child: what is frozen is neither copied to other processes nor saved with the state of a run.

    Args:
        network: applied to `model`.
        trains_text: whether gradients flow into the text encoders.
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
        unet, dtype = self._model.unet, weight_dtype(self._options)
        text = self._text(batch)
        keys = [(draw.epoch, draw.dataset, draw.picture, draw.repeat) for draw in batch.draws]
        noised = self.objective.noised(self._latents(batch).to(unet.device) * LATENT_SCALE, keys, self._seed)
        time_ids = batch.time_ids.to(unet.device)
        prediction = unet(
            noised.noisy.to(dtype),
            noised.timesteps,
            text.context.to(dtype),
            added_cond_kwargs={"text_embeds": text.pooled.to(dtype), "time_ids": time_ids},
            return_dict=False,
        )[0]
        return self.objective.loss(prediction, noised, batch.weights)

    def _latents(self, batch: Batch) -> Tensor:
        if batch.latents is not None:
            return batch.latents
        assert batch.pixels is not None
        pictures = self._data.pictures_of(batch.draws)
        generators = [
            posterior(self._seed, picture, flipped) for picture, flipped in zip(pictures, batch.flipped, strict=True)
        ]
        size = max(self._options.vae_batch_size, 1)
        chunks = (slice(start, start + size) for start in range(0, len(generators), size))
        return torch.cat([encode_pixels(self._model.vae, batch.pixels[chunk], generators[chunk]) for chunk in chunks])

    def _text(self, batch: Batch) -> Encoded:
        if batch.text is not None:
            return batch.text.to(self._model.unet.device, weight_dtype(self._options))
        tokens = [
            tokenize(tokenizer, batch.captions, self._options.max_token_length) for tokenizer in self._model.tokenizers
        ]
        with torch.set_grad_enabled(self._trains_text):
            return encode(self._model.encoders, *tokens)
