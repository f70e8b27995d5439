"""Writing tensor files, against the reference library."""

import hashlib
import os
import stat
import struct
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save, save_file
from tensor_files import UNICODE, assert_same, disk_full, infos, inside, raw, tensor, write, zoo

from lorashrink.errors import OutputError
from lorashrink.files import store as stores
from lorashrink.files import writing
from lorashrink.files.disk import write_bytes
from lorashrink.files.hashes import LEGACY_HASH, MODEL_HASH, SPEC_HASH, with_hashes, with_placeholders
from lorashrink.files.header import Arrangement, header_bytes, read_header, write_order
from lorashrink.files.reading import open_tensors
from lorashrink.files.store import TensorInfo
from lorashrink.files.writing import SafetensorsWriter, save_tensors


@pytest.fixture
def umask() -> Iterator[None]:
    before = os.umask(0o027)
    yield
    os.umask(before)


# --- writing ------------------------------------------------------------------------------------


def test_the_data_section_is_that_of_the_reference_writer(tmp_path: Path) -> None:
    tensors = zoo()
    reference = save(tensors, {"a": "b"})
    written = write(tmp_path / "zoo.safetensors", tensors, {"a": "b"}).read_bytes()
    (length,) = struct.unpack("<Q", reference[:8])
    assert written[-sum(value.nbytes for value in tensors.values()) :] == reference[8 + length :]


@pytest.mark.parametrize("metadata", [{}, *({key: value} for key, value in UNICODE.items())], ids=str)
def test_a_file_with_one_metadata_entry_is_that_of_the_reference_writer(
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
        for name, expected in tensors.items():
            assert_same(reference.get_tensor(name), expected)


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
        for future in [pool.submit(writer.write, {name: tensors[name]}) for name in reversed(tensors)]:
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
                writer.write({"x": wrong})


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
        writer.commit()
    assert path.read_bytes() == save(renamed)


def test_hashes_replace_their_placeholders_and_the_tensors_stay(tmp_path: Path) -> None:
    tensors = {"a": tensor("F32", 3), "b": tensor("F16", 2)}
    path = tmp_path / "x.safetensors"
    with SafetensorsWriter(path, infos(tensors), with_placeholders({MODEL_HASH: "", "name": "é"})) as writer:
        writer.write(tensors)
        writer.write_hashes()
        writer.commit()
    data = b"".join(raw(tensors[name]) for name in write_order(infos(tensors)))
    with safe_open(path, "pt") as reference:
        assert reference.metadata() == {MODEL_HASH: hashlib.sha256(data).hexdigest(), "name": "é"}
        for name, expected in tensors.items():
            assert_same(reference.get_tensor(name), expected)


@pytest.mark.parametrize("piece", [1, 7, 64])
def test_hashes_do_not_depend_on_the_order_of_writing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, piece: int
) -> None:
    monkeypatch.setattr(writing, "_PIECE", piece)
    tensors, entries = zoo(), with_placeholders({MODEL_HASH: "", SPEC_HASH: "", LEGACY_HASH: ""})
    path = tmp_path / "zoo.safetensors"
    with SafetensorsWriter(path, infos(tensors), entries) as writer, ThreadPoolExecutor(8) as pool:
        for future in [pool.submit(writer.write, {name: tensors[name]}) for name in reversed(tensors)]:
            future.result()
        writer.write_hashes()
        writer.commit()
    data = b"".join(raw(tensors[name]) for name in write_order(infos(tensors)))
    with safe_open(path, "pt") as reference:
        assert reference.metadata() == with_hashes(entries, Arrangement(infos(tensors)), [data])


def test_half_a_file_gets_neither_hashes_nor_its_name(tmp_path: Path) -> None:
    tensors = {"a": tensor("F32", 3), "b": tensor("F16", 6)}
    with SafetensorsWriter(tmp_path / "x.safetensors", infos(tensors), {}) as writer:
        writer.write({"a": tensors["a"]})
        with pytest.raises(ValueError, match="a is written twice"):
            writer.write({"a": tensors["a"]})
        for publish in (writer.write_hashes, writer.commit):
            with pytest.raises(ValueError, match="not all tensors"):
                publish()
    assert inside(tmp_path) == []


def test_short_reads_and_refused_hints_change_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    preadv = os.preadv
    monkeypatch.setattr(os, "preadv", lambda number, views, offset: preadv(number, [views[0][:3]], offset))
    monkeypatch.setattr(os, "posix_fadvise", disk_full, raising=False)
    save_tensors(tmp_path / "x.safetensors", zoo(), {MODEL_HASH: ""})
    data = b"".join(raw(zoo()[name]) for name in write_order(infos(zoo())))
    assert read_header(tmp_path / "x.safetensors")[1] == {MODEL_HASH: hashlib.sha256(data).hexdigest()}


def test_an_unfinished_file_is_read_through_its_writer(tmp_path: Path) -> None:
    tensors = zoo()
    with SafetensorsWriter(tmp_path / "x.safetensors", infos(tensors), {}) as writer:
        before = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0
        with writer.opened() as opened:
            writer.write(tensors)
            for name, value in tensors.items():
                assert_same(opened.read(name), value)
            assert before in (0, len(os.listdir("/proc/self/fd")))
        writer.commit()  # the descriptor is still the writer's


# --- whole files ---------------------------------------------------------------------------------


def test_saved_tensors_are_those_of_the_reference_writer(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save_tensors(path, zoo() | {"turned": tensor("F32", 3, 5).T}, {"a": "b"})
    tensors = load_file(path)
    assert path.read_bytes() == save(tensors, {"a": "b"})
    assert tensors.keys() == {*zoo(), "turned"}


def test_tensors_of_a_source_are_copied_except_those_that_are_given(tmp_path: Path) -> None:
    """A new tensor has the shape that its name has in the source."""
    old = {"a": tensor("F32", 2, 3), "b": tensor("BF16", 4)}
    new = tensor("F32", 6)
    save_file(old, tmp_path / "old.safetensors")
    with open_tensors(tmp_path / "old.safetensors") as source:
        save_tensors(tmp_path / "new.safetensors", {"a": new}, {}, source=source)
    assert (tmp_path / "new.safetensors").read_bytes() == save(old | {"a": new.reshape(2, 3)})


def test_hashes_in_the_metadata_are_those_of_the_new_file(tmp_path: Path) -> None:
    tensors = {"a": tensor("F32", 300, 1000)}
    path = tmp_path / "x.safetensors"
    save_tensors(path, tensors, {MODEL_HASH: "old", LEGACY_HASH: "", SPEC_HASH: "", "ss_note": "é", "note": "n"})
    resaved = save(tensors, {"ss_note": "é"})
    with open_tensors(path) as store:
        assert store.metadata == {
            MODEL_HASH: hashlib.sha256(raw(tensors["a"])).hexdigest(),
            LEGACY_HASH: hashlib.sha256(resaved[0x100000:0x110000]).hexdigest()[:8],
            SPEC_HASH: "0x" + hashlib.sha256(raw(tensors["a"])).hexdigest(),
            "ss_note": "é",
            "note": "n",
        }


def test_companions_appear_only_with_their_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, config = tmp_path / "out" / "x.safetensors", tmp_path / "out" / "x.json"
    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", disk_full)
        with pytest.raises(OutputError):
            save_tensors(path, {"a": tensor("F32", 3)}, {}, companions={config: b"{}"})
    assert inside(path.parent) == []
    save_tensors(path, {"a": tensor("F32", 3)}, {}, companions={config: b"{}"})
    assert inside(path.parent) == ["x.json", "x.safetensors"]
    assert config.read_bytes() == b"{}"


def test_a_file_that_reads_back_with_other_names_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SafetensorsWriter, "readable_names", lambda writer: {"b"})
    with pytest.raises(OutputError, match="other tensors"):
        save_tensors(tmp_path / "out" / "x.safetensors", {"a": tensor("F32", 3)}, {})
    assert inside(tmp_path / "out") == []


# --- all or nothing -----------------------------------------------------------------------------


def test_the_name_appears_with_the_commit_and_not_before(tmp_path: Path) -> None:
    tensors = {"a": tensor("F32", 3)}
    path = tmp_path / "out" / "deep" / "x.safetensors"
    with SafetensorsWriter(path, infos(tensors), {}) as writer:
        writer.write(tensors)
        assert not path.exists()
        assert inside(path.parent) == [writer.temporary.name]
        writer.commit()
        assert inside(path.parent) == ["x.safetensors"]
    assert inside(path.parent) == ["x.safetensors"]


def test_a_block_left_without_commit_leaves_nothing(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with SafetensorsWriter(out / "x.safetensors", infos({"a": tensor("F32", 3)}), {}) as writer:
        assert len(inside(out)) == 1
        writer.write({"a": tensor("F32", 3)})
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
        writer.write(new)
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
            writer.write({"a": tensor("F32", 3)})
            writer.commit()

    with pytest.raises(OutputError, match=r"x\.safetensors.*No space left"):
        fill()
    assert inside(out) == []


def test_a_write_that_the_system_cuts_into_pieces_is_completed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pwrite = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda number, data, offset: pwrite(number, data[:3], offset))
    tensors = {"a": tensor("F32", 3, 4), "b": tensor("U8", 5)}
    assert write(tmp_path / "x.safetensors", tensors).read_bytes() == save(tensors)


def test_a_commit_onto_a_folder_fails_and_leaves_no_temporary_file(tmp_path: Path) -> None:
    path = tmp_path / "out" / "x.safetensors"
    path.mkdir(parents=True)
    with SafetensorsWriter(path, infos({"a": tensor("F32", 3)}), {}) as writer:
        writer.write({"a": tensor("F32", 3)})
        with pytest.raises(OutputError, match=r"x\.safetensors"):
            writer.commit()
    assert inside(tmp_path / "out") == ["x.safetensors"]
    assert inside(path) == []


def test_a_folder_below_a_file_is_an_output_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("text")
    path = tmp_path / "file" / "x.safetensors"
    with pytest.raises(OutputError, match=r"x\.safetensors"):
        SafetensorsWriter(path, infos({"a": tensor("F32", 3)}), {})
    with pytest.raises(OutputError, match=r"x\.safetensors"):
        write_bytes(path, b"data")


@pytest.mark.usefixtures("umask")
def test_a_tensor_file_has_the_rights_of_the_umask(tmp_path: Path) -> None:
    path = write(tmp_path / "x.safetensors", {"a": tensor("F32", 3)})
    assert stat.S_IMODE(path.stat().st_mode) == 0o640
    assert os.umask(0o027) == 0o027


@pytest.mark.usefixtures("umask")
def test_writing_never_sets_the_umask(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It belongs to the process: other threads create files meanwhile."""
    with monkeypatch.context() as patch:
        patch.setattr(os, "umask", lambda mask: pytest.fail(f"umask({mask:o})"))
        write(tmp_path / "x.safetensors", {"a": tensor("F32", 3)})
        write_bytes(tmp_path / "x.json", b"{}")
    assert stat.S_IMODE((tmp_path / "x.safetensors").stat().st_mode) == 0o640
