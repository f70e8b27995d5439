"""Captions to what the UNet is conditioned on, as SDXL does it: chunks of tokens through both text encoders.

Captions of more than 75 tokens are cut into chunks as sd-scripts cuts them, so that adapters of both mean the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

CHUNK = 75  # tokens of text in the 77 positions of a CLIP encoder; the others are BOS and EOS


class Encoded(NamedTuple):
    """Encoded captions; n = 75 k + 2 positions for captions of k chunks."""

    hidden1: Tensor  # [b, n, c1], the penultimate layer of the first encoder
    hidden2: Tensor  # [b, n, c2], that of the second
    pooled: Tensor  # [b, c2], the projection at the first EOS of the first chunk

    @property
    def context(self) -> Tensor:
        """What cross attention attends to: [b, n, c1 + c2]."""
        return torch.cat([self.hidden1, self.hidden2], dim=-1)

    def to(self, device: torch.device | str, dtype: torch.dtype) -> Encoded:
        """The same on this device, in this dtype."""
        return Encoded(*(tensor.to(device, dtype) for tensor in self))


def tokenize(tokenizer: CLIPTokenizer, captions: Sequence[str], max_token_length: int | None) -> Tensor:
    """int64 [b, k, 77]; longer captions are cut off after max_token_length (75, if None) = 75 k tokens.

    Each chunk begins with BOS. The first EOS of a chunk is behind its text, and the rest is padding. The layout is that
    of sd-scripts: a chunk that the text fills ends with EOS, and a chunk without text begins BOS EOS.
    """
    limit = max_token_length or CHUNK
    tokens = tokenizer(
        list(captions), padding="max_length", truncation=True, max_length=limit + 2, return_tensors="pt"
    ).input_ids  # [b, 75 k + 2]
    parts = tokens[:, 1:-1].reshape(len(tokens), -1, CHUNK)
    count = parts.shape[1]
    begin, end = (tokens[:, index, None, None].expand(-1, count, 1) for index in (0, -1))
    chunks = torch.cat([begin, parts, end], dim=2)
    eos, pad = tokenizer.eos_token_id, tokenizer.pad_token_id
    if count > 1 and pad != eos:
        chunks[..., -1][(parts[..., -1] != eos) & (parts[..., -1] != pad)] = eos
        chunks[..., 1][parts[..., 0] == pad] = eos
    return chunks


def encode(encoders: tuple[CLIPTextModel, CLIPTextModelWithProjection], tokens1: Tensor, tokens2: Tensor) -> Encoded:
    """Tokens [b, k, 77] of both tokenizers through both encoders; gradients flow where they are enabled.

    The hidden states are those of the penultimate layer, without the final normalisation (SDXL, Podell et al. 2023,
    section 2.1); the pooled vector is of the last layer, as in OpenCLIP.
    """
    first = encoders[0](tokens1.flatten(0, 1).to(encoders[0].device), output_hidden_states=True)
    second = encoders[1](tokens2.flatten(0, 1).to(encoders[1].device), output_hidden_states=True)
    return Encoded(
        _joined(first.hidden_states[-2], tokens1.shape[0]),
        _joined(second.hidden_states[-2], tokens2.shape[0]),
        second.text_embeds[:: tokens2.shape[1]],
    )


def _joined(hidden: Tensor, captions: int) -> Tensor:
    """[b·k, 77, c] -> [b, 75 k + 2, c]: the text of all chunks between the first BOS and the last position."""
    chunks = hidden.reshape(captions, -1, *hidden.shape[1:])
    return torch.cat([chunks[:, 0, :1], chunks[:, :, 1:-1].flatten(1, 2), chunks[:, -1, -1:]], dim=1)


def token_count(tokenizer: CLIPTokenizer, text: str) -> int:
    """How many tokens a text has, without BOS and EOS and however long it is."""
    return len(tokenizer(text, add_special_tokens=False, verbose=False).input_ids)
