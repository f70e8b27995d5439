"""Batches for training: pictures, or what is cached of them, with their captions, sizes and weights.

Files are read ahead in worker processes. What is cached in memory is added by the training process itself: that costs
less than sending it between processes. Random numbers depend on the picture, its repeat and the epoch alone.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from random import Random
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from lorashrink.errors import LorashrinkError
from lorashrink.train.data import seeds
from lorashrink.train.data.buckets import to_pixels
from lorashrink.train.data.captions import draw
from lorashrink.train.data.scanning import Data, Draw, Picture, batch_count, epoch_batches, read_pixels
from lorashrink.train.flags.options import Options
from lorashrink.train.text import Encoded

if TYPE_CHECKING:
    from lorashrink.train.data.caches import LatentCache, TextCache

_Job = TypeVar("_Job")
_Result = TypeVar("_Result")


@dataclass(frozen=True, slots=True, eq=False)
class Batch:
    """What one micro-step trains on: b pictures of one bucket, h x w latents each; on the CPU."""

    draws: tuple[Draw, ...]
    captions: tuple[str, ...]
    flipped: tuple[bool, ...]
    time_ids: Tensor  # [b, 6] float32, SDXL's size numbers
    weights: Tensor  # [b] float32, of the loss
    latents: Tensor | None  # [b, 4, h, w] float32, unscaled, if they are cached
    pixels: Tensor | None  # [b, 3, H, W] float32 in -1..1, if they are not
    text: Encoded | None  # if it is cached

    def pin_memory(self) -> Batch:
        """The same in memory from which a GPU copies faster; DataLoader calls it."""
        text = self.text and Encoded(
            *(part.pin_memory() for part in (self.text.hidden1, self.text.hidden2, self.text.pooled))
        )
        return replace(
            self,
            time_ids=self.time_ids.pin_memory(),
            weights=self.weights.pin_memory(),
            latents=None if self.latents is None else self.latents.pin_memory(),
            pixels=None if self.pixels is None else self.pixels.pin_memory(),
            text=text,
        )


class Loader:
    """The batches of one process.

    Args:
        data: what `scan` found.
        seed: of captions, flips and order.
        rank, world: which process of how many.
        latents, texts: caches. Without one, batches have pixels, or no encoded text.
        total_steps: optimizer steps of the whole training.
    """

    def __init__(
        self,
        data: Data,
        options: Options,
        seed: int,
        rank: int,
        world: int,
        latents: LatentCache | None,
        texts: TextCache | None,
        total_steps: int,
    ) -> None:
        self._data = data
        self._options = options
        self._seed = seed
        self._rank = rank
        self._world = world
        self._in_memory = _Cached(
            data, latents if latents and latents.in_memory else None, texts if texts and texts.in_memory else None
        )
        in_files = _Cached(
            data, None if latents and latents.in_memory else latents, None if texts and texts.in_memory else texts
        )
        assemble = _Assembly(data, options.prior_loss_weight, seed, total_steps, in_files, latents is None)
        reads_files = latents is None or in_files.latents is not None or in_files.texts is not None
        self._read_ahead = ReadAhead(
            assemble, worker_count(options) if reads_files else 0, options.persistent_data_loader_workers
        )

    @property
    def batches_per_epoch(self) -> int:
        """Batches that each process shows in an epoch; where they do not divide evenly, some are shown twice."""
        return -(-batch_count(self._data) // self._world)

    def epoch(self, number: int, start: int = 0) -> Iterator[Batch]:
        """This process' batches of an epoch (from 1), from its batch `start` (from 0) on.

        Raises:
            InputError: a picture or a cache file cannot be read.
        """
        batches = epoch_batches(
            self._data,
            number,
            self._seed,
            world=self._world,
            accumulation=self._options.gradient_accumulation_steps,
        )
        for batch in self._read_ahead(batches[self._rank :: self._world][start:]):
            yield self._in_memory.added(batch)


@dataclass(frozen=True, slots=True)
class _Cached:
    """Caches of one kind, in memory or in files."""

    data: Data
    latents: LatentCache | None
    texts: TextCache | None

    def added(self, batch: Batch) -> Batch:
        """The batch with what these caches have."""
        pictures = _pictures(self.data, batch.draws)
        if self.latents:
            got = [self.latents.get(picture, side) for picture, side in zip(pictures, batch.flipped, strict=True)]
            batch = replace(batch, latents=torch.stack(got))
        if self.texts:
            batch = replace(batch, text=joined([self.texts.get(picture) for picture in pictures]))
        return batch


def joined(texts: Sequence[Encoded]) -> Encoded:
    """Encoded captions as one batch."""
    return Encoded(
        torch.cat([text.hidden1 for text in texts]),
        torch.cat([text.hidden2 for text in texts]),
        torch.cat([text.pooled for text in texts]),
    )


@dataclass(frozen=True, slots=True)
class _Assembly:
    """Makes a batch of its draws, in a worker."""

    data: Data
    prior_loss_weight: float
    seed: int
    total_steps: int
    in_files: _Cached
    with_pixels: bool

    def __call__(self, draws: Sequence[Draw]) -> Batch:
        pictures = _pictures(self.data, draws)
        flipped = tuple(
            picture.subset.flip and self._random("flip", picture, one).random() < 0.5
            for picture, one in zip(pictures, draws, strict=True)
        )
        sides = list(zip(pictures, flipped, strict=True))
        batch = Batch(
            tuple(draws),
            tuple(self._caption(picture, one) for picture, one in zip(pictures, draws, strict=True)),
            flipped,
            torch.tensor([picture.fit.time_ids(side) for picture, side in sides], dtype=torch.float32),
            torch.tensor([self.prior_loss_weight if picture.subset.is_reg else 1.0 for picture in pictures]),
            latents=None,
            pixels=torch.stack([to_pixels(read_pixels(picture), side) for picture, side in sides])
            if self.with_pixels
            else None,
            text=None,
        )
        return self.in_files.added(batch)

    def _caption(self, picture: Picture, one: Draw) -> str:
        random = self._random("caption", picture, one)
        return draw(
            picture.lines,
            picture.subset.captions,
            random,
            epoch=one.epoch,
            step=one.step,
            total_steps=self.total_steps,
        )

    def _random(self, purpose: str, picture: Picture, one: Draw) -> Random:
        return seeds.numbers(self.seed, purpose, *picture.names, one.repeat, one.epoch)


def _pictures(data: Data, draws: Sequence[Draw]) -> list[Picture]:
    return [data.datasets[one.dataset].pictures[one.picture] for one in draws]


def worker_count(options: Options) -> int:
    """--max_data_loader_n_workers, but no more than the processors that this process may use."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(max(options.max_data_loader_n_workers, 0), usable)


class ReadAhead(Generic[_Job, _Result]):
    """Calls a function on jobs in worker processes, and gives its results in their order.

    Without workers the calls are made in this process. Global random numbers are left alone. What lorashrink raises on
    purpose in a worker is raised here as it was.
    """

    def __init__(self, read: Callable[[_Job], _Result], workers: int, persistent: bool = False) -> None:
        # The very list that the DataLoader iterates over: its contents change, and its workers may stay.
        self._jobs: list[_Job] = []
        self._results: DataLoader[Any] = DataLoader(
            _Reads(read),  # type: ignore[arg-type]
            batch_size=None,
            sampler=self._jobs,
            num_workers=workers,
            persistent_workers=persistent and workers > 0,
            pin_memory=torch.cuda.is_available(),
            generator=torch.Generator(),
        )

    def __call__(self, jobs: Sequence[_Job]) -> Iterator[_Result]:
        self._jobs[:] = jobs
        for result in self._results:
            if isinstance(result, LorashrinkError):
                raise result
            yield result


@dataclass(frozen=True, slots=True)
class _Reads:
    """What DataLoader takes for a dataset; its indices are the jobs."""

    read: Callable[[Any], Any]

    def __getitem__(self, job: Any) -> Any:
        try:
            return self.read(job)
        except LorashrinkError as error:
            return error
