"""Random numbers that depend on nothing but the seed and what they are for.

Neither workers, nor caches, nor the number of processes, nor resuming changes them.
"""

from __future__ import annotations

import hashlib
import random

import torch


def _number(seed: int, purpose: tuple[str | int, ...]) -> int:
    text = "\0".join(map(str, (seed, *purpose)))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


def generator(seed: int, *purpose: str | int) -> torch.Generator:
    """A generator of tensors on the CPU."""
    return torch.Generator().manual_seed(_number(seed, purpose))


def numbers(seed: int, *purpose: str | int) -> random.Random:
    """A generator of Python numbers."""
    return random.Random(_number(seed, purpose))
