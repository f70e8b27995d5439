"""Latents and captions that are encoded once: in memory, latents in files too, and files that no longer fit."""

from __future__ import annotations

import copy
import logging
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_sdxl
import torch
from PIL import Image
from torch import Tensor
from training import files_no_larger_than

from lorashrink.errors import InputError, NonFinite, OutputError, UsageError
from lorashrink.train.data.batches import Batch, Loader
from lorashrink.train.data.caches import LatentCache, cache_latents, cache_texts, posterior
from lorashrink.train.data.scanning import Data, Picture, scan
from lorashrink.train.flags.options import Options
from lorashrink.train.model.loading import Encoded, Model, encode, encode_pixels, load_model, tokenize

SEED = 3
# Two buckets: c.png goes to 32x128, the others to 64x64.
SIZES = {"a.png": (64, 64), "b.png": (96, 64), "c.png": (32, 120), "d.png": (130, 140)}
CAPTIONS = {"a.png": "a cat, red", "b.png": "a cat, blue", "c.png": "a cat, green", "d.png": "a cat, red"}
Arrays = dict[str, np.ndarray]
Damage = Callable[[Path], object]  # of the file at this path


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    folder = tiny_sdxl.write_model(tmp_path_factory.mktemp("tiny") / "model")
    return load_model(Options(pretrained_model_name_or_path=str(folder)), torch.device("cpu"))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The folder of the pictures, inside the one for --train_data_dir."""
    return tiny_sdxl.write_pictures(tmp_path / "train" / "2_cat", SIZES, CAPTIONS)


@pytest.fixture
def single(tmp_path: Path) -> Path:
    """A folder of one picture of 64x64."""
    return tiny_sdxl.write_pictures(tmp_path / "single" / "1_cat", {"a.png": (64, 64)}, {"a.png": "a cat"})


def options(folder: Path, **change: Any) -> Options:
    return Options(
        **{
            "train_data_dir": str(folder.parent),
            "resolution": "64",
            "enable_bucket": True,
            "min_bucket_reso": 32,
            "max_bucket_reso": 128,
            "bucket_reso_steps": 32,
            "caption_extension": ".txt",
            "max_data_loader_n_workers": 0,
            "cache_latents_to_disk": True,
        }
        | change
    )


def pictures(data: Data) -> list[Picture]:
    return data.pictures


def latents(chosen: Options, vae: torch.nn.Module, **where: Any) -> LatentCache:
    return cache_latents(scan(chosen), vae, chosen, **{"seed": SEED, "rank": 0, "world": 1} | where)


def texts(chosen: Options, model: Model) -> dict[str, Encoded]:
    return cache_texts(scan(chosen), model, chosen)


def fresh(chosen: Options, vae: torch.nn.Module) -> list[Tensor]:
    """Latents that no file has touched, of each picture as it is."""
    in_memory = replace(chosen, cache_latents_to_disk=False)
    cache = latents(in_memory, vae)
    return [cache.get(picture, False) for picture in pictures(scan(in_memory))]


def all_equal(left: list[Tensor], right: list[Tensor]) -> bool:
    return len(left) == len(right) and all(torch.equal(*pair) for pair in zip(left, right, strict=True))


def got(cache: LatentCache, chosen: Options) -> list[Tensor]:
    return [cache.get(picture, False) for picture in pictures(scan(chosen))]


def parts(encoded: Encoded) -> list[Tensor]:
    return [encoded.hidden1, encoded.hidden2, encoded.pooled]


def files(folder: Path) -> dict[str, bytes]:
    """What all files but pictures and captions hold."""
    kept = (path for path in folder.iterdir() if path.suffix not in {".png", ".jpg", ".txt"})
    return {path.name: path.read_bytes() for path in kept}


def read(path: Path) -> Arrays:
    with path.open("rb") as file, np.load(file) as arrays:
        return dict(arrays)


def write(path: Path, arrays: dict[str, Any]) -> None:
    with path.open("wb") as file:
        np.savez(file, **arrays)


# --- equal results ------------------------------------------------------------------------------


def batches(chosen: Options, cache: LatentCache | None, captions: dict[str, Encoded] | None = None) -> list[Batch]:
    return list(Loader(scan(chosen), chosen, SEED, 0, 1, cache, captions).epoch(1))


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("flip", [False, True])
def test_cached_latents_equal_latents_encoded_in_training(flip: bool, workers: int, folder: Path, model: Model) -> None:
    plain = options(folder, flip_aug=flip, train_batch_size=2, dataset_repeats=4)
    working = replace(plain, max_data_loader_n_workers=workers)
    all_pictures = pictures(scan(plain))
    cached = [
        latents(replace(working, cache_latents_to_disk=False), model.vae),
        latents(working, model.vae),  # writes the files
        latents(working, model.vae),  # finds them
    ]
    assert [cache.memory is not None for cache in cached] == [True, False, False]
    uncached = batches(plain, None)
    assert {flipped for batch in uncached for flipped in batch.flipped} == ({False, True} if flip else {False})
    assert {picture.fit.bucket for picture in all_pictures} == {(64, 64), (32, 128)}
    for cache in cached:
        for expected, batch in zip(uncached, batches(working, cache), strict=True):
            assert (batch.draws, batch.captions, batch.flipped) == (expected.draws, expected.captions, expected.flipped)
            assert batch.pixels is None
            encoded = [
                encode_pixels(model.vae, pixels[None], [posterior(SEED, all_pictures[draw.picture], flipped)])
                for pixels, draw, flipped in zip(expected.pixels, expected.draws, expected.flipped, strict=True)
            ]
            assert batch.latents.dtype == torch.float32
            assert torch.equal(batch.latents, torch.cat(encoded))


def test_encoding_several_pictures_at_once_changes_rounding_only(folder: Path, model: Model) -> None:
    alone = options(folder, flip_aug=True, cache_latents_to_disk=False)
    single, several = (latents(replace(alone, vae_batch_size=size), model.vae) for size in (1, 2))
    for picture in pictures(scan(alone)):
        for flipped in (False, True):
            torch.testing.assert_close(
                several.get(picture, flipped), single.get(picture, flipped), rtol=1e-4, atol=1e-5
            )
        assert not torch.allclose(single.get(picture, False), single.get(picture, True).flip(-1), atol=0.1)


def test_cached_captions_equal_those_encoded_in_training(folder: Path, model: Model) -> None:
    chosen = options(folder)
    cache = texts(chosen, model)
    for picture in pictures(scan(chosen)):
        tokens = [tokenize(tokenizer, [picture.caption], None) for tokenizer in model.tokenizers]
        assert all_equal(parts(cache[picture.caption]), parts(encode(model.encoders, *tokens)))


def test_encoding_several_captions_at_once_changes_rounding_only(folder: Path, model: Model) -> None:
    alone = options(folder)
    single, several = (texts(replace(alone, text_encoder_batch_size=size), model) for size in (None, 2))
    for picture in pictures(scan(alone)):
        of_both = (parts(cache[picture.caption]) for cache in (single, several))
        for one_by_one, together in zip(*of_both, strict=True):
            torch.testing.assert_close(together, one_by_one, rtol=1e-4, atol=1e-5)


def test_batches_join_what_is_cached_of_their_captions(folder: Path, model: Model) -> None:
    chosen = options(folder, train_batch_size=2, caption_prefix="photo of")
    cache = texts(chosen, model)
    all_pictures = pictures(scan(chosen))
    for batch in batches(chosen, None, cache):
        entries = [cache[f"photo of {all_pictures[draw.picture].caption}"] for draw in batch.draws]
        assert all_equal(parts(batch.text), [torch.cat(same) for same in zip(*map(parts, entries), strict=True)])


def test_posterior_noise_depends_on_names_side_and_seed_only(folder: Path, tmp_path: Path) -> None:
    def noise(parent: Path, seed: int = SEED, flipped: bool = False) -> list[Tensor]:
        scanned = pictures(scan(options(parent)))
        return [torch.randn(4, generator=posterior(seed, picture, flipped)) for picture in scanned]

    here = noise(folder)
    others = [*here, *noise(folder, SEED + 1), *noise(folder, flipped=True)]
    moved = Path(shutil.copytree(folder, tmp_path / "elsewhere" / "far" / folder.name))
    assert all_equal(here, noise(moved))
    others += noise(moved.rename(moved.with_name("2_dog")))
    assert len({tuple(numbers.tolist()) for numbers in others}) == len(others) == 16


# --- files --------------------------------------------------------------------------------------


def kinds(path: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    return {key: (array.dtype.str, array.shape) for key, array in read(path).items()}


# Names, keys, dtypes and shapes of sd-scripts' files; the hashes and resized_size are lorashrink's own.
OF_SQUARES = {
    "latents": ("<f4", (4, 8, 8)),
    "original_size": ("<i8", (2,)),
    "crop_ltrb": ("<f8", (4,)),
    "resized_size": ("<i8", (2,)),
    "source_hash": ("<U32", ()),
}
OF_TALL = OF_SQUARES | {"latents": ("<f4", (4, 16, 4))}


@pytest.mark.parametrize("flip", [False, True])
def test_files_of_latents_have_the_names_and_keys_of_sd_scripts(flip: bool, folder: Path, model: Model) -> None:
    latents(options(folder, flip_aug=flip), model.vae)
    more = {"latents_flipped": OF_SQUARES["latents"]} if flip else {}
    more_of_tall = {"latents_flipped": OF_TALL["latents"]} if flip else {}
    assert {name: kinds(folder / name) for name in files(folder)} == {
        "a_0064x0064_sdxl.npz": OF_SQUARES | more,
        "b_0096x0064_sdxl.npz": OF_SQUARES | more,
        "c_0032x0120_sdxl.npz": OF_TALL | more_of_tall,
        "d_0130x0140_sdxl.npz": OF_SQUARES | more,
    }
    arrays = read(folder / "b_0096x0064_sdxl.npz")
    assert arrays["original_size"].tolist() == [96, 64]
    assert arrays["resized_size"].tolist() == [96, 64]
    # The whole picture in 64x64: 64 wide, 64 / 1.5 = 42.67 high, and (64 - 42.67) // 2 = 10 from the top.
    assert arrays["crop_ltrb"].tolist() == pytest.approx([0, 10, 64, 10 + 64 / 1.5])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_captions_stay_as_they_are(dtype: torch.dtype, single: Path, model: Model) -> None:
    first, second = (copy.deepcopy(encoder).to(dtype) for encoder in model.encoders)
    half = replace(model, encoders=(first, second))
    [picture] = pictures(scan(options(single)))
    direct = encode(half.encoders, *(tokenize(tokenizer, [picture.caption], None) for tokenizer in model.tokenizers))
    cached = texts(options(single), half)[picture.caption]
    assert cached.hidden1.dtype == dtype
    assert all_equal(parts(cached), parts(direct))


def of_sd_scripts(size: tuple[int, int] = (64, 64), *, flip: bool = False, value: float = 7.0) -> dict[str, Any]:
    """What sd-scripts stores of a square picture at 64x64, with latents that no VAE makes."""
    arrays = {
        "latents": np.full((4, 8, 8), value, np.float32),
        "original_size": np.array(size),
        "crop_ltrb": np.array((0, 0, 64, 64)),
    }
    return arrays | ({"latents_flipped": np.full((4, 8, 8), value + 1, np.float32)} if flip else {})


@pytest.mark.parametrize("flip", [False, True])
def test_latents_of_sd_scripts_are_used(
    flip: bool, single: Path, model: Model, caplog: pytest.LogCaptureFixture
) -> None:
    write(single / "a_0064x0064_sdxl.npz", of_sd_scripts(flip=flip) | {"alpha_mask": np.ones((64, 64), np.float32)})
    before = files(single)
    chosen = options(single, flip_aug=flip)
    cache = latents(chosen, model.vae)
    [picture] = pictures(scan(chosen))
    for flipped in (False, True)[: 1 + flip]:
        assert torch.equal(cache.get(picture, flipped), torch.full((4, 8, 8), 7.0 + flipped))
    assert files(single) == before
    assert caplog.records == []


@pytest.mark.parametrize("dtype", ["<f2", ">f4", "<f8"])
def test_latents_in_other_dtypes_are_used_as_float32(dtype: str, single: Path, model: Model) -> None:
    arrays = of_sd_scripts()
    write(single / "a_0064x0064_sdxl.npz", arrays | {"latents": arrays["latents"].astype(dtype)})
    [scanned] = got(latents(options(single), model.vae), options(single))
    assert scanned.dtype == torch.float32
    assert torch.equal(scanned, torch.full((4, 8, 8), 7.0))


# --- files that do not fit ----------------------------------------------------------------------


def changed(**arrays: Any) -> Damage:
    """Replaces these arrays of a file; None takes one out."""

    def change(path: Path) -> None:
        kept = {key: array for key, array in (read(path) | arrays).items() if array is not None}
        write(path, kept)

    return change


def with_value(key: str, value: float) -> Damage:
    def change(path: Path) -> None:
        arrays = read(path)
        arrays[key].flat[-1] = value
        write(path, arrays)

    return change


def cut(share: float) -> Damage:
    return lambda path: os.truncate(path, int(path.stat().st_size * share))


def no_archive(path: Path) -> None:
    with path.open("wb") as file:
        np.save(file, np.zeros((4, 8, 8), np.float32))


DAMAGE: dict[str, Damage] = {
    "empty": cut(0),
    "cut short": cut(0.5),
    "without its last byte": cut(0.999),
    "text": lambda path: path.write_text("no archive"),
    "one array": no_archive,
    "another shape": changed(latents=np.zeros((4, 8, 16), np.float32)),
    "a batch": changed(latents=np.zeros((1, 4, 8, 8), np.float32)),
    "mirrored latents of another shape": changed(latents_flipped=np.zeros((4, 16, 8), np.float32)),
    "NaN": with_value("latents", np.nan),
    "infinity in mirrored latents": with_value("latents_flipped", -np.inf),
    "words": changed(latents=np.full((4, 8, 8), "x")),
    "a crop of words": changed(crop_ltrb=np.full(4, "x")),
    "no latents": changed(latents=None),
    "no mirrored latents": changed(latents_flipped=None),
    "no crop": changed(crop_ltrb=None),
    "no original size": changed(original_size=None),
    "another crop": changed(crop_ltrb=np.array((0, 10, 64, 54.0))),
    "half a crop": changed(crop_ltrb=np.array((0, 0))),
    "another original size": changed(original_size=np.array((128, 128))),
    "another resized size": changed(resized_size=np.array((96, 96))),
    "a number for the resized size": changed(resized_size=np.array(64)),
    "another source": changed(source_hash=np.array("0" * 32)),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_outdated_files_of_latents_are_made_anew_and_counted(
    damage: Damage, single: Path, model: Model, caplog: pytest.LogCaptureFixture
) -> None:
    path = single / "a_0064x0064_sdxl.npz"
    chosen = options(single, flip_aug=True)
    latents(chosen, model.vae)
    good = path.read_bytes()
    damage(path)
    assert path.read_bytes() != good
    latents(chosen, model.vae)
    assert files(single) == {path.name: good}
    assert [(record.levelno, record.message) for record in caplog.records] == [
        (logging.WARNING, "1 cache files of latents are damaged or do not fit, and are made anew")
    ]
    latents(chosen, model.vae)
    assert len(caplog.records) == 1


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_no_damaged_byte_makes_wrong_latents_or_another_error(
    save: Callable[..., None], single: Path, model: Model
) -> None:
    chosen = options(single)
    cache = latents(chosen, model.vae)
    [picture], [expected] = pictures(scan(chosen)), got(cache, chosen)
    path = single / "a_0064x0064_sdxl.npz"
    save(path, **read(path))
    good = path.read_bytes()
    refused = harmless = 0
    places = range(0, len(good), 7)
    for parent in places:
        path.write_bytes(good[:parent] + bytes([good[parent] ^ (1 << parent % 8)]) + good[parent + 1 :])
        try:
            assert torch.equal(cache.get(picture, False), expected), parent
        except InputError as error:
            refused += str(error).startswith(f"{path}: was changed")
        else:
            harmless += 1
    assert refused + harmless == len(places)
    assert harmless < refused


def test_another_resolution_makes_files_anew_and_says_so_in_one_line(
    folder: Path, model: Model, caplog: pytest.LogCaptureFixture
) -> None:
    latents(options(folder), model.vae)
    caplog.clear()
    larger = options(folder, resolution="96")
    cache = latents(larger, model.vae)
    # c.png goes to 32x128 again.
    assert [record.message.split(" of latents")[0] for record in caplog.records] == ["3 cache files"]
    assert all_equal(got(cache, larger), fresh(larger, model.vae))


def test_files_of_another_crop_in_the_same_bucket_are_made_anew(
    single: Path, model: Model, caplog: pytest.LogCaptureFixture
) -> None:
    tiny_sdxl.write_pictures(single, {"a.png": (70, 66)})
    # Resized to 68x64 and cut, or cut without resizing.
    resized, cut_only = options(single), options(single, bucket_no_upscale=True, resolution="80")
    assert [picture.fit.bucket for variant in (resized, cut_only) for picture in pictures(scan(variant))] == [
        (64, 64)
    ] * 2
    latents(resized, model.vae)
    assert all_equal(got(latents(cut_only, model.vae), cut_only), fresh(cut_only, model.vae))
    assert not all_equal(fresh(cut_only, model.vae), fresh(resized, model.vae))
    assert [record.message.split(" of latents")[0] for record in caplog.records] == ["1 cache files"]


def test_a_picture_replaced_by_another_of_its_size_is_encoded_anew(
    folder: Path, model: Model, caplog: pytest.LogCaptureFixture
) -> None:
    chosen = options(folder)
    latents(chosen, model.vae)
    before = files(folder)
    times = os.stat(folder / "b.png")
    Image.new("RGB", SIZES["b.png"], "red").save(folder / "b.png")
    os.utime(folder / "b.png", ns=(times.st_atime_ns, times.st_mtime_ns))
    assert all_equal(got(latents(chosen, model.vae), chosen), fresh(chosen, model.vae))
    after = files(folder)
    assert {name for name in before if before[name] != after[name]} == {"b_0096x0064_sdxl.npz"}
    assert [record.message.split(" of latents")[0] for record in caplog.records] == ["1 cache files"]


def test_another_vae_and_another_interpolation_make_files_anew(
    folder: Path, model: Model, caplog: pytest.LogCaptureFixture
) -> None:
    latents(options(folder), model.vae)
    changed = copy.deepcopy(model.vae)
    with torch.no_grad():
        changed.encoder.conv_in.weight *= 1.1
    assert all_equal(got(latents(options(folder), changed), options(folder)), fresh(options(folder), changed))
    nearest = options(folder, resize_interpolation="nearest")
    assert all_equal(got(latents(nearest, changed), nearest), fresh(nearest, changed))
    assert [record.message.split(" of latents")[0] for record in caplog.records] == ["4 cache files"] * 2


def test_a_folder_may_move_with_its_files(
    folder: Path, model: Model, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    latents(options(folder), model.vae)
    before = files(folder)
    moved = Path(shutil.move(folder.parent, tmp_path / "elsewhere")) / folder.name
    (moved / "a.png").touch()
    latents(options(moved), model.vae)
    assert files(moved) == before
    assert caplog.records == []


def test_longer_captions_have_more_positions(single: Path, model: Model) -> None:
    [picture] = pictures(scan(options(single)))
    longer = texts(options(single, max_token_length=150), model)[picture.caption]
    assert [part.shape for part in parts(longer)] == [(1, 152, 16), (1, 152, 24), (1, 24)]


class Opened:
    """Leaves a trace when it is unpickled."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.trace),)


def test_code_in_a_file_is_never_run(single: Path, model: Model, tmp_path: Path) -> None:
    name = "a_0064x0064_sdxl.npz"
    trace = tmp_path / "trace"
    evil = np.array([Opened(trace)], dtype=object)
    keys = (*of_sd_scripts(), "resized_size", "source_hash")
    write(single / name, dict.fromkeys(keys, evil))
    shutil.copy(single / name, tmp_path / "copy.npz")
    [picture] = pictures(scan(options(single)))
    latents(options(single), model.vae).get(picture, False)
    assert not trace.exists()
    with (tmp_path / "copy.npz").open("rb") as file, np.load(file, allow_pickle=True) as arrays:
        assert arrays["latents"].shape == (1,)
    assert trace.exists()  # the file was such that reading it carelessly runs its code


# --- what is refused ----------------------------------------------------------------------------


def test_pictures_of_equal_names_are_refused_on_disk_only(single: Path, model: Model) -> None:
    tiny_sdxl.write_pictures(single, {"a.jpg": (64, 64), "a.webp": (64, 32)})
    with pytest.raises(InputError) as caught:
        latents(options(single), model.vae)
    text = str(caught.value)
    assert str(single / "a_0064x0064_sdxl.npz") in text
    assert str(single / "a.jpg") in text
    assert str(single / "a.png") in text
    assert "_to_disk" in text
    assert not list(single.glob("*.npz"))
    in_memory = got(latents(options(single, cache_latents_to_disk=False), model.vae), options(single))
    assert len({latent.sum().item() for latent in in_memory}) == 3
    # Pictures of different sizes have different names.
    (single / "a.jpg").unlink()
    latents(options(single), model.vae)
    assert {path.name for path in single.glob("*.npz")} == {"a_0064x0064_sdxl.npz", "a_0064x0032_sdxl.npz"}


def test_a_folder_used_in_two_ways_is_refused_on_disk_only(single: Path, model: Model, tmp_path: Path) -> None:
    described = tmp_path / "dataset.toml"
    described.write_text(
        "".join(
            f"[[datasets]]\nresolution = {size}\n"
            f'[[datasets.subsets]]\nimage_dir = "{single}"\ncaption_prefix = "{size}"\n'
            for size in (64, 96)
        )
    )
    chosen = options(single, train_data_dir=None, dataset_config=str(described))
    with pytest.raises(InputError, match=r"a\.png and .*a\.png would need this cache file"):
        latents(chosen, model.vae)
    in_memory = replace(chosen, cache_latents_to_disk=False)
    assert [latent.shape for latent in got(latents(in_memory, model.vae), chosen)] == [(4, 8, 8), (4, 12, 12)]
    cached = texts(in_memory, model)
    first, second = (
        cached[f"{size} {picture.caption}"] for size, picture in zip((64, 96), pictures(scan(chosen)), strict=True)
    )
    assert not torch.equal(first.hidden1, second.hidden1)


@pytest.mark.parametrize(
    "change", [{"shuffle_caption": True}, {"caption_dropout_rate": 0.1}, {"caption_tag_dropout_rate": 0.1}]
)
def test_captions_that_change_cannot_be_cached(change: dict[str, Any], folder: Path, model: Model) -> None:
    with pytest.raises(UsageError, match="2_cat: --cache_text_encoder_outputs needs captions that stay the same"):
        texts(options(folder, **change), model)


@pytest.mark.parametrize(
    ("change", "advice"),
    [
        ({"mixed_precision": "fp16"}, "add --no_half_vae"),
        ({"mixed_precision": "bf16"}, "add --no_half_vae"),
        ({"mixed_precision": "fp16", "no_half_vae": True}, "--vae"),
        ({"mixed_precision": "no"}, "--vae"),
    ],
)
@pytest.mark.parametrize("at_once", [1, 4])
def test_a_vae_that_makes_nan_of_a_picture_names_it_and_says_what_to_do(
    at_once: int, change: dict[str, Any], advice: str, folder: Path, model: Model
) -> None:
    # Noise goes beyond float16's 65504 in this VAE, grey does not.
    vae = copy.deepcopy(model.vae)
    with torch.no_grad():
        vae.encoder.conv_in.weight.fill_(2e4)
    for name in ("a.png", "c.png", "d.png"):
        Image.new("RGB", SIZES[name], (128, 128, 128)).save(folder / name)
    with pytest.raises(NonFinite) as caught:
        latents(options(folder, vae_batch_size=at_once, **change), copy.deepcopy(vae).half())
    assert str(caught.value).startswith(f"{folder / 'b.png'}: the VAE makes NaN of this picture")
    assert advice in str(caught.value)
    assert ("--no_half_vae" in str(caught.value)) == ("--no_half_vae" in advice)
    assert "b_0096x0064_sdxl.npz" not in files(folder)
    for name in files(folder):
        assert np.isfinite(read(folder / name)["latents"]).all()
    latents(options(folder), vae)
    assert len(files(folder)) == 4


def test_a_picture_that_vanishes_before_the_check_is_named(single: Path, model: Model) -> None:
    chosen = options(single)
    latents(chosen, model.vae)
    data = scan(chosen)
    (single / "a.png").unlink()
    with pytest.raises(InputError, match=r"a\.png: cannot be read"):
        cache_latents(data, model.vae, chosen, seed=SEED, rank=0, world=1)


@pytest.mark.parametrize("room", [0, 600, 2000])
def test_a_full_disk_is_reported_and_leaves_no_partial_file(room: int, single: Path, model: Model) -> None:
    chosen = options(single, flip_aug=True)  # 2 KiB of latents
    with files_no_larger_than(room), pytest.raises(OutputError) as caught:
        latents(chosen, model.vae)
    assert str(caught.value).startswith(f"{single / 'a_0064x0064_sdxl.npz'}: cannot be written (")
    assert "_to_disk" in str(caught.value)
    assert files(single) == {}


def test_a_full_disk_leaves_the_file_that_was_to_be_replaced(single: Path, model: Model) -> None:
    path = single / "a_0064x0064_sdxl.npz"
    write(path, of_sd_scripts((32, 32)))
    before = files(single)
    with files_no_larger_than(1000), pytest.raises(OutputError):
        latents(options(single), model.vae)
    assert files(single) == before
    # With room there is a new file; whoever still reads the old one is not disturbed.
    with path.open("rb") as reader:
        latents(options(single), model.vae)
        assert reader.read() == before[path.name] != path.read_bytes()


def test_a_name_too_long_for_a_cache_file_is_reported(single: Path, model: Model) -> None:
    (single / "a.png").rename(single / f"{'x' * 245}.png")
    with pytest.raises(OutputError, match=r"x: cannot be written|npz: cannot be written"):
        latents(options(single), model.vae)
    assert files(single) == {}


# --- several processes --------------------------------------------------------------------------


def test_processes_encode_different_pictures_which_together_are_all(folder: Path, model: Model, tmp_path: Path) -> None:
    alone = Path(shutil.copytree(folder, tmp_path / "alone" / folder.name))
    latents(options(alone), model.vae)
    previous: dict[str, bytes] = {}
    for rank in range(3):
        latents(options(folder), model.vae, rank=rank, world=3)
        now = files(folder)
        added = {name: now[name] for name in now.keys() - previous.keys()}
        assert len(added) == (2, 1, 1)[rank]
        # What another process wrote is neither written again nor counted as not fitting.
        assert {**previous, **added} == now
        previous = now
    assert previous == files(alone)


def test_in_memory_every_process_has_all(folder: Path, model: Model) -> None:
    chosen = options(folder, cache_latents_to_disk=False)
    for rank in range(2):
        assert all_equal(got(latents(chosen, model.vae, rank=rank, world=2), chosen), fresh(chosen, model.vae))


def test_pictures_in_memory_are_distinguished_by_folder_and_use(single: Path, model: Model, tmp_path: Path) -> None:
    second_folder = tiny_sdxl.write_pictures(single.with_name("1_dog"), {"z.png": (64, 64), "a.png": (64, 64)})
    described = tmp_path / "dataset.toml"
    described.write_text(
        "".join(
            f'[[datasets]]\n[[datasets.subsets]]\nimage_dir = "{folder}"\nflip_aug = {flip}\n'
            for folder, flip in ((single, "true"), (single, "false"), (second_folder, "false"))
        )
    )
    chosen = options(single, train_data_dir=None, dataset_config=str(described), cache_latents_to_disk=False)
    cache = latents(chosen, model.vae)
    first, second, third, _ = pictures(scan(chosen))
    assert third.path == second_folder / "a.png"
    assert torch.equal(cache.get(first, False), cache.get(second, False))
    assert not torch.equal(cache.get(first, True), cache.get(second, False))
    assert torch.equal(cache.get(third, False), fresh(options(second_folder), model.vae)[1])


def test_caching_leaves_global_random_numbers_alone(folder: Path, model: Model) -> None:
    before = torch.get_rng_state()
    latents(options(folder), model.vae)
    texts(options(folder), model)
    assert torch.equal(torch.get_rng_state(), before)
