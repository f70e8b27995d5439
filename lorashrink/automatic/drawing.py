"""Pictures of an adapter and its smaller versions, drawn by the model."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from lorashrink.adapters import peft
from lorashrink.automatic.method import Method
from lorashrink.automatic.prompts import trial_of
from lorashrink.automatic.searching import smallest_size
from lorashrink.errors import InputError, Progress
from lorashrink.pictures.drawing import Studio, read_picture, shots_of
from lorashrink.pictures.likeness import psnr
from lorashrink.pictures.pipelines import KINDS, check_model, check_packages, own_side
from lorashrink.recipes.grammar import Recipe
from lorashrink.recipes.levels import Level
from lorashrink.results.automatic import PicturePair
from lorashrink.results.shrinking import FileResult

if TYPE_CHECKING:
    from lorashrink.pictures.drawing import Shot

# source, recipe, file -> what the recipe makes of it; nothing is written without a file.
Resize = Callable[[Path, Recipe, Path | None], FileResult]

# A picture that is worse by this many dB than the target needs no other picture beside it.
_HOPELESS = 4.0


class Gallery:
    """A model that draws with one adapter after the other. Use it as a context manager."""

    def __init__(self, model: Path, *, settings: Path | None, device: str, progress: Progress | None) -> None:
        """Raises UsageError or InputError if the model cannot draw."""
        check_packages()
        self._kind = KINDS[check_model(model, settings)]
        self._side = own_side(model, settings)
        self._studio = Studio(model, (), device=device, settings=settings)
        self._progress = progress

    def __enter__(self) -> Gallery:
        return self

    def __exit__(self, *exc: object) -> None:
        self._studio.__exit__(None, None, None)

    def of(self, source: Path, prompts: str | Path | None) -> Series:
        """The pictures of one adapter. Raises InputError if the model cannot draw with it."""
        trial = trial_of(source, prompts, side=self._side, scale=self._kind.scale)
        shots = shots_of(trial.prompts, (0,))
        self._studio.shots = shots
        self._studio.check(source)
        return Series(self._studio, source, shots, trial.calling, trial.words, self._progress)


class Series:
    """Pictures of one adapter, of its smaller versions, and of the model without it, from the same noise."""

    def __init__(
        self,
        studio: Studio,
        source: Path,
        shots: Sequence[Shot],
        calling: Sequence[bool],
        words: str,
        progress: Progress | None,
    ) -> None:
        self._studio, self._source, self._progress = studio, source, progress
        # Prompts that call the adapter come first: these decide, and the others are drawn of the result alone.
        order = sorted(range(len(shots)), key=lambda index: not calling[index])
        self._shots = [shots[index] for index in order]
        self._calling = [calling[index] for index in order]
        self.words = words
        self._before = self._draw(source, "whole", self._shots)
        self._reference = dict(zip(self._shots, self._before, strict=True))
        self._levels: dict[Shot, float] = {}

    def worst(self, file: Path, target: float) -> float:
        """PSNR in dB of the worst picture that calls the adapter; drawing ends at one that is hopeless."""
        # The worst prompt of the last size is likely to be the worst again.
        shots = [shot for shot, calls in zip(self._shots, self._calling, strict=True) if calls]
        shots.sort(key=lambda shot: self._levels.get(shot, math.inf))

        def hopeless(index: int, path: Path) -> bool:
            return self._level(shots[index], path) < target - _HOPELESS

        paths = self._draw(file, "candidate", shots, hopeless)
        levels = {shot: self._level(shot, path) for shot, path in zip(shots, paths, strict=False)}
        self._levels |= levels
        return min(levels.values())

    def pairs(self, file: Path) -> tuple[PicturePair, ...]:
        """All prompts, without the adapter, with it and with its smaller version."""
        after = self._draw(file, "shrunk", self._shots)
        none = self._draw(None, "none", self._shots)
        return tuple(
            PicturePair(shot.prompt.prompt, str(without), str(before), str(small), self._level(shot, small), calls)
            for shot, without, before, small, calls in zip(
                self._shots, none, self._before, after, self._calling, strict=True
            )
        )

    def _level(self, shot: Shot, path: Path) -> float:
        return psnr(read_picture(self._reference[shot]), read_picture(path))

    def _draw(
        self,
        adapter: Path | None,
        label: str,
        shots: Sequence[Shot],
        enough: Callable[[int, Path], bool] | None = None,
    ) -> list[Path]:
        self._studio.shots = tuple(shots)
        report = partial(self._progress, f"pictures: {self._source.name} {label}") if self._progress else None
        return self._studio.draw(adapter, label, progress=report, enough=enough)


def recipe_by_pictures(
    series: Series, source: Path, method: Method, level: Level, resize: Resize, *, guess: float, most: float
) -> Recipe | None:
    """The recipe of the smallest size whose worst picture reaches the level, None if no size up to `most` does.

    guess, most: bytes, of the size that is tried first and of the largest one.
    """

    def worst_at(size: float) -> float:
        recipe = Recipe.parse(method.of_size(size))
        with tempfile.TemporaryDirectory(prefix="lorashrink-") as folder:
            file = Path(folder, peft.WEIGHTS_FILE if peft.is_folder(source) else "adapter.safetensors")
            try:
                resize(source, recipe, file)
            except InputError:  # no file is so small
                return -math.inf
            return series.worst(file, level.worst)

    size = smallest_size(worst_at, guess=guess, most=most, target=level.worst)
    return None if size is None else Recipe.parse(method.of_size(size))


def worst_of(pairs: Sequence[PicturePair]) -> float:
    """PSNR in dB of the worst picture that calls the adapter."""
    return min(pair.psnr for pair in pairs if pair.counts)
