"""Prompts without a size are drawn at the model's own, which is what diffusers' pipelines draw."""

from collections.abc import Callable
from pathlib import Path

import pytest
from tiny_pipelines import write_flux, write_sd1, write_sd3

import lorashrink_example
from lorashrink.calibration.models import open_frozen_pipeline
from lorashrink.pictures.pipelines import KINDS, open_pipeline, own_side, pipeline_kind
from lorashrink.pictures.prompts import read_prompts

MODEL = lorashrink_example.path("model")


@pytest.mark.parametrize("write", [write_sd1, write_flux, write_sd3])
def test_the_side_is_that_of_the_pipeline(write: Callable[[Path], Path], tmp_path: Path) -> None:
    folder = write(tmp_path / "model")
    pipeline = open_pipeline(folder, device="cpu", dtype="float32")
    size = getattr(pipeline, "default_sample_size", None) or pipeline.unet.config.sample_size or 64
    assert own_side(folder) == size * pipeline.vae_scale_factor


def test_calibration_draws_plain_prompts_at_the_model_s_own_size(tmp_path: Path) -> None:
    prompts = tmp_path / "p.txt"
    prompts.write_text("a cat\na dog --w 128\n")
    pipeline, shots = open_frozen_pipeline(MODEL, KINDS[pipeline_kind(MODEL)], prompts, [0], "cpu", "float32")
    own = int(pipeline.unet.config.sample_size) * pipeline.vae_scale_factor
    assert [(shot.prompt.width, shot.prompt.height) for shot in shots] == [(own, own), (128, own)]
    assert own != 512


def test_the_trainer_keeps_the_rule_of_sd_scripts(tmp_path: Path) -> None:
    prompts = tmp_path / "p.txt"
    prompts.write_text("a cat\n")
    assert read_prompts(prompts)[0].width == 512
