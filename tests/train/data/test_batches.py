"""The order of an epoch, and batches of pictures."""

from __future__ import annotations

import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_sdxl import write_pictures
from training import SQUARE, options

from lorashrink.errors import InputError
from lorashrink.train.data.batches import Batch, Loader, batch_count, epoch_batches
from lorashrink.train.data.buckets import Fit
from lorashrink.train.data.scanning import (
    Data,
    Dataset,
    Draw,
    Picture,
    Subset,
    read_pixels,
    scan,
)
from lorashrink.train.flags.options import Options

# --- the order of an epoch ----------------------------------------------------------------------


def made_of(*datasets: tuple[int, list[tuple[int, int]]]) -> Data:
    """Datasets of (batch size, pictures), pictures of (repeats, side of the bucket)."""
    subset = Subset(Path("1_x"), 1, "", False, Options())
    return Data(
        tuple(
            Dataset(
                tuple(
                    Picture(Path(f"1_x/{index}.png"), ("",), subset, Fit(*[(side, side)] * 3), repeats)
                    for index, (repeats, side) in enumerate(pictures)
                ),
                Options(train_batch_size=size),
            )
            for size, pictures in datasets
        ),
        (subset,),
    )


PICTURES = st.lists(st.tuples(st.integers(1, 3), st.sampled_from([64, 128])), min_size=1, max_size=6)
DATA = st.lists(st.tuples(st.integers(1, 4), PICTURES), min_size=1, max_size=2).map(lambda sets: made_of(*sets))


@given(DATA, st.integers(1, 4), st.integers(1, 3))
def test_an_epoch_shows_all_repeats_in_batches_of_one_bucket(data: Data, epoch: int, seed: int) -> None:
    batches = epoch_batches(data, epoch, seed)
    assert Counter((draw.dataset, draw.picture, draw.repeat) for batch in batches for draw in batch) == {
        (index, number, repeat): 1
        for index, dataset in enumerate(data.datasets)
        for number, picture in enumerate(dataset.pictures)
        for repeat in range(picture.repeats)
    }
    assert len(batches) == batch_count(data)
    smaller = Counter[Any]()
    for batch in batches:
        [(index, bucket)] = {
            (draw.dataset, data.datasets[draw.dataset].pictures[draw.picture].fit.bucket) for draw in batch
        }
        assert len(batch) <= data.datasets[index].options.train_batch_size
        smaller[index, bucket] += len(batch) < data.datasets[index].options.train_batch_size
    assert max(smaller.values()) <= 1


def showings(batches: list[list[Draw]]) -> list[list[tuple[int, int, int]]]:
    return [[(draw.dataset, draw.picture, draw.repeat) for draw in batch] for batch in batches]


@given(DATA, st.integers(1, 5))
def test_processes_share_the_batches_of_one_process(data: Data, world: int) -> None:
    alone, shared = epoch_batches(data, 2, 7), epoch_batches(data, 2, 7, world=world)
    assert len(shared) % world == 0
    assert 0 <= len(shared) - len(alone) < world
    assert showings(shared) == (showings(alone) * world)[: len(shared)]


def test_the_order_depends_on_seed_and_epoch_and_nothing_else() -> None:
    data = made_of((2, [(3, 64)] * 8))
    torch.manual_seed(1)
    first = epoch_batches(data, 1, 5)
    torch.manual_seed(2)
    assert epoch_batches(data, 1, 5) == first
    assert showings(epoch_batches(data, 2, 5)) != showings(first)
    assert showings(epoch_batches(data, 1, 6)) != showings(first)


# --- batches ------------------------------------------------------------------------------------


def loader(data: Data, chosen: Options, *, seed: int = 3, rank: int = 0, world: int = 1) -> Loader:
    return Loader(data, chosen, seed, rank, world, None, None)


def lively(pictures: Path, **change: Any) -> Options:
    """Options with all that draws random numbers."""
    return options(
        pictures,
        **{
            "shuffle_caption": True,
            "keep_tokens": 1,
            "caption_tag_dropout_rate": 0.2,
            "flip_aug": True,
            "train_batch_size": 2,
            "enable_bucket": True,
            "bucket_reso_steps": 32,
            "min_bucket_reso": 32,
            "max_data_loader_n_workers": 0,
        }
        | change,
    )


def same(first: Batch, second: Batch) -> bool:
    return (
        (first.draws, first.captions, first.flipped) == (second.draws, second.captions, second.flipped)
        and torch.equal(first.time_ids, second.time_ids)
        and torch.equal(first.pixels, second.pixels)
    )


def test_batches_hold_what_the_unet_and_the_vae_take(pictures: Path) -> None:
    chosen = lively(pictures)
    data = scan(chosen)
    buckets = {picture.path.name: picture.fit.bucket for picture in data.datasets[0].pictures}
    assert buckets == {"a.png": (96, 32), "b.png": (64, 64), "c.png": (64, 64), "d.png": (64, 64)}
    batches = list(loader(data, chosen).epoch(1))
    assert len(batches) == batch_count(data) == 5  # 2 showings of a, 7 of the others
    for batch in batches:
        of = [data.datasets[0].pictures[draw.picture] for draw in batch.draws]
        width, height = of[0].fit.bucket
        assert batch.pixels.shape == (len(of), 3, height, width)
        assert batch.pixels.dtype == batch.time_ids.dtype == torch.float32
        assert batch.latents is None
        assert batch.text is None
        for picture, pixels, caption, flipped, ids in zip(
            of, batch.pixels, batch.captions, batch.flipped, batch.time_ids, strict=True
        ):
            plain = torch.from_numpy(read_pixels(picture).copy()).permute(2, 0, 1) / 127.5 - 1
            torch.testing.assert_close(pixels, plain.flip(-1) if flipped else plain, rtol=0, atol=1e-6)
            assert tuple(ids.tolist()) == picture.fit.time_ids(flipped)
            tags = picture.caption.split(", ")
            assert caption.split(", ")[0] == tags[0]
            assert set(caption.split(", ")) <= set(tags)


def test_flips_and_captions_change_between_repeats_and_epochs(tmp_path: Path) -> None:
    write_pictures(tmp_path / "8_x", {"a.png": SQUARE}, {"a.png": "1, 2, 3, 4, 5, 6, 7, 8"})
    chosen = lively(tmp_path, train_batch_size=8, caption_tag_dropout_rate=0.0)
    [first], [second] = (list(loader(scan(chosen), chosen).epoch(epoch)) for epoch in (1, 2))
    assert len(set(first.captions)) > 4
    assert len(set(first.captions) | set(second.captions)) > 10
    assert set(first.flipped) == {False, True}


def test_workers_processes_and_restarts_change_nothing(pictures: Path) -> None:
    chosen = lively(pictures)
    data = scan(chosen)
    alone = list(loader(data, chosen).epoch(2))
    two_workers = lively(pictures, max_data_loader_n_workers=2, persistent_data_loader_workers=True)
    working = loader(data, two_workers)
    assert len(list(working.epoch(1))) == 5
    for others in (working.epoch(2), working.epoch(2), loader(data, two_workers).epoch(2)):
        assert all(same(*pair) for pair in zip(alone, others, strict=True))
    for start in range(6):
        rest = list(loader(data, chosen).epoch(2, start))
        assert all(same(*pair) for pair in zip(alone[start:], rest, strict=True))
    halves = [list(loader(data, chosen, rank=rank, world=2).epoch(2)) for rank in (0, 1)]
    assert [len(half) for half in halves] == [3, 3]
    together = [batch for pair in zip(*halves, strict=True) for batch in pair]
    for expected, shared in zip([*alone, alone[0]], together, strict=True):
        assert same(expected, shared)


def test_folders_may_move_without_changing_what_is_drawn(pictures: Path, tmp_path: Path) -> None:
    before = list(loader(scan(lively(pictures)), lively(pictures)).epoch(1))
    elsewhere = lively(Path(shutil.move(pictures, tmp_path / "elsewhere")))
    after = list(loader(scan(elsewhere), elsewhere).epoch(1))
    assert all(same(*pair) for pair in zip(before, after, strict=True))


@pytest.mark.parametrize("workers", [0, 2])
def test_reading_leaves_global_random_numbers_alone(pictures: Path, workers: int) -> None:
    chosen = lively(pictures, max_data_loader_n_workers=workers)
    before = torch.get_rng_state()
    assert list(loader(scan(chosen), chosen).epoch(1))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_damaged_picture_is_named_in_the_error_of_a_worker(pictures: Path, workers: int) -> None:
    path = pictures / "2_big_cat" / "b.png"
    path.write_bytes(path.read_bytes()[:2000])
    chosen = lively(pictures, max_data_loader_n_workers=workers)
    with pytest.raises(InputError) as caught:
        list(loader(scan(chosen), chosen).epoch(1))
    assert str(caught.value).startswith(str(path))


def test_regularisation_pictures_have_the_prior_loss_weight(pictures: Path, tmp_path: Path) -> None:
    write_pictures(tmp_path / "reg" / "1_cat", {"r.png": SQUARE}, {"r.png": "cat"})
    chosen = options(pictures, reg_data_dir=str(tmp_path / "reg"), prior_loss_weight=0.25, max_data_loader_n_workers=0)
    data = scan(chosen)
    for batch in loader(data, chosen).epoch(1):
        regs = [data.datasets[0].pictures[draw.picture].subset.is_reg for draw in batch.draws]
        assert batch.weights.tolist() == [0.25 if reg else 1.0 for reg in regs]
