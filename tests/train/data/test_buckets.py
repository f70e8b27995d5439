"""Buckets against hand arithmetic and sd-scripts' tables; resizing against OpenCV's results and exact fractions."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from lorashrink.errors import InputError
from lorashrink.train.data.buckets import Fit, Size, bucket_table, fit, prepare, to_pixels
from lorashrink.train.flags.options import Options


def rules(
    resolution: Size = (1024, 1024),
    *,
    minimum: int = 256,
    maximum: int = 1024,
    step: int = 32,
    enabled: bool = True,
    upscale: bool = True,
) -> Options:
    return Options(
        resolution=f"{resolution[0]},{resolution[1]}",
        enable_bucket=enabled,
        min_bucket_reso=minimum,
        max_bucket_reso=maximum,
        bucket_reso_steps=step,
        bucket_no_upscale=not upscale,
    )


def placed(size: Size, bucket_rules: Options) -> Fit:
    return fit(size, bucket_rules, bucket_table(bucket_rules))


def pattern(width: int, height: int) -> npt.NDArray[np.uint8]:
    """The picture whose OpenCV results are stored below."""
    row, column, channel = np.indices((height, width, 3))
    return ((row * row * 37 + column * 101 + column * row * 13 + channel * 53) % 256).astype(np.uint8)


def resized(pixels: npt.NDArray[np.uint8], size: Size, interpolation: str | None = None) -> npt.NDArray[np.uint8]:
    image = Image.fromarray(pixels)
    return prepare(image, Fit(image.size, size, size), interpolation)


# --- the table


@pytest.mark.parametrize(("maximum", "count"), [(1024, 49), (2048, 81)])
def test_there_are_as_many_buckets_as_in_sd_scripts(maximum: int, count: int) -> None:
    table = bucket_table(rules(maximum=maximum))
    assert len(table) == count
    assert table == tuple(sorted(set(table)))
    assert {(height, width) for width, height in table} == set(table)


def test_the_table_of_512_in_steps_of_64_is_that_of_hand_arithmetic() -> None:
    # 262144 / 256 = 1024, / 320 = 819 -> 768, / 384 = 682 -> 640, / 448 = 585 -> 576, / 512 = 512, / 576 = 455 -> 448,
    # / 640 = 409 -> 384, / 704 = 372 -> 320, / 768 = 341 -> 320, / 832 = 315 -> 256, / 896, / 960, / 1024 -> 256.
    wide = [(1024, 256), (960, 256), (896, 256), (832, 256), (768, 320), (704, 320), (640, 384), (576, 448)]
    expected = {*wide, (512, 512), *((height, width) for width, height in wide)}
    assert bucket_table(rules((512, 512), step=64)) == tuple(sorted(expected))


def test_a_maximum_equal_to_the_resolution_clamps_one_side_of_every_bucket() -> None:
    # Widths 256 .. 1024 in steps of 64 are 13; each goes with 1024, both ways round, and 1024x1024 is its own mirror.
    table = bucket_table(rules(step=64))
    assert len(table) == 25
    assert all(1024 in size for size in table)


def test_the_area_of_a_resolution_counts_and_not_its_shape() -> None:
    table = bucket_table(rules((1024, 768)))
    assert table == bucket_table(rules((768, 1024)))
    # sqrt(786432) = 886.8 -> 864; 786432 / 1024 = 768
    assert {(864, 864), (1024, 768)} < set(table)


def test_no_side_is_shorter_than_the_minimum() -> None:
    # With sides of at least 512 and an area of 512x512 only the square is left.
    assert bucket_table(rules((512, 512), minimum=512, step=64)) == ((512, 512),)


def test_a_minimum_and_maximum_off_the_steps_are_widened() -> None:
    odd = rules((512, 512), minimum=300, maximum=1000, step=64)
    assert bucket_table(odd) == bucket_table(rules((512, 512), minimum=256, maximum=1024, step=64))


def test_without_buckets_the_resolution_is_the_only_shape() -> None:
    assert bucket_table(rules((832, 1216), enabled=False)) == ((832, 1216),)
    assert bucket_table(rules((832, 1216), enabled=False, upscale=False)) == ((832, 1216),)


def test_without_enlarging_there_is_no_table() -> None:
    assert bucket_table(rules(upscale=False)) == ()


# --- the bucket of a picture


@pytest.mark.parametrize(
    ("size", "maximum", "bucket", "scaled", "crop"),
    [
        # the specification's examples; the size before the cut by hand: 1000 * 1024 / 1500 = 682.7
        ((1500, 1000), 1024, (1024, 672), (1024, 683), (0, 5)),
        ((1920, 1080), 1024, (1024, 576), (1024, 576), (0, 0)),
        ((1500, 1000), 2048, (1248, 832), (1248, 832), (0, 0)),
        # 1920 * 768 / 1080 = 1365.3
        ((1920, 1080), 2048, (1344, 768), (1365, 768), (10, 0)),
        ((1080, 1920), 2048, (768, 1344), (768, 1365), (0, 10)),
        ((300, 300), 1024, (1024, 1024), (1024, 1024), (0, 0)),
        # flatter than any bucket: 5000 * 256 / 500 = 2560
        ((5000, 500), 1024, (1024, 256), (2560, 256), (768, 0)),
    ],
)
def test_a_picture_goes_to_the_bucket_of_the_nearest_shape_and_covers_it(
    size: Size, maximum: int, bucket: Size, scaled: Size, crop: Size
) -> None:
    fitted = placed(size, rules(maximum=maximum))
    assert fitted == Fit(size, scaled, bucket)
    assert fitted.crop == crop


def test_of_two_equally_near_shapes_the_first_wins() -> None:
    assert fit((150, 100), rules(), ((512, 512), (1024, 512))).bucket == (512, 512)
    assert fit((150, 100), rules(), ((1024, 512), (512, 512))).bucket == (1024, 512)


def test_a_picture_of_a_bucket_s_own_size_stays_as_it_is() -> None:
    assert fit((512, 1024), rules(), ((256, 512), (512, 1024))) == Fit((512, 1024), (512, 1024), (512, 1024))


def test_without_buckets_a_picture_is_resized_to_cover_the_resolution() -> None:
    # 1500 * 512 / 1000 = 768, of which the middle 512 remain
    fitted = placed((1500, 1000), rules((512, 512), enabled=False))
    assert fitted == Fit((1500, 1000), (768, 512), (512, 512))
    assert fitted.crop == (128, 0)


@pytest.mark.parametrize(
    ("size", "scaled", "bucket"),
    [
        # small enough: only cut
        ((700, 500), (700, 500), (640, 448)),
        ((1024, 1024), (1024, 1024), (1024, 1024)),
        # 1448.2 x 724.1: by width 1408x704, by height 1408x704, a tie
        ((2000, 1000), (1408, 704), (1408, 704)),
        # 1007.9 x 1040.4, aspect 0.96875: by width 960x960 (1), by height 960x1024 (0.9375): a tie (0.03125)
        ((1240, 1280), (992, 1024), (960, 1024)),
        # 1254.1 x 836.1, aspect 1.5: by width 1216x768 (1.583), by height 1216x832 (1.462), which is nearer
        ((3000, 2000), (1248, 832), (1216, 832)),
        # 836.1 x 1254.1, aspect 0.6667: by width 832x1216 (0.684), by height 768x1216 (0.632); the width is nearer
        ((2000, 3000), (832, 1248), (832, 1216)),
    ],
)
def test_without_enlarging_a_bucket_follows_its_picture(size: Size, scaled: Size, bucket: Size) -> None:
    assert placed(size, rules(step=64, upscale=False)) == Fit(size, scaled, bucket)


def test_a_picture_of_just_the_resolution_s_area_is_not_resized() -> None:
    assert placed((1000, 1000), rules((1000, 1000), step=64, upscale=False)).resized == (1000, 1000)


@pytest.mark.parametrize("size", [(500, 63), (60, 60), (60000, 50)])
def test_a_side_too_short_for_one_step_is_an_input_error(size: Size) -> None:
    with pytest.raises(InputError, match=f"{size[0]}x{size[1]} pixels has a side that is too short"):
        placed(size, rules(step=64, upscale=False))


SIDES = st.integers(64, 6000)


@given(
    size=st.tuples(SIDES, SIDES),
    resolution=st.tuples(*[st.integers(256, 1024)] * 2),
    step=st.sampled_from([32, 64]),
    enabled=st.booleans(),
)
def test_every_picture_covers_its_bucket_and_one_side_is_used_whole(
    size: Size, resolution: Size, step: int, enabled: bool
) -> None:
    given_rules = rules(resolution, step=step, enabled=enabled)
    fitted = placed(size, given_rules)
    spare = [fitted.resized[axis] - fitted.bucket[axis] for axis in (0, 1)]
    assert fitted.bucket in bucket_table(given_rules)
    assert min(spare) == 0
    # The resized picture has the original's shape, up to the rounding of one side.
    assert abs(fitted.resized[0] * size[1] - fitted.resized[1] * size[0]) <= max(size)


@given(size=st.tuples(st.integers(300, 3000), st.integers(300, 3000)), step=st.sampled_from([32, 64]))
def test_without_enlarging_no_side_grows_and_less_than_a_step_is_lost(size: Size, step: int) -> None:
    fitted = placed(size, rules(step=step, upscale=False))
    for axis in (0, 1):
        assert fitted.resized[axis] <= size[axis]
        assert 0 <= fitted.resized[axis] - fitted.bucket[axis] < step
        assert fitted.bucket[axis] % step == 0


# --- SDXL's size numbers


@pytest.mark.parametrize(
    ("size", "bucket", "plain", "mirrored"),
    [
        # 672 * 1.5 = 1008 wide in 1024: 8 on either side
        ((1500, 1000), (1024, 672), (1000, 1500, 0, 8, 672, 1024), (1000, 1500, 0, 8, 672, 1024)),
        # 1344 / (1920 / 1080) = 756 high in 768
        ((1920, 1080), (1344, 768), (1080, 1920, 6, 0, 768, 1344), (1080, 1920, 6, 0, 768, 1344)),
        # 1005 wide in 1024: 9 on the left, 10 on the right, which a mirror exchanges
        ((1005, 672), (1024, 672), (672, 1005, 0, 9, 672, 1024), (672, 1005, 0, 10, 672, 1024)),
        # 1005 high in 1024: top and bottom stay
        ((672, 1005), (672, 1024), (1005, 672, 9, 0, 1024, 672), (1005, 672, 9, 0, 1024, 672)),
        ((300, 300), (1024, 1024), (300, 300, 0, 0, 1024, 1024), (300, 300, 0, 0, 1024, 1024)),
    ],
)
def test_time_ids_are_those_of_hand_arithmetic(
    size: Size, bucket: Size, plain: tuple[int, ...], mirrored: tuple[int, ...]
) -> None:
    fitted = Fit(size, bucket, bucket)
    assert fitted.time_ids(False) == plain
    assert fitted.time_ids(True) == mirrored
    assert all(type(number) is int for number in (*fitted.time_ids(False), *fitted.time_ids(True)))


# --- resizing


@pytest.mark.parametrize(
    ("size", "red"),
    [
        # cv2.resize(pattern(..), size, interpolation=cv2.INTER_AREA)[..., 0] of OpenCV 5.0.0
        ((7, 5, 3, 2), [[80, 115, 150], [136, 125, 115]]),
        ((9, 4, 5, 3), [[56, 120, 156, 156, 114], [89, 76, 134, 120, 107], [127, 143, 116, 88, 104]]),
        (
            (10, 6, 4, 6),
            [
                [81, 118, 176, 111],
                [77, 146, 135, 101],
                [96, 94, 65, 63],
                [138, 167, 70, 99],
                [151, 109, 148, 106],
                [136, 125, 147, 136],
            ],
        ),
    ],
)
def test_shrinking_equals_opencv_s_area_within_one_level(size: tuple[int, int, int, int], red: list[list[int]]) -> None:
    width, height, *new = size
    result = resized(pattern(width, height), (new[0], new[1]))[..., 0].astype(int)
    assert np.abs(result - np.array(red)).max() <= 1


def exact_area(pixels: npt.NDArray[np.uint8], size: Size) -> list[list[Fraction]]:
    """The mean of what each new pixel covers of the first channel, in fractions and with no array arithmetic."""

    def shares(old: int, new: int, index: int) -> list[tuple[int, Fraction]]:
        start, end = Fraction(index * old, new), Fraction((index + 1) * old, new)
        fitted = ((source, min(end, source + 1) - max(start, source)) for source in range(old))
        return [(source, part * new / old) for source, part in fitted if part > 0]

    height, width = pixels.shape[:2]
    return [
        [
            sum(
                (int(pixels[y, x, 0]) * down * across)
                for y, down in shares(height, size[1], row)
                for x, across in shares(width, size[0], column)
            )
            for column in range(size[0])
        ]
        for row in range(size[1])
    ]


@given(data=st.data(), old=st.tuples(st.integers(1, 13), st.integers(1, 13)), seed=st.integers(0, 99))
def test_area_means_are_exact_up_to_rounding(data: st.DataObject, old: Size, seed: int) -> None:
    new = (data.draw(st.integers(1, old[0])), data.draw(st.integers(1, old[1])))
    pixels = np.random.default_rng(seed).integers(0, 256, (old[1], old[0], 3), dtype=np.uint8)
    result = resized(pixels, new, "area")
    assert result.shape == (new[1], new[0], 3)
    for row, line in enumerate(exact_area(pixels, new)):
        for column, value in enumerate(line):
            assert abs(int(result[row, column, 0]) - value) <= Fraction(501, 1000)


def test_halving_takes_the_mean_of_four_pixels() -> None:
    pixels = np.zeros((2, 2, 3), np.uint8)
    pixels[:, :, 0] = [[10, 20], [30, 40]]
    pixels[:, :, 2] = 255
    assert resized(pixels, (1, 1)).tolist() == [[[25, 0, 255]]]


@pytest.mark.parametrize(
    ("size", "choice", "pil"),
    [
        ((9, 8), None, Image.Resampling.LANCZOS),  # both sides grow
        ((9, 3), None, Image.Resampling.LANCZOS),  # one side grows
        ((3, 3), "lanczos", Image.Resampling.LANCZOS),
        ((3, 3), "nearest", Image.Resampling.NEAREST),
        ((9, 8), "bilinear", Image.Resampling.BILINEAR),
        ((9, 8), "linear", Image.Resampling.BILINEAR),
        ((9, 8), "bicubic", Image.Resampling.BICUBIC),
        ((9, 8), "cubic", Image.Resampling.BICUBIC),
    ],
)
def test_the_filter_is_the_chosen_one_or_lanczos_where_a_side_grows(
    size: Size, choice: str | None, pil: Image.Resampling
) -> None:
    expected = np.asarray(Image.fromarray(pattern(7, 5)).resize(size, pil))
    assert np.array_equal(resized(pattern(7, 5), size, choice), expected)


def test_a_side_that_stays_still_means_area() -> None:
    assert np.array_equal(resized(pattern(7, 5), (7, 2)), resized(pattern(7, 5), (7, 2), "area"))
    assert not np.array_equal(resized(pattern(7, 5), (7, 2)), resized(pattern(7, 5), (7, 2), "lanczos"))


def test_the_middle_of_a_picture_is_cut_out() -> None:
    image = Image.fromarray(pattern(9, 6))
    # 9 - 4 = 5 to lose in width: 2 on the left; 6 - 3 = 3 in height: 1 at the top
    result = prepare(image, Fit((9, 6), (9, 6), (4, 3)), None)
    assert np.array_equal(result, pattern(9, 6)[1:4, 2:6])
    assert result.dtype == np.uint8


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "LA", "CMYK", "1"])
def test_pictures_of_every_mode_become_three_channels(mode: str) -> None:
    image = Image.new("RGB", (8, 6), (255, 255, 255)).convert(mode)
    result = prepare(image, Fit((8, 6), (4, 3), (4, 2)), None)
    assert result.shape == (2, 4, 3)
    assert (result == 255).all()


def test_a_rotation_noted_in_the_file_is_not_applied(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # orientation: rotate by 90 degrees
    Image.fromarray(pattern(8, 6)).save(tmp_path / "a.png", exif=exif)
    with Image.open(tmp_path / "a.png") as image:
        assert np.array_equal(prepare(image, Fit((8, 6), (8, 6), (8, 6)), None), pattern(8, 6))


# --- what the VAE takes


def test_pixels_run_from_minus_one_to_one_with_channels_first() -> None:
    array = np.array([[[0, 255, 51], [255, 0, 204]]], np.uint8)
    pixels = to_pixels(array, False)
    expected = torch.tensor([[[-1.0, 1.0]], [[1.0, -1.0]], [[-0.6, 0.6]]])
    torch.testing.assert_close(pixels, expected, rtol=0, atol=1e-6)
    assert pixels.dtype == torch.float32
    assert pixels.is_contiguous()


def test_a_mirrored_picture_is_reversed_from_left_to_right() -> None:
    array = pattern(5, 4)
    assert torch.equal(to_pixels(array, True), to_pixels(array, False).flip(-1))
    assert np.array_equal(array, pattern(5, 4))
