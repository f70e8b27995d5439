"""Atomic writes of small files, and the identity of files."""

import hashlib
import os
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest
from safetensors.torch import save_file
from tensor_files import disk_full, inside, shards, tensor

from lorashrink.errors import InputError, OutputError
from lorashrink.files import disk
from lorashrink.files.disk import begin_sha256, content_fingerprint, sha256_file, write_bytes
from lorashrink.files.reading import open_tensors


@pytest.fixture
def umask() -> Iterator[None]:
    before = os.umask(0o027)
    yield
    os.umask(before)


@pytest.mark.usefixtures("umask")
def test_a_small_file_has_the_rights_of_the_umask(tmp_path: Path) -> None:
    write_bytes(tmp_path / "x.json", b"{}")
    assert stat.S_IMODE((tmp_path / "x.json").stat().st_mode) == 0o640


def test_a_small_file_is_written_into_new_folders_and_replaces_another(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b" / "x.json"
    for content in (b"first", b"second, longer", b""):
        write_bytes(path, content)
        assert path.read_bytes() == content
        assert inside(path.parent) == ["x.json"]


@pytest.mark.parametrize("function", ["fsync", "replace"])
def test_a_small_file_that_cannot_be_finished_leaves_the_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, function: str
) -> None:
    out = tmp_path / "out"
    write_bytes(out / "x.json", b"old")
    monkeypatch.setattr(os, function, disk_full)
    with pytest.raises(OutputError, match=r"x\.json"):
        write_bytes(out / "x.json", b"new")
    assert inside(out) == ["x.json"]
    assert (out / "x.json").read_bytes() == b"old"


# --- identity -----------------------------------------------------------------------------------


def fingerprint(path: Path) -> str:
    with open_tensors(path) as store:
        return content_fingerprint(store)


def changed(path: Path, position: int) -> Path:
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    copy = path.with_name("changed.safetensors")
    copy.write_bytes(content)
    return copy


def test_copies_have_one_fingerprint_whatever_their_names(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    tensors = {"a": tensor("F32", 300, 300)}
    save_file(tensors, tmp_path / "a.safetensors")
    save_file(tensors, tmp_path / "sub" / "b.safetensors")
    assert fingerprint(tmp_path / "a.safetensors") == fingerprint(tmp_path / "sub" / "b.safetensors")


@pytest.mark.parametrize("position", [-1, -5000, -10_000, -15_999])
def test_a_changed_byte_in_a_small_file_changes_the_fingerprint(tmp_path: Path, position: int) -> None:
    path = tmp_path / "a.safetensors"
    save_file({"a": tensor("U8", 16_000)}, path)
    assert fingerprint(changed(path, position)) != fingerprint(path)


@pytest.mark.parametrize("piece", [0, 1, 31, 62, 63])
def test_a_changed_byte_in_a_sampled_block_changes_the_fingerprint(tmp_path: Path, piece: int) -> None:
    path = tmp_path / "a.safetensors"
    save_file({"a": tensor("U8", 1 << 20)}, path)
    position = (path.stat().st_size - 4096) * piece // 63 + 4000
    assert fingerprint(changed(path, position)) != fingerprint(path)


def test_another_header_of_the_same_length_changes_the_fingerprint(tmp_path: Path) -> None:
    tensors = {"a": tensor("U8", 1 << 20)}
    for letter in "ab":
        save_file(tensors, tmp_path / f"{letter}.safetensors", {"note": letter})
    paths = [tmp_path / f"{letter}.safetensors" for letter in "ab"]
    assert paths[0].stat().st_size == paths[1].stat().st_size
    assert fingerprint(paths[0]) != fingerprint(paths[1])


def test_a_changed_byte_in_the_second_shard_changes_the_fingerprint(tmp_path: Path) -> None:
    index = shards(tmp_path, [{"a": tensor("U8", 100)}, {"b": tensor("U8", 100)}])
    before = fingerprint(index)
    second = tmp_path / "model-00002-of-00002.safetensors"
    changed(second, -50).replace(second)
    assert fingerprint(index) != before


def test_the_hash_of_a_file_is_its_sha_256(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disk, "COPY_CHUNK", 2)
    (tmp_path / "x").write_bytes(b"abc")
    digest = sha256_file(tmp_path / "x")
    assert digest == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    with pytest.raises(InputError, match="none"):
        sha256_file(tmp_path / "none")


def test_a_hash_that_was_begun_is_used_unless_the_file_changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = [tmp_path / name for name in ("same", "changed")]
    for path in paths:
        path.write_bytes(b"abc")
        begin_sha256(path)
    paths[1].write_bytes(b"changed")
    expected = [hashlib.sha256(path.read_bytes()).hexdigest() for path in paths]
    read: list[Path] = []

    def hashed(path: Path) -> str:
        read.append(path)
        return expected[1]

    monkeypatch.setattr(disk, "_sha256", hashed)
    assert list(map(sha256_file, paths)) == expected
    assert read == paths[1:]


def test_a_hash_that_was_begun_in_vain_is_no_error(tmp_path: Path) -> None:
    begin_sha256(tmp_path / "none")
    begin_sha256(tmp_path)
    begin_sha256(Path("a\0b"))
    with pytest.raises(InputError, match="cannot be read"):
        sha256_file(tmp_path)
