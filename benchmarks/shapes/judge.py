"""A small network that says what a picture of shapes shows: `python judge.py FOLDER` compares that with the captions.

It knows the same pictures as the model that it judges: good for comparing settings, no absolute quality.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
import render
import torch
import torch.nn.functional as F
from render import BACKGROUNDS, COLOURS, SHAPES, SIZES, Pixels, Scene
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

FILE = Path(__file__).with_name("judge.safetensors")

HEADS: dict[str, tuple[str | bool, ...]] = {
    "size": tuple(SIZES),
    "colour": tuple(COLOURS),
    "shape": SHAPES,
    "background": tuple(BACKGROUNDS),
    "sks": (False, True),
    "pts": (False, True),
}
_WIDTHS = (3, 16, 32, 48, 64, 64)


class Judge(nn.Module):
    """Pictures [n, 3, 64, 64] in -1..1 to logits per head [n, choices]."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for number, (before, after) in enumerate(pairwise(_WIDTHS)):
            stride = 2 if number < 4 else 1
            layers += [nn.Conv2d(before, after, 3, stride, padding=1), nn.GroupNorm(4, after), nn.SiLU()]
        self.body = nn.Sequential(*layers)
        self.heads = nn.ModuleDict({name: nn.Linear(2 * _WIDTHS[-1], len(HEADS[name])) for name in HEADS})

    def forward(self, pixels: Tensor) -> dict[str, Tensor]:
        seen = self.body(pixels)
        pooled = torch.cat([seen.mean((2, 3)), seen.amax((2, 3))], 1)
        return {name: head(pooled) for name, head in self.heads.items()}


def load(path: Path = FILE) -> Judge:
    judge = Judge()
    judge.load_state_dict({name: tensor.float() for name, tensor in load_file(path).items()})
    return judge.eval()


def save(judge: Judge, path: Path = FILE) -> None:
    save_file({name: tensor.half().contiguous() for name, tensor in judge.state_dict().items()}, path)


def to_tensor(pixels: Sequence[Pixels]) -> Tensor:
    """Pictures uint8 [64, 64, 3] as float32 [n, 3, 64, 64] in -1..1."""
    return torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).float() / 127.5 - 1


def answers(scenes: Sequence[Scene]) -> dict[str, Tensor]:
    """The right choice per head, int64 [n]."""
    return {
        name: torch.tensor([words.index(getattr(scene, name)) for scene in scenes]) for name, words in HEADS.items()
    }


def loss(judge: Judge, pixels: Tensor, right: dict[str, Tensor]) -> Tensor:
    """Cross entropy, summed over heads."""
    return torch.stack([F.cross_entropy(logits, right[name]) for name, logits in judge(pixels).items()]).sum()


@torch.no_grad()
def see(judge: Judge, pixels: Sequence[Pixels]) -> list[Scene]:
    """What the judge sees in each picture."""
    logits = judge(to_tensor(pixels))
    choices = {name: [HEADS[name][number] for number in indices.argmax(1).tolist()] for name, indices in logits.items()}
    return [Scene(**{name: indices[number] for name, indices in choices.items()}) for number in range(len(pixels))]


def score(judge: Judge, pixels: Sequence[Pixels], scenes: Sequence[Scene]) -> dict[str, float]:
    """Share of pictures that are right, per head, and in shape, colour and background together ("all")."""
    seen = see(judge, pixels)
    met = {
        name: np.array([getattr(view, name) == getattr(scene, name) for view, scene in zip(seen, scenes, strict=True)])
        for name in HEADS
    }
    met["all"] = met["shape"] & met["colour"] & met["background"]
    return {name: float(hits.mean()) for name, hits in met.items()}


def told(scores: dict[str, float]) -> str:
    return ", ".join(f"{name} {share:.1%}" for name, share in scores.items())


def main() -> None:
    parser = argparse.ArgumentParser(description="Judge a folder of pictures by the captions beside them.")
    parser.add_argument("folder", type=Path)
    pixels, scenes = zip(*render.read_folder(parser.parse_args().folder), strict=True)
    print(told(score(load(), pixels, scenes)))


if __name__ == "__main__":
    main()
