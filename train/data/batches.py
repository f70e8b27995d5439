"""Batches for training: pictures, or what is cached of them, with their captions, sizes and weights.

An epoch is a list of batches of `Draw`, the same for every number of processes, workers and restarts. Random numbers
depend on the seed and what they are for alone: here the picture, its repeat and the epoch.
"""

from __future__ import annotations

import hashlib
import math
import random
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import cycle, islice
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from lorashrink.engine.devices import usable_cores
from lorashrink.errors import LorashrinkError
from lorashrink.train.data.buckets import Size, to_pixels
from lorashrink.train.data.captions import draw_caption
from lorashrink.train.data.scanning import Data, Draw, Picture, read_pixels
from lorashrink.train.flags.options import Options
from lorashrink.train.model.loading import Encoded

if TYPE_CHECKING:
    from lorashrink.train.data.caches import LatentCache

_T = TypeVar("_T")


def generator(seed: int, *purpose: str | int) -> torch.Generator:
    """Random numbers for one purpose, as tensors on the CPU."""
    return torch.Generator().manual_seed(_number(seed, purpose))


def numbers(seed: int, *purpose: str | int) -> random.Random:
    """Random numbers for one purpose, as Python's."""
    return random.Random(_number(seed, purpose))


def _number(seed: int, purpose: tuple[str | int, ...]) -> int:
    text = "\0".join(map(str, (seed, *purpose)))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


def chunks(items: Sequence[_T], size: int) -> list[Sequence[_T]]:
    """The items in their order, `size` at a time; the last chunk may be smaller."""
    return [items[start : start + size] for start in range(0, len(items), size)]


def batch_count(data: Data) -> int:
    """Batches of one epoch, of all processes together."""
    return sum(
        math.ceil(showings / dataset.options.train_batch_size)
        for dataset in data.datasets
        for showings in dataset.showings.values()
    )


def epoch_batches(data: Data, epoch: int, seed: int, *, world: int = 1) -> list[Sequence[Draw]]:
    """The batches of an epoch (from 1) for all processes: process r of `world` shows batches r, r + world, ...

    Each bucket's pictures are shuffled and cut into batches, and these are shuffled. So that all processes have as
    many, the list goes on from its beginning where it is short.
    """
    chance = numbers(seed, "order", epoch)
    batches: list[Sequence[Draw]] = []
    for index, dataset in enumerate(data.datasets):
        draws: defaultdict[Size, list[Draw]] = defaultdict(list)
        for number, picture in enumerate(dataset.pictures):
            draws[picture.fit.bucket] += [Draw(index, number, repeat, epoch) for repeat in range(picture.repeats)]
        for bucket in sorted(draws):
            chance.shuffle(draws[bucket])
            batches += chunks(draws[bucket], dataset.options.train_batch_size)
    chance.shuffle(batches)
    return list(islice(cycle(batches), math.ceil(len(batches) / world) * world))


class Batch(NamedTuple):
    """What one micro-step trains on: b pictures of one bucket, h x w latents each; on the CPU."""

    draws: tuple[Draw, ...]
    captions: tuple[str, ...]
    flipped: tuple[bool, ...]
    time_ids: Tensor  # [b, 6] float32, SDXL's size numbers
    weights: Tensor  # [b] float32, of the loss
    latents: Tensor | None  # [b, 4, h, w] float32, unscaled, if they are cached
    pixels: Tensor | None  # [b, 3, H, W] float32 in -1..1, if they are not
    text: Encoded | None  # if it is cached


def read_batch(pictures: Sequence[Picture], flipped: Sequence[bool] | None = None) -> Tensor:
    """What the VAE takes of pictures of one bucket, mirrored where asked: float32 [b, 3, H, W] in -1..1."""
    flips = flipped or [False] * len(pictures)
    return torch.stack([to_pixels(read_pixels(picture), flip) for picture, flip in zip(pictures, flips, strict=True)])


def _batch(
    data: Data,
    seed: int,
    prior_loss_weight: float,
    latents: LatentCache | None,
    texts: Mapping[str, Encoded] | None,
    draws: Sequence[Draw],
) -> Batch:
    pictures = data.pictures_of(draws)
    keys = [(*picture.names, draw.repeat, draw.epoch) for picture, draw in zip(pictures, draws, strict=True)]
    options = [picture.subset.options for picture in pictures]
    flipped = [
        own.flip_aug and numbers(seed, "flip", *key).random() < 0.5 for own, key in zip(options, keys, strict=True)
    ]
    captions = [
        draw_caption(picture.caption, own, numbers(seed, "caption", *key), epoch=draw.epoch)
        for picture, own, key, draw in zip(pictures, options, keys, draws, strict=True)
    ]
    shown = list(zip(pictures, flipped, strict=True))
    return Batch(
        draws=tuple(draws),
        captions=tuple(captions),
        flipped=tuple(flipped),
        time_ids=torch.tensor([picture.fit.time_ids(flip) for picture, flip in shown], dtype=torch.float32),
        weights=torch.tensor([prior_loss_weight if picture.subset.is_reg else 1.0 for picture in pictures]),
        latents=torch.stack([latents.get(picture, flip) for picture, flip in shown]) if latents else None,
        pixels=None if latents else read_batch(pictures, flipped),
        text=Encoded(*map(torch.cat, zip(*map(texts.__getitem__, captions), strict=True))) if texts else None,
    )


class Loader:
    """The batches of one process; without caches they have pixels, and no encoded text."""

    def __init__(
        self,
        data: Data,
        options: Options,
        seed: int,
        rank: int,
        world: int,
        latents: LatentCache | None,
        texts: Mapping[str, Encoded] | None,
    ) -> None:
        self._data, self._seed, self._rank, self._world = data, seed, rank, world
        reads_files = latents is None or latents.memory is None
        read = partial(_batch, data, seed, options.prior_loss_weight, latents, texts)
        self._order: list[Sequence[Draw]] = []  # of the epoch that is read
        self._batches = read_ahead(read, self._order, options, in_workers=reads_files)

    def epoch(self, number: int, start: int = 0) -> Iterator[Batch]:
        """This process' batches of an epoch (from 1), from its batch `start` (from 0) on; or InputError."""
        order = epoch_batches(self._data, number, self._seed, world=self._world)
        self._order[:] = order[self._rank :: self._world][start:]
        yield from raising(self._batches)


def read_ahead(
    read: Callable[[Any], Any], batches: Iterable[Sequence[Any]], options: Options, *, in_workers: bool = True
) -> DataLoader[Any]:
    """torch's DataLoader of what `read` makes of each batch, without a draw from global random numbers; see `raising`.

    It has --max_data_loader_n_workers, but no more than the processors that this process may use.
    """
    workers = min(options.max_data_loader_n_workers, usable_cores()) if in_workers else 0
    reader = _Reader(read)
    return DataLoader(
        reader,
        batch_sampler=batches,  # type: ignore[arg-type]
        collate_fn=reader,
        num_workers=workers,
        persistent_workers=options.persistent_data_loader_workers and workers > 0,
        pin_memory=torch.cuda.is_available(),
        generator=torch.Generator(),
    )


def raising(batches: Iterable[_T | LorashrinkError]) -> Iterator[_T]:
    """The batches of `read_ahead`; what lorashrink raises on purpose in a worker is raised here as it was."""
    for batch in batches:
        if isinstance(batch, LorashrinkError):
            raise batch
        yield batch


@dataclass(frozen=True)
class _Reader(Dataset[Any]):
    """Reads batches, in a worker. Errors become batches: DataLoader would put a traceback into their message."""

    read: Callable[[Any], Any]

    def __getitems__(self, batch: Sequence[Any]) -> Sequence[Any]:  # DataLoader prefers this to __getitem__
        return batch

    def __call__(self, batch: Sequence[Any]) -> Any:
        try:
            return self.read(batch)
        except LorashrinkError as error:
            return error
