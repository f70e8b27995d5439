"""Folders of pictures and dataset files."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tiny_sdxl import write_pictures
from training import SQUARE, options

from lorashrink.errors import InputError, UsageError
from lorashrink.train.data.scanning import (
    Data,
    read_pixels,
    scan,
)
from lorashrink.train.flags.options import Options


def shown(data: Data) -> dict[str, int]:
    return {picture.path.name: picture.repeats for dataset in data.datasets for picture in dataset.pictures}


# --- folders ------------------------------------------------------------------------------------


def test_folders_give_repeats_words_and_captions_sorted_by_name(pictures: Path) -> None:
    data = scan(options(pictures))
    assert [(subset.folder.name, subset.repeats, subset.class_words) for subset in data.subsets] == [
        ("03_dog", 3, "dog"),
        ("2_big_cat", 2, "big_cat"),
    ]
    [dataset] = data.datasets
    assert [(picture.path.name, picture.caption) for picture in dataset.pictures] == [
        ("d.png", "nine, ten"),
        ("a.png", "one, two, three, four"),
        ("b.png", "five, six, seven"),
        ("c.png", "eight"),
    ]


def test_pictures_directly_in_the_parent_are_an_error(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_pictures(tmp_path, {"a.png": SQUARE, "b.png": SQUARE})
    with pytest.raises(InputError, match=r"no pictures to train on.*10_words"):
        scan(options(tmp_path))
    assert "2 pictures directly in" in caplog.text


def test_pictures_directly_in_the_parent_beside_good_folders_are_named(
    pictures: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_pictures(pictures, {"lost.png": SQUARE})
    assert "lost.png" not in shown(scan(options(pictures)))
    assert f"1 picture directly in {pictures}, not used" in caplog.text


@pytest.mark.parametrize("name", ["cat", "0_cat", "-1_cat", "x2_cat", "1.5_cat"])
def test_folders_without_a_number_of_repeats_are_ignored_with_a_warning(
    pictures: Path, caplog: pytest.LogCaptureFixture, name: str
) -> None:
    write_pictures(pictures / name, {"lost.png": SQUARE})
    assert "lost.png" not in shown(scan(options(pictures)))
    assert sum(record.message.count(f"{pictures / name} is ignored") for record in caplog.records) == 1


def test_a_missing_folder_is_named_with_its_option(tmp_path: Path, pictures: Path) -> None:
    with pytest.raises(InputError, match=r"nowhere.*--train_data_dir"):
        scan(options(tmp_path / "nowhere"))
    with pytest.raises(InputError, match=r"nowhere.*--reg_data_dir"):
        scan(options(pictures, reg_data_dir=str(tmp_path / "nowhere")))


@pytest.mark.parametrize("ending", ["png", "jpg", "jpeg", "webp", "bmp", "avif"])
def test_each_ending_is_found_in_lower_and_upper_case(tmp_path: Path, ending: str) -> None:
    folder = tmp_path / "1_x"
    write_pictures(folder, {f"a.{ending}": SQUARE, f"B.{ending.upper()}": SQUARE})
    (folder / "notes.md").write_text("no picture")
    assert set(shown(scan(options(tmp_path)))) == {f"a.{ending}", f"B.{ending.upper()}"}


def test_unreadable_pictures_are_left_out_named_and_counted_in_one_warning(
    pictures: Path, caplog: pytest.LogCaptureFixture
) -> None:
    bad = [pictures / "2_big_cat" / "bad.png", pictures / "2_big_cat" / "worse.jpg"]
    bad[0].write_bytes(b"no picture")
    bad[1].touch()
    data = scan(options(pictures))
    assert len(shown(data)) == 4
    [record] = [record for record in caplog.records if "left out" in record.message]
    assert "2 pictures" in record.message
    assert all(str(path) in record.message for path in bad)


def test_pictures_too_small_for_any_bucket_are_left_out(pictures: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_pictures(pictures / "1_small", {"small.png": (200, 8)})
    scan(options(pictures, enable_bucket=True, bucket_no_upscale=True, bucket_reso_steps=32))
    assert "small.png: a picture of 200x8" in caplog.text


def test_a_damaged_picture_is_named_when_its_pixels_are_read(pictures: Path) -> None:
    path = pictures / "2_big_cat" / "b.png"
    path.write_bytes(path.read_bytes()[:2000])
    [picture] = [candidate for candidate in scan(options(pictures)).datasets[0].pictures if candidate.path == path]
    assert picture.fit.original == SQUARE
    with pytest.raises(InputError, match=r"b\.png: cannot be read.*replace or remove"):
        read_pixels(picture)


def test_a_picture_that_changes_its_size_after_scanning_is_an_error(pictures: Path) -> None:
    picture = scan(options(pictures)).datasets[0].pictures[0]
    Image.new("RGB", (10, 10)).save(picture.path)
    with pytest.raises(InputError, match=r"d\.png: the picture was changed"):
        read_pixels(picture)


def test_pixels_of_a_picture_that_fits_are_its_own(pictures: Path) -> None:
    picture = scan(options(pictures)).datasets[0].pictures[0]
    assert np.array_equal(read_pixels(picture), np.asarray(Image.open(picture.path)))


def test_an_empty_caption_file_is_an_error_that_names_it(pictures: Path) -> None:
    (pictures / "2_big_cat" / "a.txt").write_text("")
    with pytest.raises(InputError, match=r"a\.txt"):
        scan(options(pictures))


def test_folder_words_replace_missing_captions_with_one_warning(
    pictures: Path, caplog: pytest.LogCaptureFixture
) -> None:
    data = scan(options(pictures, caption_extension=".caption"))
    assert {picture.caption for picture in data.datasets[0].pictures} == {"big_cat", "dog"}
    [record] = caplog.records
    assert record.message.startswith("4 pictures without a caption file")
    assert "d.caption" in record.message


def test_without_words_missing_captions_are_empty_with_one_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_pictures(tmp_path / "1_", {"a.png": SQUARE, "b.png": SQUARE})
    data = scan(options(tmp_path))
    assert [picture.caption for picture in data.datasets[0].pictures] == ["", ""]
    [record] = caplog.records
    assert record.message.startswith("2 pictures without a caption file")
    assert "empty" in record.message


@pytest.mark.parametrize(
    ("dataset", "named"),
    [
        ("", "--resolution is missing"),
        ("resolution = 'big'", r"data\.toml: resolution=big"),
        ("resolution = 60", "multiples of 8"),
        ("resolution = 64\nbatch_size = 0", r"data\.toml: batch_size=0: must be at least 1"),
        ("resolution = 64\nbucket_reso_steps = 48", r"data\.toml: bucket_reso_steps=48: must be a multiple of 32"),
        ("resolution = 64\nenable_bucket = true\nmin_bucket_reso = 128", "min_bucket_reso=128"),
        ("resolution = 2048\nenable_bucket = true", "max_bucket_reso=1024"),
    ],
)
def test_contradictory_sizes_in_a_dataset_file_are_refused(
    pictures: Path, tmp_path: Path, dataset: str, named: str
) -> None:
    path = toml(tmp_path / "data.toml", config(pictures, dataset=dataset))
    with pytest.raises(UsageError, match=named):
        scan(Options(dataset_config=path))


# --- regularisation pictures --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("folder", "count", "expected"),
    [
        # 9 training pictures with repeats: each regularisation picture is shown 9 / count times, first ones more often.
        ("1_cat", 1, [9]),
        ("1_cat", 2, [5, 4]),
        ("2_cat", 4, [3, 2, 2, 2]),
        ("1_cat", 9, [1] * 9),
        ("4_cat", 4, [4, 4, 1]),
        ("1_cat", 11, [1] * 9),
    ],
)
def test_regularisation_pictures_are_shown_as_often_as_the_others(
    pictures: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, folder: str, count: int, expected: list[int]
) -> None:
    write_pictures(tmp_path / "reg" / folder, {f"r{index:02}.png": SQUARE for index in range(count)})
    data = scan(options(pictures, reg_data_dir=str(tmp_path / "reg")))
    regs = [picture.repeats for picture in data.datasets[0].pictures if picture.subset.is_reg]
    assert regs == expected
    assert sum(shown(data).values()) == 18
    showings_of_reg = int(folder[0]) * count
    assert ("regularisation pictures" in caplog.text) == (showings_of_reg > 9)


# --- dataset files ------------------------------------------------------------------------------


def toml(path: Path, text: str) -> str:
    path.write_text(text, encoding="utf-8")
    return str(path)


def test_dataset_keys_are_inherited_from_sections_and_options(pictures: Path, tmp_path: Path) -> None:
    path = toml(
        tmp_path / "data.toml",
        f"""
        [general]
        shuffle_caption = true
        keep_tokens = 1
        caption_extension = ".txt"
        enable_bucket = true
        bucket_reso_steps = 32

        [[datasets]]
        resolution = 64
        batch_size = 4
        min_bucket_reso = 32
        keep_tokens = 2
        [[datasets.subsets]]
        image_dir = {json.dumps(str(pictures / "2_big_cat"))}
        class_tokens = "a cat"
        num_repeats = 5
        keep_tokens = 3
        flip_aug = true
        color_aug = false
        resize_interpolation = "lanczos"
        [[datasets.subsets]]
        image_dir = {json.dumps(str(pictures / "03_dog"))}
        is_reg = true

        [[datasets]]
        resolution = [128, 96]
        min_bucket_reso = 64
        [[datasets.subsets]]
        image_dir = {json.dumps(str(pictures / "03_dog"))}
        caption_dropout_rate = 0.25
        """,
    )
    data = scan(
        Options(
            dataset_config=path,
            dataset_repeats=7,
            train_batch_size=2,
            caption_dropout_rate=0.5,
            max_bucket_reso=256,
            shuffle_caption=False,
        )
    )
    first, second = data.datasets
    names = ("resolution", "enable_bucket", "min_bucket_reso", "max_bucket_reso", "train_batch_size")
    assert [getattr(first.options, name) for name in names] == ["64", True, 32, 256, 4]
    assert [getattr(second.options, name) for name in names] == ["128,96", True, 64, 256, 2]
    assert [(subset.folder.name, subset.repeats, subset.class_words, subset.is_reg) for subset in data.subsets] == [
        ("2_big_cat", 5, "a cat", False),
        ("03_dog", 7, "", True),
        ("03_dog", 7, "", False),
    ]
    names = ("keep_tokens", "caption_dropout_rate", "flip_aug", "resize_interpolation")
    assert [[getattr(subset.options, name) for name in names] for subset in data.subsets] == [
        [3, 0.5, True, "lanczos"],
        [2, 0.5, False, None],
        [1, 0.25, False, None],
    ]
    assert {(subset.options.caption_extension, subset.options.shuffle_caption) for subset in data.subsets} == {
        (".txt", True)
    }
    # Evened out within its dataset: one regularisation picture for 3 pictures shown 5 times.
    assert [picture.repeats for picture in first.pictures] == [5, 5, 5, 15]
    assert [picture.repeats for picture in second.pictures] == [7]


def config(pictures: Path, *, top: str = "", dataset: str = "", subset: str = "", folder: str = "2_big_cat") -> str:
    return f"""
        {top}
        [[datasets]]
        {dataset}
        [[datasets.subsets]]
        image_dir = {json.dumps(str(pictures / folder))}
        {subset}
        """


@pytest.mark.parametrize(
    ("part", "text", "named"),
    [
        ("subset", "num_repeat = 2", r"num_repeat \(did you mean num_repeats"),
        ("subset", "batch_size = 2", r"batch_size \(it belongs in \[\[datasets\]\]"),
        ("dataset", "is_reg = true", r"is_reg \(it belongs in \[\[datasets.subsets\]\]"),
        ("top", "[general]\nkeep_tokns = 1", r"keep_tokns \(did you mean keep_tokens"),
        ("top", "[generl]\nkeep_tokens = 1", "no such section: generl"),
        ("subset", 'metadata_file = "meta.json"', "not supported: metadata_file"),
        ("subset", 'conditioning_data_dir = "x"', "not supported: conditioning_data_dir"),
        ("top", "[general]\ncolor_aug = true", "not supported: color_aug"),
        ("subset", "token_warmup_step = 10", "not supported: token_warmup_step"),
        ("dataset", "enable_wildcard = true", "not supported: enable_wildcard"),
        ("dataset", "validation_split = 0.1", "not supported: validation_split"),
        ("subset", 'num_repeats = "two"', "num_repeats must be a whole number"),
        ("subset", "flip_aug = 1", "flip_aug must be true or false"),
        ("subset", "class_tokens = 1", "class_tokens must be text"),
        ("subset", "keep_tokens = true", "keep_tokens must be a whole number"),
        ("subset", "caption_dropout_rate = 7", "caption_dropout_rate=7.0: must be between 0 and 1"),
        ("dataset", "resolution = 1.5", "resolution=1.5: must be one size or width,height"),
        ("dataset", 'resize_interpolation = "magic"', "resize_interpolation must be one of lanczos"),
    ],
)
def test_mistakes_in_a_dataset_file_are_named_with_the_file(
    pictures: Path, tmp_path: Path, part: str, text: str, named: str
) -> None:
    path = toml(tmp_path / "data.toml", config(pictures, **{part: text}))
    with pytest.raises(UsageError, match=rf"data\.toml: .*{named}"):
        scan(Options(dataset_config=path, resolution="64"))


def test_values_that_change_nothing_are_accepted_in_a_dataset_file(pictures: Path, tmp_path: Path) -> None:
    nothing = "color_aug = false\nrandom_crop = false\nvalidation_split = 0.0\nnetwork_multiplier = 1.0"
    path = toml(tmp_path / "data.toml", config(pictures, dataset=nothing, subset="alpha_mask = false"))
    assert len(shown(scan(Options(dataset_config=path, resolution="64", caption_extension=".txt")))) == 3


def test_a_subset_shown_zero_times_is_dropped(pictures: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = toml(tmp_path / "data.toml", config(pictures))
    with pytest.raises(InputError, match=r"data\.toml: no pictures"):
        scan(Options(dataset_config=path, resolution="64", dataset_repeats=0))
    assert "2_big_cat is ignored: it is shown 0 times" in caplog.text


def test_errors_and_warnings_name_a_key_where_the_value_is_from_the_file_and_else_the_option(
    pictures: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = toml(tmp_path / "data.toml", config(pictures, dataset="min_bucket_reso = 40\nmax_bucket_reso = 100"))
    scan(Options(dataset_config=path, resolution="64", enable_bucket=True, bucket_reso_steps=32))
    assert "min_bucket_reso=40 is no multiple of --bucket_reso_steps=32" in caplog.text
    assert "--min_bucket_reso" not in caplog.text


def test_a_folder_of_a_dataset_file_that_is_not_there_is_named(pictures: Path, tmp_path: Path) -> None:
    path = toml(tmp_path / "data.toml", config(pictures, folder="nowhere"))
    with pytest.raises(InputError, match=r"data\.toml: image_dir .*nowhere"):
        scan(Options(dataset_config=path, resolution="64"))


def test_pictures_that_a_note_turns_are_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = write_pictures(tmp_path / "1_x", {"a.png": SQUARE, "b.jpg": SQUARE})
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn
    Image.open(folder / "b.jpg").save(folder / "b.jpg", exif=exif)
    scan(options(tmp_path))
    assert "1 picture turned only by a note" in caplog.text
    assert "save upright" in caplog.text


def test_files_that_are_unused_cut_or_changed_are_named_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A line for each kind, with the number of files and the first of them."""
    names = [f"{letter}.png" for letter in "abcdef"]
    folder = write_pictures(tmp_path / "1_x", dict.fromkeys(names, SQUARE), dict.fromkeys(names, "a cat"))
    Image.open(folder / "b.png").convert("RGBA").save(folder / "b.png")
    Image.new("P", SQUARE).save(folder / "c.png", transparency=0)
    frames = [Image.new("RGB", SQUARE, colour) for colour in ("red", "blue")]
    frames[0].save(folder / "d.png", save_all=True, append_images=frames[1:])
    Image.fromarray(np.full(SQUARE, 0x4000, np.uint16)).save(folder / "e.png")
    Image.new("F", SQUARE).save(folder / "f.tiff")
    (folder / "f.tiff").replace(folder / "f.png")
    for name in ("g.gif", "h.TIFF", "i.jfif", "j.heic"):
        (folder / name).touch()
    write_pictures(folder / "more" / "deep", {"k.png": SQUARE}, {"k.png": "a cat"})
    (folder / "a.txt").write_text("a cat\n\nmore of it\n")
    (folder / "b.txt").write_text("\n")
    (folder / "lost.txt").write_text("a dog")
    data = scan(options(tmp_path))
    assert list(shown(data)) == ["a.png", "b.png", "c.png", "d.png", "e.png"]
    lines = [record.message for record in caplog.records]
    for number, words, files in (
        (1, "left out", "f.png"),
        (2, "transparency", "b.png c.png"),
        (1, "animated", "d.png"),
        (1, "16-bit grey", "e.png"),
        (4, "ending that is not read", "g.gif h.TIFF i.jfif 1 more"),
        (1, "in a folder inside", "k.png"),
        (1, "caption file with a blank first line", "b.txt"),
        (1, "more than one line", "a.txt"),
        (1, "no picture has its name", "lost.txt"),
    ):
        [line] = [line for line in lines if words in line]
        assert line.startswith(f"{number} ")
        assert all(file in line for file in files.replace("1 more", "").split())
    assert len(lines) == 9


def test_sixteen_bits_of_grey_are_scaled_to_eight(tmp_path: Path) -> None:
    folder = write_pictures(tmp_path / "1_x", {"a.png": SQUARE}, {"a.png": "a cat"})
    Image.fromarray(np.full(SQUARE, 0x40FF, np.uint16)).save(folder / "a.png")
    [picture] = scan(options(tmp_path)).pictures
    assert np.unique(read_pixels(picture)).tolist() == [0x40]


def test_a_nested_folder_with_a_section_of_its_own_is_used(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    outer = write_pictures(tmp_path / "outer", {"a.png": SQUARE}, {"a.png": "a cat"})
    write_pictures(outer / "inner", {"b.png": SQUARE}, {"b.png": "a dog"})
    sections = "".join(f"[[datasets.subsets]]\nimage_dir = '{folder}'\n" for folder in (outer, outer / "inner"))
    path = toml(tmp_path / "data.toml", f"[[datasets]]\n{sections}")
    assert len(shown(scan(Options(dataset_config=path, resolution="64", caption_extension=".txt")))) == 2
    assert not caplog.records


def test_all_unknown_keys_of_a_dataset_file_are_named_at_once(pictures: Path, tmp_path: Path) -> None:
    parts = {"top": "[general]\nkeep_tokns = 1", "dataset": "is_reg = true", "subset": "num_repeat = 2\nfoobar = 3"}
    path = toml(tmp_path / "data.toml", config(pictures, **parts) + "[generl]\nseed = 1\n")
    with pytest.raises(UsageError) as caught:
        scan(Options(dataset_config=path, resolution="64"))
    assert str(caught.value) == (
        f"{path}: no such section: generl (there are [general] and [[datasets]]); "
        "no such key in [general]: keep_tokns (did you mean keep_tokens?); "
        "no such key in [[datasets]]: is_reg (it belongs in [[datasets.subsets]]); "
        "no such key in [[datasets.subsets]]: num_repeat (did you mean num_repeats?); "
        "no such key in [[datasets.subsets]]: foobar"
    )
