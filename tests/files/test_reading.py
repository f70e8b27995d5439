"""Reading tensor files, against the reference library."""

import json
import os
import pickle
import struct
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from tensor_files import UNICODE, assert_same, entry, infos, raw, raw_file, shards, tensor, zoo

from lorashrink.bases.containers import weights_file
from lorashrink.errors import DamagedFile, InputError
from lorashrink.files.header import MAX_HEADER_BYTES, read_header
from lorashrink.files.reading import open_tensors
from lorashrink.files.store import join_stores
from lorashrink.files.writing import SafetensorsWriter

WRONG_DTYPES = {"complex128": torch.complex128, "float8_e4m3fnuz": torch.float8_e4m3fnuz}


# --- reading ------------------------------------------------------------------------------------


def test_a_header_reads_as_the_reference_reader_reads_it(tmp_path: Path) -> None:
    path = tmp_path / "zoo.safetensors"
    save_file(zoo(), path, UNICODE)
    tensors, metadata, header = read_header(path)
    with safe_open(path, "pt") as reference:
        slices = {name: reference.get_slice(name) for name in list(reference.keys())}
        assert metadata == reference.metadata() == UNICODE
        assert {name: (info.dtype, list(info.shape)) for name, info in tensors.items()} == {
            name: (view.get_dtype(), view.get_shape()) for name, view in slices.items()
        }
    assert path.read_bytes()[8:].startswith(header)
    assert {info.nbytes for info in tensors.values()} == {value.nbytes for value in zoo().values()}


def test_every_tensor_reads_as_the_reference_reader_reads_it(tmp_path: Path) -> None:
    path = tmp_path / "zoo.safetensors"
    save_file(zoo(), path)
    reference = load_file(path)
    with open_tensors(path) as store:
        assert store.tensors.keys() == reference.keys()
        for name, expected in reference.items():
            assert_same(store.read(name), expected)


def test_many_threads_read_the_same_store(tmp_path: Path) -> None:
    path = tmp_path / "zoo.safetensors"
    save_file(zoo(), path)
    with open_tensors(path) as store, ThreadPoolExecutor(8) as pool:
        names = list(store.tensors) * 4
        for name, value in zip(names, pool.map(store.read, names), strict=True):
            assert_same(value, zoo()[name])


@pytest.mark.parametrize("suffix", ["safetensors", "pt"])
@pytest.mark.parametrize(("start", "stop"), [(0, 6), (0, 1), (1, 4), (5, 6), (3, 3)])
def test_a_range_of_rows_is_that_slice_of_the_tensor(tmp_path: Path, suffix: str, start: int, stop: int) -> None:
    path = tmp_path / f"rows.{suffix}"
    tensors = {"matrix": tensor("BF16", 6, 5), "kernel": tensor("F32", 6, 2, 3, 3), "vector": tensor("U8", 6)}
    save_file(tensors, path) if suffix == "safetensors" else torch.save(tensors, path)
    with open_tensors(path) as store:
        for name, value in tensors.items():
            assert_same(store.read(name, (start, stop)), value[start:stop])


@pytest.mark.parametrize("length", [128, 384, 0x4B50])
def test_a_header_length_that_looks_like_a_pickle_is_read(tmp_path: Path, length: int) -> None:
    header = json.dumps({"x": entry(0, 4)}).encode()
    path = raw_file(tmp_path / "x.safetensors", header.ljust(length), bytes(range(4)))
    assert path.read_bytes()[:1] == b"\x80" or path.read_bytes()[:2] == b"PK"
    with open_tensors(path) as store:
        assert store.read("x").tolist() == [0, 1, 2, 3]


def test_a_file_cut_within_its_header_is_not_called_a_pickle(tmp_path: Path) -> None:
    path = raw_file(tmp_path / "x.safetensors", b"{" * 20, length=128)
    with pytest.raises(DamagedFile, match="cut short"):
        read_header(path)


@pytest.mark.parametrize(
    ("beginning", "kind"),
    [
        (b"<!DOCTYPE html><html>", "a web page"),
        (b"<html lang=en><head>", "a web page"),
        (b"\x89PNG\r\n\x1a\n" + bytes(20), "a picture"),
        (b"\xff\xd8\xff\xe0" + bytes(20), "a picture"),
    ],
)
def test_a_download_of_another_kind_is_called_what_it_is(tmp_path: Path, beginning: bytes, kind: str) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(beginning)
    with pytest.raises(DamagedFile, match=f"x.safetensors: {kind}.*Download it again"):
        read_header(path)


DAMAGED_HEADERS = {
    "not JSON": b"{not json",
    "not UTF-8": b'{"\xff\xfe": 1}',
    "a list": [entry(0, 4)],
    "a number": 12345678,
    "a deep nest": b"[" * 200_000,
    "an entry that is a list": {"x": [0, 4]},
    "no dtype": {"x": {"shape": [4], "data_offsets": [0, 4]}},
    "no offsets": {"x": {"dtype": "U8", "shape": [4]}},
    "one offset": {"x": entry(0, 4, data_offsets=[4])},
    "three offsets": {"x": entry(0, 4, data_offsets=[0, 4, 4])},
    "a negative offset": {"x": entry(0, 4, data_offsets=[-4, 0])},
    "a fractional offset": {"x": entry(0, 4, data_offsets=[0, 4.0])},
    "a shape that is a number": {"x": entry(0, 4, shape=4)},
    "a negative shape": {"x": entry(0, 4, shape=[-2, -2])},
    "a boolean shape": {"x": entry(0, 4, shape=[4, True])},
    "a shape that is too large": {"x": entry(0, 4, shape=[5])},
    "a shape that is too small": {"x": entry(0, 4, shape=[3])},
    "a dtype that is too wide": {"x": entry(0, 4, dtype="F16")},
    "an end before the start": {"x": entry(0, 4, dtype="NEW", data_offsets=[4, 0])},
    "a dtype that is a list": {"x": entry(0, 4, dtype=["U8"])},
    "metadata that is a list": {"__metadata__": ["a"], "x": entry(0, 4)},
    "a name twice behind quotes": rb'{"__metadata__":{"a":"\\"},"\"":'
    + json.dumps(entry(0, 4)).encode()
    + rb',"\"":'
    + json.dumps(entry(4, 8)).encode()
    + b"}",
    "a key of a tensor twice": b'{"x":{"dtype":"F32","shape":[9],"shape":[1],"data_offsets":[0,4]}}',
    "a metadata key twice": b'{"__metadata__":{"a":"1","a":"2"},"x":' + json.dumps(entry(0, 4)).encode() + b"}",
    "a name twice": b'{"x":' + json.dumps(entry(0, 4)).encode() + b',"x":' + json.dumps(entry(4, 8)).encode() + b"}",
    "an overlap": {"x": entry(0, 4), "y": entry(3, 7)},
    "the same place twice": {"x": entry(0, 4), "y": entry(0, 4)},
    "more data than there is": {"x": entry(0, 4), "y": entry(4, 9)},
    "bytes behind the tensors": {"x": entry(0, 4)},
    "bytes in front of the tensors": {"x": entry(4, 8)},
    "bytes between two tensors": {"x": entry(0, 3, shape=[3]), "y": entry(4, 8)},
    "bytes without a tensor": {},
}


@pytest.mark.parametrize(
    ("header", "words"),
    [
        ({"x": entry(0, 4)}, "4 bytes behind its last tensor"),
        ({"x": entry(0, 3, shape=[3]), "y": entry(4, 8)}, "1 byte in front of tensor y"),
    ],
)
def test_bytes_of_no_tensor_are_refused_as_the_reference_library_does(
    tmp_path: Path, header: object, words: str
) -> None:
    path = raw_file(tmp_path / "x.safetensors", header, bytes(8))
    with pytest.raises(SafetensorError), safe_open(path, "pt"):
        pass
    with pytest.raises(DamagedFile, match=words):
        read_header(path)


@pytest.mark.parametrize("header", DAMAGED_HEADERS.values(), ids=DAMAGED_HEADERS.keys())
def test_a_header_that_contradicts_itself_or_the_file_is_refused(tmp_path: Path, header: object) -> None:
    path = raw_file(tmp_path / "broken.safetensors", header, bytes(8))
    with pytest.raises(DamagedFile) as caught:
        open_tensors(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"\x08", bytes(7), bytes(8), struct.pack("<Q", 1) + b"{}"])
def test_a_file_without_room_for_a_header_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "stub.safetensors"
    path.write_bytes(content)
    with pytest.raises(DamagedFile, match=r"stub\.safetensors"):
        open_tensors(path)


@pytest.mark.parametrize("length", [11, 1000, 1 << 40, (1 << 64) - 1])
def test_a_header_length_beyond_the_end_of_the_file_is_refused(tmp_path: Path, length: int) -> None:
    path = raw_file(tmp_path / "liar.safetensors", b"{}".ljust(10), length=length)
    with pytest.raises(DamagedFile, match=str(length)):
        open_tensors(path)


def test_a_header_over_the_limit_of_the_format_is_refused(tmp_path: Path) -> None:
    path = raw_file(tmp_path / "large.safetensors", b"{}", length=MAX_HEADER_BYTES + 1)
    os.truncate(path, MAX_HEADER_BYTES + 100)
    with pytest.raises(DamagedFile, match=str(MAX_HEADER_BYTES + 1)):
        open_tensors(path)


def test_a_missing_file_and_a_folder_are_input_errors(tmp_path: Path) -> None:
    for path in (tmp_path / "none.safetensors", tmp_path / "none.pt", tmp_path):
        with pytest.raises(InputError, match=str(path)):
            open_tensors(path)


def test_a_file_that_shrinks_after_it_was_opened_is_damaged(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    tensors = {"a": tensor("F32", 10), "b": tensor("F32", 10)}
    save_file(tensors, path)
    with open_tensors(path) as store:
        os.truncate(path, path.stat().st_size - 4)
        assert_same(store.read("a"), tensors["a"])
        with pytest.raises(DamagedFile, match=r"x\.safetensors"):
            store.read("b")


def test_an_unknown_dtype_is_listed_and_copied_but_not_read(tmp_path: Path) -> None:
    path = raw_file(tmp_path / "new.safetensors", {"x": entry(0, 6, dtype="F99", shape=[2, 4])}, b"secret")
    with open_tensors(path) as store:
        assert store.tensors["x"].shape == (2, 4)
        with pytest.raises(DamagedFile, match="F99"):
            store.read("x")
        with SafetensorsWriter(tmp_path / "copy.safetensors", store.tensors, {}) as writer:
            writer.copy("x", store, "x")
            writer.commit()
    copied, _, header = read_header(tmp_path / "copy.safetensors")
    assert (copied["x"].dtype, copied["x"].shape) == ("F99", (2, 4))
    assert (tmp_path / "copy.safetensors").read_bytes()[8 + len(header) :] == b"secret"


# --- shards and folders -------------------------------------------------------------------------


def test_shards_read_as_one_file(tmp_path: Path) -> None:
    parts = [{"a": tensor("F32", 3, 4), "c": tensor("BF16", 5)}, {"b": tensor("F16", 2, 2)}, {"d": tensor("I64", 1)}]
    with open_tensors(shards(tmp_path, parts)) as store:
        assert store.tensors.keys() == {"a", "b", "c", "d"}
        assert [path.name for path in store.files] == [f"model-{n:05d}-of-00003.safetensors" for n in (1, 2, 3)]
        for name, expected in {**parts[0], **parts[1], **parts[2]}.items():
            assert_same(store.read(name), expected)
        assert_same(store.read("a", (1, 3)), parts[0]["a"][1:3])


@pytest.mark.parametrize("style", ["../{}", "sub/{}", "{absolute}", "./{}", ".", "..", ""])
def test_a_shard_outside_the_folder_of_its_index_is_refused(tmp_path: Path, style: str) -> None:
    folder = tmp_path / "model"
    (folder / "sub").mkdir(parents=True)
    for parent in (tmp_path, folder, folder / "sub"):
        save_file({"a": tensor("F32", 2)}, parent / "s.safetensors")
    name = style.format("s.safetensors", absolute=tmp_path / "s.safetensors")
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(DamagedFile, match="outside"):
        open_tensors(index)


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    index = shards(tmp_path, [{"a": tensor("F32", 2)}, {"b": tensor("F32", 2)}])
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(InputError, match=r"model-00002-of-00002\.safetensors"):
        open_tensors(index)


def test_a_tensor_that_no_shard_holds_is_named(tmp_path: Path) -> None:
    index = shards(tmp_path, [{"a": tensor("F32", 2)}])
    table = json.loads(index.read_text())
    table["weight_map"]["lost.weight"] = table["weight_map"]["a"]
    index.write_text(json.dumps(table))
    with pytest.raises(DamagedFile, match=r"lost\.weight"):
        open_tensors(index)


@pytest.mark.parametrize(
    "content",
    [
        "{",
        "[]",
        "{}",
        '{"weight_map": null}',
        '{"weight_map": ["a"]}',
        '{"weight_map": {"a": 5}}',
        '{"weight_map": {"a": null}}',
        '{"weight_map": {"a": ["b"]}}',
        '{"weight_map": {"a": "x", "b": 1}}',
    ],
)
def test_a_broken_shard_index_is_refused(tmp_path: Path, content: str) -> None:
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(content)
    with pytest.raises(DamagedFile, match=r"model\.safetensors\.index\.json"):
        open_tensors(index)


def test_joined_stores_have_prefixed_names_and_the_same_tensors(tmp_path: Path) -> None:
    unet = [{"a": tensor("F32", 3, 4)}, {"b": tensor("F16", 2)}]
    encoder = {"a": tensor("BF16", 4, 2)}
    save_file(encoder, tmp_path / "te.safetensors")
    parts = {
        "unet.": open_tensors(shards(tmp_path, unet)),
        "text_encoder.": open_tensors(tmp_path / "te.safetensors"),
    }
    with join_stores(tmp_path, parts) as store:
        assert_same(store.read("unet.a"), unet[0]["a"])
        assert_same(store.read("unet.b"), unet[1]["b"])
        assert_same(store.read("text_encoder.a"), encoder["a"])
        assert_same(store.read("text_encoder.a", (1, 3)), encoder["a"][1:3])
        assert len(store.tensors) == 3
        assert len(store.files) == len(store.headers) == 3


def test_a_pickle_is_not_joined_with_other_stores(tmp_path: Path) -> None:
    torch.save({"a": tensor("F32", 2)}, tmp_path / "a.bin")
    with pytest.raises(InputError, match=r"a\.bin"):
        join_stores(tmp_path, {"unet.": open_tensors(tmp_path / "a.bin")})


@pytest.mark.parametrize(
    ("files", "weights"),
    [
        (["diffusion_pytorch_model.safetensors"], "diffusion_pytorch_model.safetensors"),
        (["model.safetensors"], "model.safetensors"),
        (["model.fp16.safetensors"], "model.fp16.safetensors"),
        (["model.fp16.safetensors", "model.safetensors"], "model.safetensors"),
        (["model.fp16.safetensors", "model.bf16.safetensors"], "model.fp16.safetensors"),
        (["model.fp16.safetensors", "model.fp32.safetensors"], "model.fp32.safetensors"),
        (["model.non_ema.safetensors", "model.fp16.safetensors"], "model.fp16.safetensors"),
        (["model.fp16.safetensors", "model.safetensors.index.json"], "model.safetensors.index.json"),
        (["model.safetensors.index.fp16.json", "model.safetensors.index.json"], "model.safetensors.index.json"),
        (["model.safetensors.index.fp16.json"], "model.safetensors.index.fp16.json"),
        (["model.fp16.safetensors.index.json"], "model.fp16.safetensors.index.json"),
        (["model-00001-of-00002.safetensors"], None),
        (["lora.safetensors", "config.json"], None),
        ([], None),
    ],
)
def test_the_most_precise_weights_of_a_folder_are_taken(tmp_path: Path, files: list[str], weights: str | None) -> None:
    for name in files:
        (tmp_path / name).touch()
    assert weights_file(tmp_path) == (tmp_path / weights if weights else None)


def test_a_weights_file_that_is_a_folder_is_passed_over(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").mkdir()
    (tmp_path / "model.fp16.safetensors").touch()
    assert weights_file(tmp_path) == tmp_path / "model.fp16.safetensors"


def test_shards_of_two_variants_are_never_mixed(tmp_path: Path) -> None:
    plain = [{"a": tensor("F32", 2)}, {"b": tensor("F32", 2)}]
    shards(tmp_path, plain, "model")
    half = shards(tmp_path, [{"a": tensor("F16", 2)}, {"b": tensor("F16", 2)}], "model.fp16")
    half.rename(tmp_path / "model.safetensors.index.fp16.json")
    chosen = weights_file(tmp_path)
    assert chosen
    with open_tensors(chosen) as store:
        assert {path.name for path in store.files} == {f"model-{n:05d}-of-00002.safetensors" for n in (1, 2)}
        assert_same(store.read("a"), plain[0]["a"])
        assert_same(store.read("b"), plain[1]["b"])


# --- pickles ------------------------------------------------------------------------------------


class Payload:
    """An object whose unpickling makes a folder."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.marker),)


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".ckpt", ".bin", ".CKPT"])
def test_a_pickled_state_dict_reads_like_any_other_file(tmp_path: Path, suffix: str) -> None:
    tensors = zoo()
    path = tmp_path / f"x{suffix}"
    torch.save(tensors, path)
    with open_tensors(path) as store:
        assert store.tensors == infos(tensors)
        for name, expected in tensors.items():
            assert_same(store.read(name), expected)
            assert b"".join(store.chunks(name)) == raw(expected)


def test_tensors_that_share_or_transpose_a_storage_are_read_as_themselves(tmp_path: Path) -> None:
    matrix = tensor("F32", 4, 6)
    tensors = {"matrix": matrix, "turned": matrix.T, "part": matrix[1:3, 2:]}
    torch.save(tensors, tmp_path / "x.pt")
    with open_tensors(tmp_path / "x.pt") as store:
        for name, expected in tensors.items():
            assert_same(store.read(name), expected.contiguous())


def test_nested_state_dicts_are_unwrapped_and_only_tensors_remain(tmp_path: Path) -> None:
    weight = tensor("F32", 3, 2)
    inner = {"weight": weight, "epoch": 7, "note": "text"}
    torch.save({"state_dict": {"state_dict": inner}, "global_step": 5}, tmp_path / "x.ckpt")
    with open_tensors(tmp_path / "x.ckpt") as store:
        assert list(store.tensors) == ["weight"]
        assert_same(store.read("weight"), weight)


@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize("legacy", [False, True])
def test_a_pickle_with_code_is_refused_and_its_code_does_not_run(tmp_path: Path, wrapped: bool, legacy: bool) -> None:
    marker, path = tmp_path / "marker", tmp_path / "evil.pt"
    payload = {"weight": tensor("F32", 2), "state": Payload(marker)} if wrapped else Payload(marker)
    torch.save(payload, path, _use_new_zipfile_serialization=not legacy)
    with pytest.raises(DamagedFile, match=r"evil\.pt.*could run code"):
        open_tensors(path)
    assert not marker.exists()
    torch.load(path, weights_only=False)
    assert marker.exists(), "the payload was harmless, so this test showed nothing"


def test_a_bare_pickle_with_code_is_refused_and_its_code_does_not_run(tmp_path: Path) -> None:
    marker, path = tmp_path / "marker", tmp_path / "evil.bin"
    path.write_bytes(pickle.dumps(Payload(marker)))
    with pytest.raises(DamagedFile, match=r"evil\.bin"):
        open_tensors(path)
    assert not marker.exists()


@pytest.mark.parametrize("name", ["evil.safetensors", "evil"])
def test_a_pickle_under_another_name_is_recognised_and_not_loaded(tmp_path: Path, name: str) -> None:
    marker, path = tmp_path / "marker", tmp_path / name
    for content in (pickle.dumps(Payload(marker)), None):
        torch.save(Payload(marker), path) if content is None else path.write_bytes(content)
        with pytest.raises(DamagedFile, match="a pickle"):
            open_tensors(path)
        assert not marker.exists()


@pytest.mark.parametrize("content", [b"", b"no pickle at all", b"PK\x03\x04 no zip"])
def test_a_broken_pickle_is_damaged(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "x.pt"
    path.write_bytes(content)
    with pytest.raises(DamagedFile, match=r"x\.pt"):
        open_tensors(path)


def test_a_pickle_without_a_table_is_refused(tmp_path: Path) -> None:
    torch.save([tensor("F32", 2)], tmp_path / "list.pt")
    with pytest.raises(DamagedFile, match=r"list\.pt"):
        open_tensors(tmp_path / "list.pt")


@pytest.mark.parametrize("kind", WRONG_DTYPES.values(), ids=WRONG_DTYPES.keys())
def test_a_pickle_with_a_dtype_outside_the_format_is_refused_by_name(tmp_path: Path, kind: torch.dtype) -> None:
    torch.save({"weight": torch.zeros(2).to(kind)}, tmp_path / "odd.pt")
    with pytest.raises(InputError, match=r"odd\.pt"):
        open_tensors(tmp_path / "odd.pt")
