"""Samples: when they are due, samplers, and pictures of a tiny model."""

from __future__ import annotations

import logging
import re
from dataclasses import replace
from pathlib import Path

import pytest
import tiny_sdxl
import torch
from diffusers import StableDiffusionXLPipeline
from PIL import Image, ImageChops

from lorashrink.pictures.pipelines import quiet_libraries
from lorashrink.pictures.prompts import SAMPLERS, Prompt
from lorashrink.pictures.samplers import scheduler
from lorashrink.plots.sheet import Cell, contact_sheet
from lorashrink.train.flags.options import Options
from lorashrink.train.model.loading import Model, load_model
from lorashrink.train.output.samples import check_prompts, draw, due, write_sheet

CPU = torch.device("cpu")

# diffusers' own: dpm_2_a hands tensors to numpy, and dpmsolver is announced to go.
pytestmark = [
    pytest.mark.filterwarnings("ignore:__array_wrap__:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*algorithm_types dpmsolver:FutureWarning"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_sdxl.write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def model(folder: Path) -> Model:
    quiet_libraries()
    return load_model(Options(pretrained_model_name_or_path=str(folder)), CPU)


def test_long_prompts_weights_and_uneven_numbers_are_pointed_out(model: Model) -> None:
    tokenizer = model.tokenizers[0]  # one token for each letter
    prompts = [Prompt("x" * 75, negative="x" * 76), Prompt("a (cat:1.2) (at 1:30)"), Prompt("a cat")]
    long, weight, uneven = check_prompts(prompts, tokenizer, 2, Options())
    assert "sample 00: the negative prompt has 76 tokens, 78 with" in long
    assert "sample 01" in weight
    assert "(cat:1.2)" in weight
    assert "3 sample prompts" in uneven
    assert uneven.endswith("4 would.")
    assert list(check_prompts([prompts[0], prompts[2]], tokenizer, 2, Options(max_token_length=150))) == []


@pytest.mark.parametrize(
    ("settings", "moments"),
    [
        ({"sample_every_n_steps": 2}, ["s2", "s4"]),
        ({"sample_every_n_steps": 2, "sample_at_first": True}, ["s0", "s2", "s4"]),
        ({"sample_every_n_steps": 1, "sample_every_n_epochs": 2}, ["e2"]),
        ({"sample_every_n_steps": 0}, []),
        ({"sample_every_n_epochs": -1}, []),
        ({}, []),
        ({"sample_prompts": None, "sample_every_n_steps": 1, "sample_at_first": True}, []),
    ],
)
def test_pictures_are_due_when_sd_scripts_draws(settings: dict[str, object], moments: list[str]) -> None:
    options = Options(**{"sample_prompts": "p.txt"} | settings)
    due_at = {f"s{step}": due(options, step=step) for step in range(5)}
    due_at |= {f"e{epoch}": due(options, step=2 * epoch, epoch=epoch) for epoch in (1, 2)}
    assert [moment for moment, answer in due_at.items() if answer] == moments


# --- pictures ---


def drawn(model: Model, prompts: list[Prompt], folder: Path, options: Options | None = None) -> list[Image.Image]:
    return [Image.open(path).copy() for path in paths(model, prompts, folder, options)]


def paths(
    model: Model,
    prompts: list[Prompt],
    folder: Path,
    options: Options | None = None,
    *,
    step: int = 1,
    epoch: int | None = None,
    rank: int = 0,
    world: int = 1,
) -> list[Path]:
    options = replace(options or Options(), output_dir=str(folder))
    return list(draw(model, prompts, options, step=step, epoch=epoch, rank=rank, world=world, device=CPU).values())


def farthest(first: Image.Image, second: Image.Image) -> int:
    """The largest difference of two pictures, of 255."""
    return max(high for _, high in ImageChops.difference(first, second).getextrema())


SMALL = Prompt("a cat", "bad", width=64, height=64, seed=3, steps=2, scale=5.0)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_every_sampler_draws(
    model: Model, tmp_path: Path, sampler: str, prediction: str, caplog: pytest.LogCaptureFixture
) -> None:
    sampler_scheduler = scheduler(sampler, v_parameterization=prediction == "v_prediction")
    assert sampler_scheduler.config.prediction_type == prediction
    assert sampler_scheduler.config.beta_schedule == "scaled_linear"
    assert not sampler_scheduler.config.get("clip_sample")
    assert not sampler_scheduler.config.get("use_karras_sigmas")
    options = Options(v_parameterization=prediction == "v_prediction")
    (picture,) = drawn(model, [replace(SMALL, sampler=sampler, steps=4)], tmp_path, options)
    assert picture.size == (64, 64)
    assert not caplog.messages
    assert picture.convert("L").getextrema()[0] < picture.convert("L").getextrema()[1]


def test_the_picture_is_the_one_of_diffusers_own_pipeline(model: Model, folder: Path, tmp_path: Path) -> None:
    prompt = replace(SMALL, width=128, height=64, steps=4)
    (picture,) = drawn(model, [prompt], tmp_path, Options())
    pipeline = StableDiffusionXLPipeline.from_pretrained(folder, add_watermarker=False)
    pipeline.scheduler = scheduler("ddim", v_parameterization=False)
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(3)
    (expected,) = pipeline(
        "a cat", negative_prompt="bad", width=128, height=64, num_inference_steps=4, guidance_scale=5.0,
        generator=generator,
    ).images  # fmt: skip
    assert farthest(picture, expected) <= 1


def test_a_seed_repeats_a_picture_and_no_seed_does_not(model: Model, tmp_path: Path) -> None:
    first, again, second, free, freer = drawn(
        model,
        [replace(SMALL, sampler="euler_a", seed=seed) for seed in (1, 1, 2, None, None)],
        tmp_path,
    )
    assert farthest(first, again) == 0
    assert farthest(first, second) > 0
    assert farthest(free, freer) > 0


def test_the_noise_is_the_same_in_half_precision(folder: Path, model: Model, tmp_path: Path) -> None:
    options = Options(pretrained_model_name_or_path=str(folder), mixed_precision="bf16")
    half = load_model(options, CPU)
    (coarse,), (fine,) = drawn(half, [SMALL], tmp_path, options), drawn(model, [SMALL], tmp_path)
    assert farthest(coarse, fine) <= 16
    assert {half.unet.dtype, half.vae.dtype, half.encoders[0].dtype, half.encoders[1].dtype} == {torch.bfloat16}


def test_every_part_of_the_prompt_changes_the_picture(model: Model, tmp_path: Path) -> None:
    variants = [
        SMALL,
        replace(SMALL, prompt="a dog"),
        replace(SMALL, negative=""),
        replace(SMALL, steps=3),
        replace(SMALL, scale=1.0),
    ]
    first, *others = drawn(model, variants, tmp_path)
    assert all(farthest(first, second) > 0 for second in others)


def test_tokens_beyond_the_limit_count_once_the_limit_is_raised(model: Model, tmp_path: Path) -> None:
    long = [replace(SMALL, prompt="x" * 80 + end, scale=20.0) for end in "ab"]
    first, second = drawn(model, long, tmp_path)
    assert farthest(first, second) == 0
    first, second = drawn(model, long, tmp_path, Options(max_token_length=150))
    assert farthest(first, second) > 0


def test_processes_share_the_prompts_and_draw_what_one_would(model: Model, tmp_path: Path) -> None:
    prompts = [replace(SMALL, seed=seed) for seed in range(3)]
    alone = drawn(model, prompts, tmp_path / "one")
    shared = {
        path.name.split("_")[1]: Image.open(path).copy()
        for rank in (0, 1)
        for path in paths(model, prompts, tmp_path / "two", rank=rank, world=2)
    }
    assert list(shared) == ["00", "02", "01"]
    assert [farthest(shared[f"{number:02d}"], picture) for number, picture in enumerate(alone)] == [0, 0, 0]


def test_drawing_leaves_random_numbers_and_weights_as_they_were(model: Model, tmp_path: Path) -> None:
    state = torch.get_rng_state()
    kinds = [(part.device, part.dtype, part.training) for part in (model.unet, model.vae, *model.encoders)]
    paths(model, [replace(SMALL, seed=None, sampler="dpm_2_a"), SMALL], tmp_path)
    assert torch.equal(torch.get_rng_state(), state)
    assert [(part.device, part.dtype, part.training) for part in (model.unet, model.vae, *model.encoders)] == kinds


def test_a_model_with_nan_is_reported_and_training_goes_on(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    broken = load_model(Options(pretrained_model_name_or_path=str(folder)), CPU)
    broken.unet.conv_out.bias.data.fill_(float("nan"))
    with caplog.at_level(logging.WARNING):
        assert paths(broken, [SMALL], tmp_path) == []
    assert "sample 00 is not a picture" in caplog.text


@pytest.mark.parametrize(
    ("name", "epoch", "seed", "pattern"),
    [
        ("my", None, 3, r"my_000007_00_\d{14}_3\.png"),
        (None, 2, None, r"e000002_00_\d{14}\.png"),
        ("my", 2, 0, r"my_e000002_00_\d{14}_0\.png"),
    ],
)
def test_names_of_pictures_are_those_of_sd_scripts(
    model: Model, tmp_path: Path, name: str | None, epoch: int | None, seed: int | None, pattern: str
) -> None:
    options = Options(output_name=name)
    (path,) = paths(model, [replace(SMALL, seed=seed)], tmp_path, options, step=7, epoch=epoch)
    assert path.parent == tmp_path / "sample"
    assert re.fullmatch(pattern, path.name)


# --- contact sheet ---


def test_the_sheet_shows_what_was_drawn_and_nothing_of_an_earlier_run(tmp_path: Path) -> None:
    """The second prompt gave NaN this time, and a picture in an earlier run."""
    (tmp_path / "sample").mkdir()
    files = {
        "a_000010_00_20250101000001.png": "red",
        "a_000010_01_20240101000000_5.png": "black",
        "a_000010_02_20250101000001.png": "blue",
    }
    for name, colour in files.items():
        Image.new("RGB", (64, 64), colour).save(tmp_path / "sample" / name)
    first, _, third = (tmp_path / "sample" / name for name in files)
    prompts = [Prompt("one"), Prompt("two", seed=5), Prompt("three")]
    options = Options(output_dir=str(tmp_path), output_name="a")
    path = write_sheet(prompts, {2: third, 0: first}, options, step=10)
    assert path == tmp_path / "sample" / "a_000010_sheet.png"
    colours = {colour for count, colour in Image.open(path).getcolors(1 << 20) if count >= 64 * 64}
    assert colours == {(255, 255, 255), (255, 0, 0), (0, 0, 255)}


def test_a_sheet_keeps_order_and_shape_and_reduces_what_is_large() -> None:
    colours = ["#ff0000", "#00ff00", "#0000ff"]
    sizes = [(1000, 500), (300, 600), (80, 80)]
    pictures = [Image.new("RGB", size, colour) for size, colour in zip(sizes, colours, strict=True)]
    sheet = contact_sheet("title", [Cell(picture, "words " * 99, "details") for picture in pictures], side=400)
    boxes = [box(sheet, colour) for colour in colours]
    assert [(right - left, bottom - top) for left, top, right, bottom in boxes] == [(400, 200), (200, 400), (80, 80)]
    red, green, blue = boxes
    assert red[0] < green[0]
    assert red[1] == green[1]
    assert (blue[0], blue[1] > green[3]) == (red[0], True)
    assert blue[3] < sheet.height


def box(sheet: Image.Image, colour: str) -> tuple[int, int, int, int]:
    plain = Image.new("RGB", sheet.size, colour)
    same = ImageChops.difference(sheet, plain).convert("L").point(lambda value: 255 * (value == 0))
    box = same.getbbox()
    assert box is not None
    return box
