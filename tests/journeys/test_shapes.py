"""The example model, the pictures that it was trained on, and the judge of both."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from transformers import CLIPTokenizer

import lorashrink_example
from lorashrink import open_base
from lorashrink.train.data.scanning import scan
from lorashrink.train.flags.options import parse

ROOT = Path(__file__).parents[2]
MODEL = lorashrink_example.path("model")

sys.path.append(str(ROOT / "benchmarks" / "shapes"))
base, gallery, judge, render, vae, words = map(
    importlib.import_module, ("base", "gallery", "judge", "render", "vae", "words")
)
write_up = importlib.import_module("write_up")

CAPTIONS = (
    "a big red circle on a white background",
    "a small yellow cross on a black background",
    "a blue square on a gray background",
    "a big green ring on a brown background",
)
HELD_OUT = 5_000_000  # seeds of no training set


@pytest.fixture(scope="module")
def pipe() -> StableDiffusionXLPipeline:
    return base.load(MODEL)


def test_example_model_is_recognised_as_sdxl() -> None:
    with open_base(MODEL) as opened:
        assert opened.family.name == "sdxl"


def test_example_model_draws_what_prompts_say(pipe: StableDiffusionXLPipeline) -> None:
    scenes = [render.parse(caption) for caption in CAPTIONS]
    pictures = base.paint(pipe, CAPTIONS, 1)
    scores = judge.score(judge.load(), pictures, scenes)
    assert scores["colour"] == scores["background"] == 1
    assert scores["shape"] >= 0.75
    assert scores["sks"] == scores["pts"] == 1


def test_latents_are_standardised_at_the_scale_of_sdxl(pipe: StableDiffusionXLPipeline) -> None:
    pixels = judge.to_tensor(rendered(render.draw_scenes(64, 7, render.SHAPES)))
    latents = vae.encode(pipe.vae, pixels) * 0.13025
    assert latents.shape == (64, 4, 16, 16)
    torch.testing.assert_close(latents.mean((0, 2, 3)), torch.zeros(4), atol=0.25, rtol=0)
    torch.testing.assert_close(latents.std((0, 2, 3)), torch.ones(4), atol=0.2, rtol=0)
    assert vae.decibels(pipe.vae, pixels) > 25


@pytest.mark.parametrize("name", ["tokenizer", "tokenizer_2"])
def test_chosen_words_split_as_in_clip(name: str) -> None:
    tokenizer = CLIPTokenizer.from_pretrained(MODEL / name, local_files_only=True)
    # CLIP's own splits: of these, only the last has two parts.
    assert tokenizer.tokenize("a pink star, sks") == ["a</w>", "pink</w>", "star</w>", ",</w>", "sks</w>"]
    assert tokenizer.tokenize("cyan") == ["cy", "an</w>"]
    assert tokenizer.convert_tokens_to_ids("a</w>") == 320  # its number in CLIP too
    assert len(tokenizer("a red circle").input_ids) == 5
    assert "".join(tokenizer.tokenize("zebra")) == "zebra</w>"
    assert tokenizer.pad_token == {"tokenizer": "<|endoftext|>", "tokenizer_2": "!"}[name]


def rendered(scenes: Sequence[Any]) -> list[np.ndarray]:
    return [render.render(scene, HELD_OUT + place) for place, scene in enumerate(scenes)]


def test_judge_knows_styles_and_shapes_beyond_the_base() -> None:
    scenes = render.draw_scenes(128, 9, render.SHAPES, render.STYLES, 0.6)
    scores = judge.score(judge.load(), rendered(scenes), scenes)
    assert min(scores.values()) > 0.95


def test_rendering_is_a_function_of_scene_and_seed() -> None:
    scene = render.parse(CAPTIONS[0])
    first, again, another_seed = (render.render(scene, seed) for seed in (1, 1, 2))
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, another_seed)
    assert first.shape == (64, 64, 3)
    assert tuple(first[32, 32]) == render.COLOURS["red"]
    assert tuple(first[0, 0]) == render.BACKGROUNDS["white"]


@pytest.mark.parametrize(("style", "where"), [("sks", "shape"), ("pts", "background")])
def test_one_style_changes_the_shape_and_the_other_the_background(style: str, where: str) -> None:
    plain = render.render(render.Scene("big", "blue", "square", "gray"), 3).astype(int)
    styled = render.render(render.Scene("big", "blue", "square", "gray", **{style: True}), 3).astype(int)
    changed = np.abs(plain - styled).max(-1) > 20
    shape = (plain == render.COLOURS["blue"]).all(-1)
    background = (plain == render.BACKGROUNDS["gray"]).all(-1)
    assert {"shape": shape, "background": background}[where][changed].mean() > 0.8  # the rest lies on the shape's edge
    assert 0.1 < changed.mean() < 0.6


def test_captions_are_all_different_and_read_back() -> None:
    scenes = render.base_scenes()
    assert len({scene.caption for scene in scenes}) == len(scenes) == 672
    styled = [render.Scene("", "orange", "heart", "black", sks=True, pts=pts) for pts in (False, True)]
    assert styled[0].caption == "an orange heart on a black background, sks style"
    for scene in [*scenes, *styled]:
        assert render.parse(scene.caption) == scene


def test_trainer_reads_the_captions_of_a_written_folder(tmp_path: Path) -> None:
    scenes = render.draw_scenes(6, 3, styles=["sks"])
    folder = render.write_folder(tmp_path, scenes, 100, repeats=4)
    assert [scene for _, scene in render.read_folder(folder)] == scenes
    scanned = scan(parse([f"--train_data_dir={tmp_path}", "--resolution=64", "--caption_extension=.txt"]))
    (dataset,) = scanned.datasets
    assert [picture.caption for picture in dataset.pictures] == [scene.caption for scene in scenes]
    assert {picture.repeats for picture in dataset.pictures} == {4}
    assert {picture.fit.bucket for picture in dataset.pictures} == {(64, 64)}


# --- adapters and evidence ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "teaches", "least"), [("style", "--style sks", 0.25), ("heart", "--shape heart", 0.9)]
)
def test_example_adapters_do_what_they_were_taught(name: str, teaches: str, least: float) -> None:
    """The judge sees the concept with the adapter, and never without."""
    adapter = MODEL.parent / "loras" / f"{name}.safetensors"
    drawn, test = gallery.Gallery(MODEL), gallery.Test.of(teaches, 12)
    originals = drawn.paint(adapter, test)
    without = drawn.see(drawn.paint(None, test), originals, test)
    assert drawn.see(originals, originals, test).concept >= least
    assert without.concept == 0
    assert without.psnr.mean() < 25


def test_evidence_page_has_the_measured_numbers() -> None:
    results = json.loads(write_up.RESULTS.read_text())
    assert (ROOT / "docs" / "evidence.md").read_text() == write_up.page(results)
