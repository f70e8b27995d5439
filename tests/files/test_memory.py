"""Files held in memory: the same bytes as without, bounded, and given back."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tensor_files import assert_same, inside, raw_file, write, zoo

from lorashrink.errors import OutputError
from lorashrink.files import memory, store
from lorashrink.files.disk import sha256_file, sha256_store
from lorashrink.files.hashes import MODEL_HASH, with_placeholders
from lorashrink.files.memory import SLABS, Slabs
from lorashrink.files.reading import open_tensors
from lorashrink.files.store import info_of
from lorashrink.files.writing import SafetensorsWriter
from lorashrink.shrinking.run import resize

FULL = Slabs()
FULL.take = lambda *_: None  # type: ignore[method-assign]


@pytest.fixture(autouse=True)
def all_given_back() -> Iterator[None]:
    yield
    assert SLABS._taken == 0


def assemble(path: Path, *, in_memory: bool) -> bytes:
    """A file with hashes, written in one of the two ways."""
    tensors, entries = zoo(), with_placeholders({"a": "b", MODEL_HASH: ""})
    infos = {name: info_of(value) for name, value in tensors.items()}
    with SafetensorsWriter(path, infos, entries, in_memory=in_memory) as writer:
        writer.write(tensors)
        writer.flush()
        with writer.opened() as opened:
            for name, value in tensors.items():
                assert_same(opened.read(name), value)
        writer.write_hashes()
        writer.commit()
    return path.read_bytes()


def test_a_file_put_together_in_memory_is_the_same(tmp_path: Path) -> None:
    contents = assemble(tmp_path / "a.safetensors", in_memory=True)
    assert contents == assemble(tmp_path / "b.safetensors", in_memory=False)
    assert load_file(tmp_path / "a.safetensors").keys() == zoo().keys()


def test_a_loaded_file_reads_the_same(tmp_path: Path) -> None:
    path = write(tmp_path / "a.safetensors", zoo())
    with open_tensors(path) as streamed, open_tensors(path) as loaded:
        loaded.load()
        assert sha256_store(loaded) == sha256_store(streamed) == sha256_file(path)
        for name in zoo():
            assert_same(loaded.read(name), streamed.read(name))
            assert b"".join(loaded.chunks(name)) == b"".join(streamed.chunks(name))
        kept = {name: loaded.read(name) for name in zoo()}
    for name, value in zoo().items():  # views outlive the store
        assert_same(kept[name], value)


@pytest.mark.parametrize("near", [0, 1 << 20])
@pytest.mark.parametrize("most", [1, 50, 1 << 24])
def test_tensors_read_together_are_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, near: int, most: int
) -> None:
    monkeypatch.setattr(store, "_NEAR", near)
    monkeypatch.setattr(store, "COPY_CHUNK", most)
    path = write(tmp_path / "a.safetensors", zoo())
    some = list(zoo())[::2]
    with open_tensors(path) as opened:
        with opened.together(some):
            kept = {name: opened.read(name) for name in zoo()}
        for name, value in zoo().items():  # views outlive the block
            assert_same(kept[name], value)
            assert_same(opened.read(name), value)


def test_numbers_read_together_are_aligned_as_in_the_file(tmp_path: Path) -> None:
    entries = {
        "half": {"dtype": "F16", "shape": [1], "data_offsets": [2, 4]},
        "byte": {"dtype": "U8", "shape": [2], "data_offsets": [0, 2]},
        "number": {"dtype": "F32", "shape": [2], "data_offsets": [4, 12]},
    }
    data = b"\0\0" + torch.tensor([0.5]).half().numpy().tobytes() + torch.tensor([1.5, -2.0]).numpy().tobytes()
    with open_tensors(raw_file(tmp_path / "a.safetensors", entries, data)) as opened:
        with opened.together(["half", "number"]):
            number = opened.read("number")
        assert number.tolist() == [1.5, -2.0]
        assert number.data_ptr() % 4 == 0


def test_tensors_read_together_are_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "a.safetensors", zoo())
    with open_tensors(path) as opened, opened.together(zoo()):
        monkeypatch.setattr(os, "preadv", None)
        for name, value in zoo().items():
            assert_same(opened.read(name), value)


def test_numbers_at_odd_addresses_are_read(tmp_path: Path) -> None:
    entries = {
        "byte": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]},
        "number": {"dtype": "F32", "shape": [2], "data_offsets": [1, 9]},
    }
    data = torch.tensor([1.5, -2.0]).numpy().tobytes()
    with open_tensors(raw_file(tmp_path / "a.safetensors", entries, b"\7" + data)) as opened:
        opened.load()
        assert opened.read("number").tolist() == [1.5, -2.0]
        assert opened.read("byte").tolist() == [7]


def test_the_sum_of_blocks_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "_TOGETHER", 1000)
    monkeypatch.setattr(memory, "_LARGEST", 900)
    slabs = Slabs()
    assert slabs.take(901) is None
    first = slabs.take(800)
    assert slabs.take(300) is None
    slabs.give(first)
    assert slabs.take(300)
    monkeypatch.setattr(memory, "free_memory", lambda: 100.0)
    assert Slabs().take(50) is None


def test_what_reads_back_otherwise_is_not_published(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original: Callable[..., int] = os.pwrite

    def flipped(number: int, data: memoryview, offset: int) -> int:
        is_first_chunk = not offset and len(data) > 900
        return original(number, bytes([data[0] ^ 1]) + bytes(data[1:]) if is_first_chunk else data, offset)

    monkeypatch.setattr(os, "pwrite", flipped)
    with pytest.raises(OutputError, match="reads back otherwise"):
        assemble(tmp_path / "a.safetensors", in_memory=True)
    assert inside(tmp_path) == []


@pytest.mark.parametrize("jobs", [1, 3])
def test_outputs_do_not_depend_on_room_in_memory(
    adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, jobs: int
) -> None:
    recipes = ["rank=3", "fro_lora=1,thr=-0.8"]

    def outputs(folder: str) -> list[str]:
        report = resize(adapter, recipes=recipes, output=tmp_path / folder, jobs=jobs)
        return [hashlib.sha256(Path(result.output).read_bytes()).hexdigest() for result in report.results]

    in_memory = outputs("memory")
    monkeypatch.setattr(store, "SLABS", FULL)
    monkeypatch.setattr("lorashrink.files.writing.SLABS", FULL)
    assert outputs("stream") == in_memory


def test_the_hash_of_a_loaded_file_needs_no_disk(tmp_path: Path) -> None:
    path = write(tmp_path / "a.safetensors", zoo())
    expected = sha256_file(path)
    with open_tensors(path) as loaded:
        loaded.load()
        path.unlink()
        assert sha256_store(loaded) == expected
