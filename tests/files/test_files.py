"""Reading and writing tensor files, against the reference library."""

import errno
import itertools
import json
import os
import pickle
import stat
import struct
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save, save_file
from torch import Tensor

from lorashrink.bases.containers import weights_file
from lorashrink.errors import DamagedFile, InputError, OutputError
from lorashrink.files import disk
from lorashrink.files import store as stores
from lorashrink.files.disk import content_fingerprint, sha256_file, write_bytes
from lorashrink.files.reading import MAX_HEADER_BYTES, open_tensors, read_header
from lorashrink.files.store import DTYPES, TensorInfo, join_stores
from lorashrink.files.writing import SafetensorsWriter, header_bytes, write_order

KINDS = [name for name, (_, torch_name) in DTYPES.items() if hasattr(torch, torch_name)]
UNICODE = {"ss_tag": 'quote " backslash \\ newline \n tab \t bell \x07', "名前": "ソフト 🎨 é \u2028", "empty": ""}
WRONG_DTYPES = {"complex128": torch.complex128, "float8_e4m3fnuz": torch.float8_e4m3fnuz}


@pytest.fixture
def umask() -> Iterator[None]:
    before = os.umask(0o027)
    yield
    os.umask(before)


def tensor(kind: str, *shape: int) -> Tensor:
    """Random bits as a tensor of a dtype of the format."""
    width, torch_name = DTYPES[kind]
    count = torch.Size(shape).numel()
    high = 2 if kind == "BOOL" else 256
    return torch.randint(0, high, (count * width,), dtype=torch.uint8).view(getattr(torch, torch_name)).reshape(shape)


def zoo() -> dict[str, Tensor]:
    """Every dtype in several shapes, under names whose order is not that of the dtypes."""
    torch.manual_seed(0)
    shapes = [(), (0, 3), (5,), (3, 4), (2, 3, 1, 2)]
    names = ["z.weight", "a.weight", "é", "𝔸 name", '"quoted"\\']
    pairs = itertools.product(KINDS, zip(names, shapes, strict=True))
    return {f"{name}.{kind}": tensor(kind, *shape) for kind, (name, shape) in pairs}


def raw(value: Tensor) -> bytes:
    return value.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def assert_same(found: Tensor, wanted: Tensor) -> None:
    assert (found.dtype, found.shape, raw(found)) == (wanted.dtype, wanted.shape, raw(wanted))


def infos(tensors: Mapping[str, Tensor]) -> dict[str, TensorInfo]:
    names = {torch_name: name for name, (_, torch_name) in DTYPES.items()}
    return {
        name: TensorInfo(names[str(value.dtype).removeprefix("torch.")], tuple(value.shape), value.nbytes)
        for name, value in tensors.items()
    }


def write(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> Path:
    with SafetensorsWriter(path, infos(tensors), metadata or {}) as writer:
        for name, value in tensors.items():
            writer.write(name, value)
        writer.commit()
    return path


def raw_file(path: Path, header: object, data: bytes = b"", length: int | None = None) -> Path:
    """A file with this header, as bytes or to be encoded, and a header length that may be a lie."""
    encoded = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(encoded) if length is None else length) + encoded + data)
    return path


def entry(begin: int, end: int, **changes: object) -> dict[str, object]:
    return {"dtype": "U8", "shape": [end - begin], "data_offsets": [begin, end]} | changes


def inside(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def shards(folder: Path, parts: Sequence[Mapping[str, Tensor]], stem: str = "model") -> Path:
    weight_map = {}
    for number, part in enumerate(parts, 1):
        name = f"{stem}-{number:05d}-of-{len(parts):05d}.safetensors"
        save_file(dict(part), folder / name)
        weight_map |= dict.fromkeys(part, name)
    index = folder / f"{stem}.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return index


def disk_full(*_: object) -> int:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


# --- reading ------------------------------------------------------------------------------------


def test_names_shapes_dtypes_and_metadata_are_those_of_the_reference_reader(tmp_path: Path) -> None:
    path = tmp_path / "zoo.safetensors"
    save_file(zoo(), path, UNICODE)
    tensors, metadata, header = read_header(path)
    with safe_open(path, "pt") as reference:
        slices = {name: reference.get_slice(name) for name in list(reference.keys())}
        assert metadata == reference.metadata() == UNICODE
        assert {name: (info.dtype, list(info.shape)) for name, info in tensors.items()} == {
            name: (each.get_dtype(), each.get_shape()) for name, each in slices.items()
        }
    assert path.read_bytes()[8:].startswith(header)
    assert {info.nbytes for info in tensors.values()} == {value.nbytes for value in zoo().values()}


def test_every_tensor_reads_as_the_reference_reader_reads_it(tmp_path: Path) -> None:
    path = tmp_path / "zoo.safetensors"
    save_file(zoo(), path)
    reference = load_file(path)
    with open_tensors(path) as store:
        assert store.tensors.keys() == reference.keys()
        for name, wanted in reference.items():
            assert_same(store.read(name), wanted)


def test_many_threads_read_the_same_store(tmp_path: Path) -> None:
    path = tmp_path / "zoo.safetensors"
    save_file(zoo(), path)
    with open_tensors(path) as store, ThreadPoolExecutor(8) as pool:
        names = list(store.tensors) * 4
        for name, found in zip(names, pool.map(store.read, names), strict=True):
            assert_same(found, zoo()[name])


@pytest.mark.parametrize("suffix", ["safetensors", "pt"])
@pytest.mark.parametrize(("start", "stop"), [(0, 6), (0, 1), (1, 4), (5, 6), (3, 3)])
def test_a_range_of_rows_is_that_slice_of_the_tensor(tmp_path: Path, suffix: str, start: int, stop: int) -> None:
    path = tmp_path / f"rows.{suffix}"
    tensors = {"matrix": tensor("BF16", 6, 5), "kernel": tensor("F32", 6, 2, 3, 3), "vector": tensor("U8", 6)}
    save_file(tensors, path) if suffix == "safetensors" else torch.save(tensors, path)
    with open_tensors(path) as store:
        for name, whole in tensors.items():
            assert_same(store.read(name, (start, stop)), whole[start:stop])


@pytest.mark.parametrize("length", [128, 384, 0x4B50])
def test_a_header_length_that_looks_like_the_start_of_a_pickle_is_a_header_length(tmp_path: Path, length: int) -> None:
    header = json.dumps({"x": entry(0, 4)}).encode()
    path = raw_file(tmp_path / "x.safetensors", header.ljust(length), bytes(range(4)))
    assert path.read_bytes()[:1] == b"\x80" or path.read_bytes()[:2] == b"PK"
    with open_tensors(path) as store:
        assert store.read("x").tolist() == [0, 1, 2, 3]


def test_a_file_cut_within_a_header_of_128_bytes_is_not_called_a_pickle(tmp_path: Path) -> None:
    path = raw_file(tmp_path / "x.safetensors", b"{" * 20, length=128)
    with pytest.raises(DamagedFile, match="cut short"):
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
    "a name twice": b'{"x":' + json.dumps(entry(0, 4)).encode() + b',"x":' + json.dumps(entry(4, 8)).encode() + b"}",
    "an overlap": {"x": entry(0, 4), "y": entry(3, 7)},
    "the same place twice": {"x": entry(0, 4), "y": entry(0, 4)},
    "more data than there is": {"x": entry(0, 4), "y": entry(4, 9)},
}


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


def test_a_header_over_the_limit_of_the_format_is_refused_though_the_file_is_that_long(tmp_path: Path) -> None:
    path = raw_file(tmp_path / "large.safetensors", b"{}", length=MAX_HEADER_BYTES + 1)
    os.truncate(path, MAX_HEADER_BYTES + 100)
    with pytest.raises(DamagedFile, match=str(MAX_HEADER_BYTES + 1)):
        open_tensors(path)


def test_a_missing_file_and_a_folder_are_input_errors(tmp_path: Path) -> None:
    for path in (tmp_path / "none.safetensors", tmp_path / "none.pt", tmp_path):
        with pytest.raises(InputError, match=str(path)):
            open_tensors(path)


def test_a_file_that_shrinks_after_it_was_opened_is_damaged_and_no_crash(tmp_path: Path) -> None:
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
        for name, wanted in {**parts[0], **parts[1], **parts[2]}.items():
            assert_same(store.read(name), wanted)
        assert_same(store.read("a", (1, 3)), parts[0]["a"][1:3])


@pytest.mark.parametrize("style", ["../{}", "sub/{}", "{absolute}", "./{}", ".", "..", ""])
def test_a_shard_outside_the_folder_of_its_index_is_refused(tmp_path: Path, style: str) -> None:
    folder = tmp_path / "model"
    (folder / "sub").mkdir(parents=True)
    for place in (tmp_path, folder, folder / "sub"):
        save_file({"a": tensor("F32", 2)}, place / "s.safetensors")
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
def test_an_index_that_is_none_is_refused(tmp_path: Path, content: str) -> None:
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
    ("present", "wanted"),
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
def test_the_most_precise_weights_of_a_folder_are_taken(tmp_path: Path, present: list[str], wanted: str | None) -> None:
    for name in present:
        (tmp_path / name).touch()
    assert weights_file(tmp_path) == (tmp_path / wanted if wanted else None)


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
        for name, wanted in tensors.items():
            assert_same(store.read(name), wanted)
            assert b"".join(store.chunks(name)) == raw(wanted)


def test_tensors_that_share_or_transpose_a_storage_are_read_as_themselves(tmp_path: Path) -> None:
    whole = tensor("F32", 4, 6)
    tensors = {"whole": whole, "turned": whole.T, "part": whole[1:3, 2:]}
    torch.save(tensors, tmp_path / "x.pt")
    with open_tensors(tmp_path / "x.pt") as store:
        for name, wanted in tensors.items():
            assert_same(store.read(name), wanted.contiguous())


def test_nested_state_dicts_are_unwrapped_and_what_is_no_tensor_is_left_out(tmp_path: Path) -> None:
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
def test_a_pickle_that_is_none_is_damaged(tmp_path: Path, content: bytes) -> None:
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


# --- writing ------------------------------------------------------------------------------------


def test_the_data_section_is_that_of_the_reference_writer_to_the_last_byte(tmp_path: Path) -> None:
    tensors = zoo()
    reference = save(tensors, {"a": "b"})
    written = write(tmp_path / "zoo.safetensors", tensors, {"a": "b"}).read_bytes()
    (length,) = struct.unpack("<Q", reference[:8])
    assert written[-sum(value.nbytes for value in tensors.values()) :] == reference[8 + length :]


@pytest.mark.parametrize("metadata", [{}, *({key: value} for key, value in UNICODE.items())], ids=str)
def test_with_up_to_one_metadata_entry_the_whole_file_is_that_of_the_reference_writer(
    tmp_path: Path, metadata: dict[str, str]
) -> None:
    tensors = zoo()
    written = write(tmp_path / "zoo.safetensors", tensors, metadata).read_bytes()
    assert written == save(tensors, metadata or None)


def test_the_reference_reader_reads_what_was_written(tmp_path: Path) -> None:
    tensors = zoo()
    path = write(tmp_path / "zoo.safetensors", tensors, UNICODE)
    with safe_open(path, "pt") as reference:
        assert reference.metadata() == UNICODE
        assert set(reference.keys()) == tensors.keys()
        for name, wanted in tensors.items():
            assert_same(reference.get_tensor(name), wanted)


def test_a_file_without_tensors_can_be_written_and_read(tmp_path: Path) -> None:
    path = write(tmp_path / "empty.safetensors", {}, {"a": "b"})
    with safe_open(path, "pt") as reference:
        assert reference.metadata() == {"a": "b"}
        assert list(reference.keys()) == []
    assert read_header(path)[:2] == ({}, {"a": "b"})


@pytest.mark.parametrize("pad", range(9))
def test_data_begins_at_a_multiple_of_eight_bytes(pad: int) -> None:
    header = header_bytes({"x": TensorInfo("F64", (1,), 8)}, {"a": "b" * pad})
    assert len(header) % 8 == 0
    assert struct.unpack("<Q", header[:8])[0] == len(header) - 8


def test_wider_dtypes_come_first_and_then_names_in_order() -> None:
    order = ["b.F64", "a.F32", "b.F32", "a.BF16", "a.F16", "a.U8"]
    assert write_order(infos({name: tensor(name.partition(".")[2], 1) for name in reversed(order)})) == order


def test_tensors_may_be_written_in_any_order_from_many_threads(tmp_path: Path) -> None:
    tensors = zoo()
    path = tmp_path / "zoo.safetensors"
    with SafetensorsWriter(path, infos(tensors), {}) as writer, ThreadPoolExecutor(8) as pool:
        for future in [pool.submit(writer.write, name, tensors[name]) for name in reversed(tensors)]:
            future.result()
        writer.commit()
    assert path.read_bytes() == save(tensors)


def test_a_transposed_tensor_is_written_as_its_numbers_read(tmp_path: Path) -> None:
    turned = tensor("F32", 3, 5).T
    path = write(tmp_path / "x.safetensors", {"x": turned})
    assert_same(load_file(path)["x"], turned.contiguous())


def test_a_tensor_of_another_size_is_not_written(tmp_path: Path) -> None:
    with SafetensorsWriter(tmp_path / "x.safetensors", infos({"x": tensor("F32", 4)}), {}) as writer:
        for wrong in (tensor("F32", 5), tensor("F16", 4)):
            with pytest.raises(ValueError, match="x: "):
                writer.write("x", wrong)


@pytest.mark.parametrize("chunk", [1, 7, 64, 1 << 24])
@pytest.mark.parametrize("suffix", ["safetensors", "pt"])
def test_tensors_are_copied_in_chunks_of_any_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk: int, suffix: str
) -> None:
    monkeypatch.setattr(stores, "COPY_CHUNK", chunk)
    tensors = {"old.a": tensor("F32", 3, 4), "old.b": tensor("BF16", 5), "old.c": tensor("U8", 0)}
    source = tmp_path / f"source.{suffix}"
    save_file(tensors, source) if suffix == "safetensors" else torch.save(tensors, source)
    renamed = {name.replace("old", "new"): value for name, value in tensors.items()}
    path = tmp_path / "copy.safetensors"
    with open_tensors(source) as store, SafetensorsWriter(path, infos(renamed), {}) as writer:
        for name in renamed:
            writer.copy(name, store, name.replace("new", "old"))
        assert b"".join(writer.data_chunks()) == b"".join(raw(renamed[name]) for name in write_order(infos(renamed)))
        writer.commit()
    assert path.read_bytes() == save(renamed)


def test_metadata_of_equal_length_is_replaced_and_the_tensors_stay(tmp_path: Path) -> None:
    tensors = {"a": tensor("F32", 3), "b": tensor("F16", 2)}
    path = tmp_path / "x.safetensors"
    with SafetensorsWriter(path, infos(tensors), {"hash": "0" * 8, "name": "é"}) as writer:
        for name, value in tensors.items():
            writer.write(name, value)
        writer.replace_metadata({"hash": "deadbeef", "name": "é"})
        writer.commit()
    with safe_open(path, "pt") as reference:
        assert reference.metadata() == {"hash": "deadbeef", "name": "é"}
        for name, wanted in tensors.items():
            assert_same(reference.get_tensor(name), wanted)


def test_metadata_of_another_length_is_refused_and_nothing_changes(tmp_path: Path) -> None:
    tensors = {"a": tensor("F32", 3)}
    path = tmp_path / "x.safetensors"
    with SafetensorsWriter(path, infos(tensors), {"hash": "0" * 8}) as writer:
        writer.write("a", tensors["a"])
        with pytest.raises(ValueError, match="length"):
            writer.replace_metadata({"hash": "0" * 16})
        writer.commit()
    assert path.read_bytes() == save(tensors, {"hash": "0" * 8})


# --- all or nothing -----------------------------------------------------------------------------


def test_the_name_appears_with_the_commit_and_not_before(tmp_path: Path) -> None:
    tensors = {"a": tensor("F32", 3)}
    path = tmp_path / "out" / "deep" / "x.safetensors"
    with SafetensorsWriter(path, infos(tensors), {}) as writer:
        writer.write("a", tensors["a"])
        assert not path.exists()
        assert inside(path.parent) == [writer.temporary.name]
        writer.commit()
        assert inside(path.parent) == ["x.safetensors"]
    assert inside(path.parent) == ["x.safetensors"]


def test_a_block_left_without_commit_leaves_nothing(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with SafetensorsWriter(out / "x.safetensors", infos({"a": tensor("F32", 3)}), {}) as writer:
        assert len(inside(out)) == 1
        writer.write("a", tensor("F32", 3))
    assert inside(out) == []


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_exception_within_the_block_leaves_nothing(tmp_path: Path, error: type[BaseException]) -> None:
    out = tmp_path / "out"

    def fail() -> None:
        with SafetensorsWriter(out / "x.safetensors", infos({"a": tensor("F32", 3)}), {}):
            assert len(inside(out)) == 1
            raise error

    with pytest.raises(error):
        fail()
    assert inside(out) == []


def test_an_existing_file_is_replaced_by_the_commit_alone(tmp_path: Path) -> None:
    out = tmp_path / "out"
    path = write(out / "x.safetensors", {"old": tensor("F32", 3)})
    before = path.read_bytes()
    new = {"new": tensor("F16", 9)}
    with SafetensorsWriter(path, infos(new), {}) as writer:
        writer.write("new", new["new"])
    assert path.read_bytes() == before
    write(path, new)
    assert path.read_bytes() == save(new)
    assert inside(out) == ["x.safetensors"]


def test_a_disk_that_is_full_for_the_header_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    monkeypatch.setattr(os, "pwrite", disk_full)
    with pytest.raises(OutputError, match=r"x\.safetensors.*No space left"):
        SafetensorsWriter(out / "x.safetensors", infos({"a": tensor("F32", 3)}), {})
    assert inside(out) == []


@pytest.mark.parametrize("function", ["pwrite", "fsync", "replace"])
def test_a_disk_that_fills_up_later_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, function: str
) -> None:
    out = tmp_path / "out"

    def fill() -> None:
        with SafetensorsWriter(out / "x.safetensors", infos({"a": tensor("F32", 3)}), {}) as writer:
            monkeypatch.setattr(os, function, disk_full)
            writer.write("a", tensor("F32", 3))
            writer.commit()

    with pytest.raises(OutputError, match=r"x\.safetensors.*No space left"):
        fill()
    assert inside(out) == []


def test_a_write_that_the_system_cuts_into_pieces_is_completed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pwrite = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda number, data, offset: pwrite(number, data[:3], offset))
    tensors = {"a": tensor("F32", 3, 4), "b": tensor("U8", 5)}
    assert write(tmp_path / "x.safetensors", tensors).read_bytes() == save(tensors)


def test_a_commit_onto_a_folder_is_an_output_error_and_leaves_no_temporary_file(tmp_path: Path) -> None:
    path = tmp_path / "out" / "x.safetensors"
    path.mkdir(parents=True)
    with SafetensorsWriter(path, infos({"a": tensor("F32", 3)}), {}) as writer:
        writer.write("a", tensor("F32", 3))
        with pytest.raises(OutputError, match=r"x\.safetensors"):
            writer.commit()
    assert inside(tmp_path / "out") == ["x.safetensors"]
    assert inside(path) == []


def test_a_folder_below_a_file_is_an_output_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("text")
    place = tmp_path / "file" / "x.safetensors"
    with pytest.raises(OutputError, match=r"x\.safetensors"):
        SafetensorsWriter(place, infos({"a": tensor("F32", 3)}), {})
    with pytest.raises(OutputError, match=r"x\.safetensors"):
        write_bytes(place, b"data")


@pytest.mark.usefixtures("umask")
def test_a_tensor_file_has_the_rights_that_the_umask_leaves(tmp_path: Path) -> None:
    path = write(tmp_path / "x.safetensors", {"a": tensor("F32", 3)})
    assert stat.S_IMODE(path.stat().st_mode) == 0o640
    assert os.umask(0o027) == 0o027


@pytest.mark.usefixtures("umask")
def test_a_small_file_has_the_rights_that_the_umask_leaves(tmp_path: Path) -> None:
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


def changed(path: Path, place: int) -> Path:
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    other = path.with_name("changed.safetensors")
    other.write_bytes(content)
    return other


def test_copies_have_one_fingerprint_whatever_their_names(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    tensors = {"a": tensor("F32", 300, 300)}
    save_file(tensors, tmp_path / "a.safetensors")
    save_file(tensors, tmp_path / "sub" / "b.safetensors")
    assert fingerprint(tmp_path / "a.safetensors") == fingerprint(tmp_path / "sub" / "b.safetensors")


@pytest.mark.parametrize("place", [-1, -5000, -10_000, -15_999])
def test_one_changed_byte_anywhere_in_a_small_file_changes_the_fingerprint(tmp_path: Path, place: int) -> None:
    path = tmp_path / "a.safetensors"
    save_file({"a": tensor("U8", 16_000)}, path)
    assert fingerprint(changed(path, place)) != fingerprint(path)


@pytest.mark.parametrize("piece", [0, 1, 31, 62, 63])
def test_one_changed_byte_in_a_sampled_place_of_a_large_file_changes_the_fingerprint(
    tmp_path: Path, piece: int
) -> None:
    path = tmp_path / "a.safetensors"
    save_file({"a": tensor("U8", 1 << 20)}, path)
    place = (path.stat().st_size - 4096) * piece // 63 + 4000
    assert fingerprint(changed(path, place)) != fingerprint(path)


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
