"""Pictures of the example model with an adapter added to its weights, and how near they are to those of another."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import base
import judge
import numpy as np
import torch
from numpy.typing import NDArray
from render import BASE_SHAPES, Pixels, Scene, draw_scenes

import lorashrink as ls
from lorashrink.pictures.likeness import psnr, ssim

_SEED = 7_000_000  # of the noise; in no training set


@dataclass(frozen=True, slots=True)
class Test:
    """Prompts for an adapter: those that call what it was taught, or plain ones."""

    scenes: tuple[Scene, ...]
    head: str  # what the judge is asked beside shape, colour and background

    @classmethod
    def of(cls, teaches: str, count: int, *, plain: bool = False, seed: int = 4242) -> Test:
        """`teaches` are flags of `render.py`: --style NAME or --shape NAME."""
        flag, name = teaches.split()
        shapes, styles = ((name,), ()) if flag == "--shape" else (BASE_SHAPES, (name,))
        scenes = draw_scenes(count, seed) if plain else draw_scenes(count, seed, shapes, styles)
        return cls(tuple(scenes), "shape" if flag == "--shape" else name)


@dataclass(frozen=True, slots=True)
class Seen:
    """What the pictures of a test are like."""

    psnr: NDArray[np.float64]  # dB, per picture
    ssim: NDArray[np.float64]
    concept: float  # share of pictures in which the judge sees the style or the shape, or with plain prompts none
    right: float  # share of pictures whose shape, colour and background are right


class Gallery:
    """The example model, drawing with one adapter after the other."""

    def __init__(self, model: Path) -> None:
        self.pipe = base.load(model)
        self.base = ls.open_base(model)
        self.judge = judge.load()

    @torch.no_grad()
    def add(self, adapter: Path) -> dict[torch.nn.Parameter, torch.Tensor]:
        """Add an adapter to the model; returns the weights as they were."""
        before = {}
        with ls.open_adapter(adapter) as opened:
            for layer in opened:
                (view,) = self.base.find(layer.name)
                weight = self._weight(view.key)
                before[weight] = weight.clone()
                weight += layer.delta.dense().reshape(weight.shape)
        return before

    @torch.no_grad()
    def paint(self, adapters: Path | Sequence[Path] | None, test: Test) -> list[Pixels]:
        """A picture of each scene, with these adapters."""
        paths = [] if adapters is None else [adapters] if isinstance(adapters, Path) else adapters
        before: list[dict[torch.nn.Parameter, torch.Tensor]] = []
        try:
            before += map(self.add, paths)
            return base.paint(self.pipe, [scene.caption for scene in test.scenes], _SEED)
        finally:
            for weight, old in ((w, o) for weights in reversed(before) for w, o in weights.items()):
                weight.copy_(old)

    def _weight(self, key: str) -> torch.nn.Parameter:
        part, _, name = key.partition(".")
        module = getattr(self.pipe, part)
        return module.get_parameter(name if hasattr(module, "text_model") else name.removeprefix("text_model."))

    def see(self, pictures: Sequence[Pixels], originals: Sequence[Pixels], test: Test) -> Seen:
        """Compare with the original adapter's pictures, and ask the judge."""
        scores = judge.score(self.judge, pictures, test.scenes)
        pairs = list(zip(originals, pictures, strict=True))
        return Seen(
            np.array([psnr(*pair) for pair in pairs]),
            np.array([ssim(*pair) for pair in pairs]),
            scores[test.head],
            scores["all"],
        )
