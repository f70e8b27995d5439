"""PSNR, SSIM and MS-SSIM against their closed forms and another program; similarity by a CLIP model."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import pytorch_msssim
import torch
from hypothesis import given
from hypothesis.extra.numpy import arrays
from safetensors.torch import load_file, save_file
from tiny_pipelines import write_clip
from transformers import CLIPImageProcessorPil, CLIPModel

from lorashrink.errors import InputError, UsageError
from lorashrink.pictures.likeness import MEASURES, MOST_PSNR, clip_similarity, comparisons, ms_ssim, psnr, ssim

PICTURES = arrays(np.uint8, (9, 11, 3))


def plain(value: int, side: int = 16) -> np.ndarray:
    return np.full((side, side, 3), value, np.uint8)


@pytest.mark.parametrize("distance", [1, 5, 255])
def test_psnr_of_plain_pictures_is_that_of_their_distance(distance: int) -> None:
    assert psnr(plain(0), plain(distance)) == pytest.approx(20 * math.log10(255 / distance))
    assert psnr(plain(distance), plain(0)) == psnr(plain(0), plain(distance))


def test_psnr_of_one_different_number_is_divided_by_all_numbers() -> None:
    side = 8
    picture = plain(100, side)
    picture[3, 4, 1] = 110
    assert psnr(plain(100, side), picture) == pytest.approx(10 * math.log10(255**2 / (100 / (3 * side**2))))


def test_ssim_of_plain_pictures_is_its_luminance_term() -> None:
    """(2·a·b + C1) / (a² + b² + C1) with C1 = (0.01 · 255)²."""
    c1 = (0.01 * 255) ** 2
    expected = (2 * 100 * 150 + c1) / (100**2 + 150**2 + c1)
    assert ssim(plain(100), plain(150)) == pytest.approx(expected, rel=1e-9)


def test_ssim_of_an_inverted_pattern_is_negative() -> None:
    """(C2 − 2v) / (C2 + 2v) with variances v and C2 = (0.03 · 255)²."""
    board = np.indices((8, 8)).sum(0) % 2
    picture, inverted = (
        np.repeat((64 * cells + 96)[..., None], 3, -1).astype(np.uint8) for cells in (board, 1 - board)
    )
    assert ssim(picture, inverted) < -0.9


@given(PICTURES)
def test_equal_pictures_are_as_alike_as_can_be(picture: np.ndarray) -> None:
    assert psnr(picture, picture) == MOST_PSNR
    assert ssim(picture, picture) == pytest.approx(1)


@given(PICTURES, PICTURES)
def test_psnr_and_ssim_are_symmetric_and_bounded(a: np.ndarray, b: np.ndarray) -> None:
    assert 0 <= psnr(a, b) <= MOST_PSNR
    assert psnr(a, b) == psnr(b, a)
    assert -1 - 1e-9 <= ssim(a, b) <= 1 + 1e-9
    assert ssim(a, b) == pytest.approx(ssim(b, a))


@pytest.mark.parametrize("sides", [(3, 20), (4, 4), (7, 7)])
def test_small_pictures_get_smaller_windows(sides: tuple[int, int]) -> None:
    assert ssim(np.zeros((*sides, 3), np.uint8), np.zeros((*sides, 3), np.uint8)) == pytest.approx(1)


def test_different_sizes_and_tiny_pictures_are_refused() -> None:
    for measure in (psnr, ssim):
        with pytest.raises(ValueError, match=r"pictures of|dimensions"):
            measure(plain(0, 8), plain(0, 16))
    with pytest.raises(ValueError, match="too small"):
        ssim(plain(0, 2), plain(0, 2))


# --- MS-SSIM ------------------------------------------------------------------------------------


# Its own window has single precision.
BELL = torch.exp(-(torch.arange(-5, 6, dtype=torch.float64) ** 2) / (2 * 1.5**2))
WINDOW = (BELL / BELL.sum()).repeat(3, 1, 1, 1)


def noisy(sides: tuple[int, int], amount: float, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """A smooth picture, and one with noise on it."""
    rows, columns = np.indices(sides)
    waves = [128 + 90 * np.sin(rows / (5 + 3 * band) + columns / (9 - 2 * band)) for band in range(3)]
    clean = np.stack(waves, -1)
    noisy_copy = clean + amount * np.random.default_rng(seed).normal(size=clean.shape)
    return clean.clip(0, 255).astype(np.uint8), noisy_copy.clip(0, 255).astype(np.uint8)


@pytest.mark.parametrize("amount", [2, 25, 120])
@pytest.mark.parametrize("sides", [(176, 176), (192, 320), (512, 256)])
def test_ms_ssim_is_that_of_another_program(sides: tuple[int, int], amount: float) -> None:
    """At multiples of 16 pixels, which both programs halve alike."""
    a, b = noisy(sides, amount)
    pair = [torch.tensor(picture).permute(2, 0, 1)[None].double() for picture in (a, b)]
    assert ms_ssim(a, b) == pytest.approx(float(pytorch_msssim.ms_ssim(*pair, data_range=255, win=WINDOW)), abs=1e-9)


def test_ms_ssim_of_one_scale_is_ssim_with_a_gaussian_window() -> None:
    a, b = noisy((16, 20), 25)
    pair = [torch.tensor(picture).permute(2, 0, 1)[None].double() for picture in (a, b)]
    assert ms_ssim(a, b) == pytest.approx(float(pytorch_msssim.ssim(*pair, data_range=255, win=WINDOW)), abs=1e-9)


@pytest.mark.parametrize(("side", "share"), [(176, 0.1333), (175, 0.2363 / 0.8668), (11, 1)])
def test_ms_ssim_of_plain_pictures_is_luminance_at_the_coarsest_scale(side: int, share: float) -> None:
    """Five scales from 176 pixels on, one below 22."""
    c1 = (0.01 * 255) ** 2
    luminance = (2 * 100 * 150 + c1) / (100**2 + 150**2 + c1)
    assert ms_ssim(plain(100, side), plain(150, side)) == pytest.approx(luminance**share)


@given(arrays(np.uint8, (24, 23, 3)), arrays(np.uint8, (24, 23, 3)))
def test_ms_ssim_is_symmetric_and_bounded(a: np.ndarray, b: np.ndarray) -> None:
    assert 0 <= ms_ssim(a, b) <= 1 + 1e-9
    assert ms_ssim(a, b) == pytest.approx(ms_ssim(b, a))
    assert ms_ssim(a, a) == pytest.approx(1)


def test_every_measure_falls_with_more_noise() -> None:
    for measure in MEASURES:
        if measure.compare:
            values = [measure.compare(*noisy((64, 64), amount)) for amount in (0, 5, 20, 80)]
            assert values == sorted(values, reverse=True)
            assert len(set(values)) == 4


def test_ms_ssim_refuses_different_sizes_and_tiny_pictures() -> None:
    with pytest.raises(ValueError, match="pictures of"):
        ms_ssim(plain(0, 16), plain(0, 32))
    with pytest.raises(ValueError, match="too small"):
        ms_ssim(plain(0, 10), plain(0, 10))


# --- CLIP ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_clip(tmp_path_factory.mktemp("clip"))


def test_clip_similarity_is_the_cosine_of_transformers_embeddings(clip: Path) -> None:
    a, b = noisy((64, 48), 60)
    model, processor = CLIPModel.from_pretrained(clip), CLIPImageProcessorPil.from_pretrained(clip)
    with torch.no_grad():
        pixels = processor(images=[a, b], return_tensors="pt")["pixel_values"]
        of_a, of_b = model(input_ids=torch.tensor([[0, 1]]), pixel_values=pixels).image_embeds
    expected = float(of_a @ of_b / of_a.norm() / of_b.norm())
    compare = clip_similarity(clip, "cpu")
    assert compare(a, b) == pytest.approx(expected, abs=1e-5)
    assert compare(a, a) == pytest.approx(1)
    assert compare(a, b) < 0.9999


def test_clip_is_compared_only_with_a_model(clip: Path) -> None:
    assert list(comparisons(None, "cpu")) == ["psnr", "ssim", "ms_ssim"]
    assert list(comparisons(clip, "cpu")) == [measure.name for measure in MEASURES]


def test_folders_without_a_clip_model_are_refused(clip: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"--clip .*config\.json is missing"):
        clip_similarity(tmp_path, "cpu")
    for name in ("config.json", "preprocessor_config.json"):
        (tmp_path / name).write_text((clip / name).read_text())
    with pytest.raises(InputError, match=r"--clip .*transformers cannot load it"):
        clip_similarity(tmp_path, "cpu")
    tensors = load_file(clip / "model.safetensors")
    del tensors["visual_projection.weight"]
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(InputError, match=r"is no CLIP model, it lacks visual_projection\.weight"):
        clip_similarity(tmp_path, "cpu")
