"""Tensor files: headers without loading, tensors one at a time, writing that is all or nothing.

Reading goes through positioned reads into fresh memory, not through a memory map: a batch stays
small whatever the size of its files, and a file that shrinks while it is read is an error and not
a crash. Nothing here imports torch before a tensor is read.

Format: https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import re
import struct
import tempfile
import threading
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorashrink.errors import DamagedFile, InputError, OutputError

if TYPE_CHECKING:
    from torch import Tensor, dtype

# The format's own limit; a larger length is a lie or an attack.
MAX_HEADER_BYTES = 100_000_000

# Bytes per number and torch's name, in the order in which the reference writer sorts tensors.
# A file written in another order would have another `sshs_model_hash` than its re-saved self.
DTYPES: dict[str, tuple[int, str]] = {
    "U64": (8, "uint64"),
    "I64": (8, "int64"),
    "F64": (8, "float64"),
    "C64": (8, "complex64"),
    "F32": (4, "float32"),
    "U32": (4, "uint32"),
    "I32": (4, "int32"),
    "BF16": (2, "bfloat16"),
    "F16": (2, "float16"),
    "U16": (2, "uint16"),
    "I16": (2, "int16"),
    "F8_E8M0": (1, "float8_e8m0fnu"),
    "F8_E4M3": (1, "float8_e4m3fn"),
    "F8_E5M2": (1, "float8_e5m2"),
    "I8": (1, "int8"),
    "U8": (1, "uint8"),
    "BOOL": (1, "bool"),
}
_TORCH_NAMES = {torch_name: name for name, (_, torch_name) in DTYPES.items()}
_WRITE_ORDER = {name: place for place, name in enumerate(DTYPES)}
FLOATS = frozenset(name for name in DTYPES if name.startswith(("F", "BF")))
# What users call the dtypes to write -> the format's name; None keeps the input's.
OUTPUT_DTYPES: dict[str, str | None] = {
    "same": None,
    "fp16": "F16",
    "bf16": "BF16",
    "fp32": "F32",
    "16": "F16",
    "32": "F32",
}
_COPY_CHUNK = 1 << 24
PICKLE_SUFFIXES = frozenset({".pt", ".pth", ".ckpt", ".bin"})


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """What a header says about one tensor."""

    dtype: str  # the format's name: "F16", "BF16", ...
    shape: tuple[int, ...]
    nbytes: int
    file: int = 0  # index into TensorStore.files
    offset: int = 0  # of the first byte, from the start of that file


class TensorStore:
    """Tensors of one or several safetensors files, read on demand; safe to read from many threads.

    `tensors` maps names to `TensorInfo`, `metadata` holds the header's strings, `files` the paths.
    Use as a context manager, or call `close`.
    """

    def __init__(
        self,
        path: Path,
        tensors: Mapping[str, TensorInfo],
        metadata: Mapping[str, str],
        files: Sequence[Path],
        headers: Sequence[bytes] = (),
    ) -> None:
        self.path = path
        self.tensors = dict(tensors)
        self.metadata = dict(metadata)
        self.files = tuple(files)
        self.headers = tuple(headers)  # raw header of each file: part of a base's identity
        self._open_files: dict[int, Any] = {}
        self._lock = threading.Lock()

    def read(self, name: str, rows: tuple[int, int] | None = None) -> Tensor:
        """The tensor `name`, or its rows `[start, stop)` alone, in the dtype of the file.

        Raises DamagedFile if the file ends too early or torch has no such dtype.
        """
        import torch

        info = self.tensors[name]
        if info.dtype not in DTYPES:
            raise DamagedFile(f"{self.path}: tensor {name} has the unknown dtype {info.dtype}.")
        kind: dtype = getattr(torch, DTYPES[info.dtype][1])
        shape, start, nbytes = info.shape, 0, info.nbytes
        if rows is not None:
            per_row = info.nbytes // shape[0]
            start, nbytes = rows[0] * per_row, (rows[1] - rows[0]) * per_row
            shape = (rows[1] - rows[0], *shape[1:])
        return self._bytes(name, start, nbytes).view(kind).reshape(shape)

    def chunks(self, name: str) -> Iterator[memoryview]:
        """The raw bytes of a tensor, in pieces of bounded size, whatever its dtype."""
        total = self.tensors[name].nbytes
        for start in range(0, total, _COPY_CHUNK):
            yield _memory(self._bytes(name, start, min(_COPY_CHUNK, total - start)))

    def sample(self, pieces: int = 64, size: int = 4096) -> Iterator[bytes]:
        """`pieces` small blocks spread over each file, to tell apart files with equal headers."""
        for index, path in enumerate(self.files):
            total = path.stat().st_size
            for piece in range(pieces):
                start = max(0, (total - size) * piece // max(1, pieces - 1))
                block = bytearray(min(size, total))
                self._read_at(index, memoryview(block), start)
                yield bytes(block)

    def close(self) -> None:
        """Close the files; the store cannot be read afterwards."""
        with self._lock:
            for handle in self._open_files.values():
                handle.close()
            self._open_files.clear()

    def __enter__(self) -> TensorStore:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def __del__(self) -> None:
        # `for layer in open_adapter(path)` is what people write, and it should not leave a warning behind.
        self.close()

    def _bytes(self, name: str, start: int, nbytes: int) -> Tensor:
        import torch

        info = self.tensors[name]
        buffer = torch.empty(nbytes, dtype=torch.uint8)
        if nbytes:
            self._read_at(info.file, _memory(buffer), info.offset + start)
        return buffer

    def _read_at(self, index: int, view: memoryview, offset: int) -> None:
        path = self.files[index]
        done = 0
        try:
            handle = self._handle(index)
            while done < len(view):
                if hasattr(os, "preadv"):
                    got = os.preadv(handle.fileno(), [view[done:]], offset + done)
                else:  # Windows has no positioned read
                    with self._lock:
                        handle.seek(offset + done)
                        got = handle.readinto(view[done:])
                if not got:
                    raise DamagedFile(f"{path}: the file ends before its tensors do. Download or copy it again.")
                done += got
        except OSError as error:
            raise InputError(f"{path}: cannot be read ({error.strerror or error}).") from error

    def _handle(self, index: int) -> Any:
        with self._lock:
            if index not in self._open_files:
                self._open_files[index] = open(self.files[index], "rb", buffering=0)  # noqa: SIM115 - held open
            return self._open_files[index]


def _memory(flat: Tensor) -> memoryview:
    """The bytes of a uint8 tensor on the CPU, without a copy."""
    return memoryview(flat.numpy())  # type: ignore[arg-type]  # numpy's arrays are buffers before Python 3.12 too


class ComputedStore(TensorStore):
    """Tensors that are made when they are read, mostly of those of another store.

    `made` maps names to what a header would say of them and to the function that makes them.
    """

    def __init__(
        self,
        path: Path,
        made: Mapping[str, tuple[TensorInfo, Callable[[], Tensor]]],
        metadata: Mapping[str, str],
        files: Sequence[Path],
        headers: Sequence[bytes] = (),
    ) -> None:
        super().__init__(path, {name: info for name, (info, _) in made.items()}, metadata, files, headers)
        self._make = {name: make for name, (_, make) in made.items()}

    def chunks(self, name: str) -> Iterator[memoryview]:
        """The raw bytes of a tensor, made once."""
        data = _memory(self._bytes(name, 0, self.tensors[name].nbytes))
        for start in range(0, len(data), _COPY_CHUNK):
            yield data[start : start + _COPY_CHUNK]

    def _bytes(self, name: str, start: int, nbytes: int) -> Tensor:
        import torch

        flat = self._make[name]().detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        if flat.numel() != self.tensors[name].nbytes:
            raise ValueError(f"{name}: {flat.numel()} bytes for {self.tensors[name]}")
        return flat[start : start + nbytes].clone()


def tensor_info(dtype: str, shape: tuple[int, ...]) -> TensorInfo:
    """What a header says of a tensor of this dtype (the format's name) and shape."""
    return TensorInfo(dtype, shape, math.prod(shape) * DTYPES[dtype][0])


def cast(tensor: Tensor, dtype: str) -> Tensor:
    """The tensor in a dtype of the format."""
    import torch

    return tensor.to(getattr(torch, DTYPES[dtype][1]))


def pickled_store(path: Path, loaded: Mapping[str, Tensor]) -> TensorStore:
    """The tensors of a `.pt`/`.ckpt`/`.bin` file that were loaded with `weights_only=True`."""
    made = {
        name: (
            tensor_info(_TORCH_NAMES[str(value.dtype).removeprefix("torch.")], tuple(value.shape)),
            partial(_same, value),
        )
        for name, value in loaded.items()
    }
    return ComputedStore(path, made, {}, [path], [json.dumps(sorted(made)).encode()])


def _same(tensor: Tensor) -> Tensor:
    return tensor


# --- reading ------------------------------------------------------------------------------------


def open_tensors(path: Path) -> TensorStore:
    """Open one file: safetensors, a shard index (`*.index.json`), or a pickle with tensors only.

    Raises InputError (missing, unreadable) or DamagedFile (not what its name says).
    """
    if path.name.endswith(".json") and ".index." in path.name:
        return _open_shards(path)
    if path.suffix.lower() in PICKLE_SUFFIXES:
        return _open_pickle(path)
    tensors, metadata, header = read_header(path)
    return TensorStore(path, tensors, metadata, [path], [header])


def join_stores(path: Path, parts: Mapping[str, TensorStore]) -> TensorStore:
    """Several stores as one; the names of each part get its key as a prefix."""
    tensors: dict[str, TensorInfo] = {}
    files: list[Path] = []
    headers: list[bytes] = []
    for prefix, part in parts.items():
        if isinstance(part, ComputedStore):
            raise InputError(f"{part.path}: weights of a folder must be safetensors; convert this file first.")
        for name, info in part.tensors.items():
            tensors[prefix + name] = TensorInfo(
                info.dtype, info.shape, info.nbytes, info.file + len(files), info.offset
            )
        files += part.files
        headers += part.headers
        part.close()
    return TensorStore(path, tensors, {}, files, headers)


def read_header(path: Path, file: int = 0) -> tuple[dict[str, TensorInfo], dict[str, str], bytes]:
    """Names, shapes and places of the tensors of a safetensors file, its metadata, and the raw header.

    Reads the header alone. Raises InputError if the file cannot be opened, and DamagedFile if it is
    cut short, no safetensors file, or has a header that contradicts itself or the file's size.
    """
    try:
        with open(path, "rb") as handle:
            size = os.fstat(handle.fileno()).st_size
            start = handle.read(8)
            length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
            start += handle.read(1)
            if not 2 <= length <= min(size - 8, MAX_HEADER_BYTES):
                raise DamagedFile(_no_header(path, start, length, size))
            raw = start[8:] + handle.read(length - 1)
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error}).") from error
    try:
        header = json.loads(raw, object_pairs_hook=_no_duplicates)
        metadata = {str(k): str(v) for k, v in (header.pop("__metadata__", None) or {}).items()}
        tensors = {name: _tensor_info(entry, file, 8 + length) for name, entry in header.items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DamagedFile(f"{path}: the safetensors header is broken ({error}). Download or copy it again.") from error
    _check_layout(path, tensors, 8 + length, size)
    return tensors, metadata, raw


def _no_header(path: Path, start: bytes, length: int, size: int) -> str:
    # A header begins with a brace, also that of a cut file whose length begins like a pickle.
    if start[8:] != b"{" and start.startswith((b"PK", b"\x80")):
        return f"{path}: a pickle and not safetensors. Rename it to .pt or .ckpt to load it without its code."
    return (
        f"{path}: not a safetensors file, or cut short: its header claims {length} bytes, the file has {size}. "
        "Download or copy it again."
    )


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a name appears twice")
    return result


def _tensor_info(entry: Mapping[str, Any], file: int, data_start: int) -> TensorInfo:
    begin, end = entry["data_offsets"]
    shape = tuple(entry["shape"])
    if not all(type(n) is int and n >= 0 for n in (begin, end, *shape)):
        raise ValueError("sizes must be whole numbers")
    if end < begin:
        raise ValueError(f"a tensor ends at {end}, before its start at {begin}")
    dtype = entry["dtype"]
    count = 1
    for side in shape:
        count *= side
    if dtype in DTYPES and count * DTYPES[dtype][0] != end - begin:
        raise ValueError(f"{dtype} {list(shape)} does not fill bytes {begin} to {end}")
    return TensorInfo(dtype, shape, end - begin, file, data_start + begin)


def _check_layout(path: Path, tensors: Mapping[str, TensorInfo], data_start: int, size: int) -> None:
    end = data_start
    for name, info in sorted(tensors.items(), key=lambda item: (item[1].offset, item[1].nbytes)):
        if info.offset < end:
            raise DamagedFile(f"{path}: tensor {name} overlaps another one. Download or copy the file again.")
        end = info.offset + info.nbytes
    if end > size:
        raise DamagedFile(
            f"{path}: cut short: its header promises {end} bytes, the file has {size}. Download or copy it again."
        )


def _open_shards(index: Path) -> TensorStore:
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        names = sorted(set(weight_map.values()))
        if not all(isinstance(name, str) for name in names):
            raise TypeError("a shard's name is no text")
    except OSError as error:
        raise InputError(f"{index}: cannot be read ({error.strerror or error}).") from error
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
        raise DamagedFile(f"{index}: not a shard index: no usable 'weight_map' ({error}).") from error
    tensors: dict[str, TensorInfo] = {}
    headers = []
    for number, name in enumerate(names):
        if Path(name).name != name or name in {"", ".", ".."}:
            raise DamagedFile(f"{index}: names a shard outside its own folder: {name!r}.")
        shard, _, header = read_header(index.parent / name, number)
        tensors |= shard
        headers.append(header)
    missing = weight_map.keys() - tensors.keys()
    if missing:
        raise DamagedFile(f"{index}: {len(missing)} tensors are in none of the shards, first {min(missing)}.")
    return TensorStore(index, tensors, {}, [index.parent / name for name in names], headers)


def _open_pickle(path: Path) -> TensorStore:
    if not path.is_file():
        raise InputError(f"{path}: no such file.")
    import torch

    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise DamagedFile(
            f"{path}: not loaded, because it is damaged or holds more than tensors, which could run code "
            f"({reason[:120]}). Ask its author for a safetensors file."
        ) from error
    while isinstance(loaded, Mapping) and isinstance(loaded.get("state_dict"), Mapping):
        loaded = loaded["state_dict"]
    if not isinstance(loaded, Mapping):
        raise DamagedFile(f"{path}: holds no table of named tensors.")
    tensors = {str(name): value for name, value in loaded.items() if isinstance(value, torch.Tensor)}
    for name, value in tensors.items():
        if str(value.dtype).removeprefix("torch.") not in _TORCH_NAMES or value.layout != torch.strided:
            raise DamagedFile(f"{path}: tensor {name} is {value.dtype}, {value.layout}, which safetensors cannot hold.")
    return pickled_store(path, tensors)


# --- folders ------------------------------------------------------------------------------------

_WEIGHT_STEMS = ("diffusion_pytorch_model", "model", "pytorch_model")
_VARIANTS = ("", ".fp32", ".fp16", ".bf16", ".non_ema")


def weights_file(folder: Path) -> Path | None:
    """The one weights file, or shard index, of a diffusers or transformers folder.

    Several variants may lie side by side; the most precise is taken and never a mixture.
    """
    for variant in _VARIANTS:
        for stem in _WEIGHT_STEMS:
            for name in (
                f"{stem}{variant}.safetensors",
                f"{stem}.safetensors.index{variant}.json",
                f"{stem}{variant}.safetensors.index.json",
            ):
                if (folder / name).is_file():
                    return folder / name
    return None


# --- writing ------------------------------------------------------------------------------------


def header_bytes(tensors: Mapping[str, TensorInfo], metadata: Mapping[str, str]) -> bytes:
    """Length and header of a safetensors file as the reference writer lays it out, padded to 8 bytes."""
    parts = [f'"__metadata__":{_compact(dict(metadata))}'] if metadata else []
    offset = 0
    for name in write_order(tensors):
        info = tensors[name]
        shape = ",".join(map(str, info.shape))
        parts.append(
            f'{_compact(name)}:{{"dtype":"{info.dtype}","shape":[{shape}],'
            f'"data_offsets":[{offset},{offset + info.nbytes}]}}'
        )
        offset += info.nbytes
    raw = ("{" + ",".join(parts) + "}").encode()
    raw += b" " * (-len(raw) % 8)
    return struct.pack("<Q", len(raw)) + raw


def write_order(tensors: Mapping[str, TensorInfo]) -> list[str]:
    """Names in the order of the reference writer: wider dtypes first, then by name."""
    return sorted(tensors, key=lambda name: (_WRITE_ORDER.get(tensors[name].dtype, -1), name))


def _compact(value: object) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


class SafetensorsWriter:
    """A safetensors file of known shapes, filled in any order and from any thread.

    The file lies under a temporary name in the same folder until `commit`, and is deleted if the
    `with` block is left without one. Memory use does not depend on the size of the file.
    """

    def __init__(self, path: Path, tensors: Mapping[str, TensorInfo], metadata: Mapping[str, str]) -> None:
        self.path = path
        header = header_bytes(tensors, metadata)
        self._tensors = dict(tensors)
        self._offsets: dict[str, int] = {}
        offset = len(header)
        for name in write_order(tensors):
            self._offsets[name] = offset
            offset += tensors[name].nbytes
        self._header_length, self.size = len(header), offset
        self._lock = threading.Lock()
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            number, temporary = tempfile.mkstemp(prefix=_prefix(path), suffix=".tmp", dir=path.parent)
            _own(number)
            self.temporary = Path(temporary)
            self._file = os.fdopen(number, "r+b", buffering=0)
        except OSError as error:
            raise OutputError(_cannot_write(path, error)) from error
        try:
            self._write_at(0, header)
        except OutputError:
            self._discard()
            raise

    def write(self, name: str, tensor: Tensor) -> None:
        """Put a contiguous CPU tensor into its place. Raises OutputError (disk full, ...)."""
        import torch

        flat = tensor.contiguous().reshape(-1).view(torch.uint8)
        if flat.numel() != self._tensors[name].nbytes:
            raise ValueError(f"{name}: {flat.numel()} bytes for {self._tensors[name]}")
        if flat.numel():
            self._write_at(self._offsets[name], _memory(flat))

    def copy(self, name: str, source: TensorStore, source_name: str) -> None:
        """Copy the bytes of a tensor of another file."""
        offset = self._offsets[name]
        for chunk in source.chunks(source_name):
            self._write_at(offset, chunk)
            offset += len(chunk)

    def data_chunks(self) -> Iterator[bytes]:
        """All bytes behind the header, as written, for hashes."""
        with open(self.temporary, "rb", buffering=0) as handle:
            handle.seek(self._header_length)
            while chunk := handle.read(_COPY_CHUNK):
                yield chunk

    def readable_names(self) -> set[str]:
        """The tensors that the reference library finds in what was written. Raises OutputError if it finds no file."""
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(self.temporary, "pt") as opened:
                return set(opened.keys())
        except (SafetensorError, OSError) as error:
            raise OutputError(f"{self.path}: the written file cannot be read back ({error}).") from error

    def replace_metadata(self, metadata: Mapping[str, str]) -> None:
        """Write the header again, with other metadata of the same encoded length."""
        header = header_bytes(self._tensors, metadata)
        if len(header) != self._header_length:
            raise ValueError("the header changed its length")
        self._write_at(0, header)

    def commit(self) -> None:
        """Flush to the disk and give the file its name. Raises OutputError."""
        try:
            os.fsync(self._file.fileno())
            if os.name != "posix":  # Windows gives no new name to an open file; elsewhere it stays owned until then
                self._file.close()
            _publish(self.temporary, self.path)
            self._file.close()
        except OSError as error:
            raise OutputError(_cannot_write(self.path, error)) from error

    def __enter__(self) -> SafetensorsWriter:
        return self

    def __exit__(self, *exc: object) -> None:
        self._discard()

    def _discard(self) -> None:
        self._file.close()
        with contextlib.suppress(OSError):
            self.temporary.unlink(missing_ok=True)

    def _write_at(self, offset: int, data: bytes | memoryview) -> None:
        view = memoryview(data)
        try:
            while view:
                if hasattr(os, "pwrite"):
                    done = os.pwrite(self._file.fileno(), view, offset)
                else:  # Windows has no positioned write
                    with self._lock:
                        self._file.seek(offset)
                        done = self._file.write(view)
                view, offset = view[done:], offset + done
        except OSError as error:
            raise OutputError(_cannot_write(self.path, error)) from error


def write_bytes(path: Path, data: bytes | Iterable[bytes]) -> None:
    """Write a file of these bytes, or pieces, in one step: it appears complete under its name, or not at all."""
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=_prefix(path), suffix=".tmp", delete=False) as handle:
            temporary = Path(handle.name)
            _own(handle.fileno())
            handle.writelines([data] if isinstance(data, bytes) else data)
            handle.flush()
            os.fsync(handle.fileno())
        _publish(temporary, path)
    except OSError as error:
        raise OutputError(_cannot_write(path, error)) from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


def _cannot_write(path: Path, error: OSError) -> str:
    return f"{path}: cannot be written ({error.strerror or error}). Nothing was left behind; choose another place."


def _publish(temporary: Path, path: Path) -> None:
    """Give a complete file its name, and the rights that its owner's other new files have."""
    umask = os.umask(0)
    os.umask(umask)
    temporary.chmod(0o666 & ~umask)
    os.replace(temporary, path)
    if os.name == "posix":  # elsewhere a folder cannot be opened to flush it
        with contextlib.suppress(OSError):
            number = os.open(path.parent, os.O_RDONLY)
            try:
                os.fsync(number)
            finally:
                os.close(number)


# --- what a killed process leaves behind --------------------------------------------------------

_RANDOM_PART = re.compile(r"[a-z0-9_]{8}\.tmp")  # as tempfile makes it
_RANDOM_LENGTH = 12


def _prefix(path: Path) -> str:
    return f".{path.stem[:40]}."


def _own(number: int) -> bool:
    """Take an open file until it is closed or the process ends, however that is; False if another process has it.

    Where the system has no such locks nothing is done: Windows does not delete files that are open.
    """
    try:
        import fcntl
    except ImportError:
        return True
    try:
        fcntl.flock(number, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def clear_leftovers(outputs: Iterable[Path]) -> list[Path]:
    """Delete temporary files of these outputs which no living process has open, and say which they were."""
    prefixes: dict[Path, set[str]] = defaultdict(set)
    for path in outputs:
        prefixes[path.parent].add(_prefix(path))
    left = [
        folder / name
        for folder, known in prefixes.items()
        if os.path.isdir(folder)
        for name in os.listdir(folder)
        if name[:-_RANDOM_LENGTH] in known and _RANDOM_PART.fullmatch(name[-_RANDOM_LENGTH:])
    ]
    return [path for path in left if _deleted(path)]


def _deleted(path: Path) -> bool:
    try:
        with open(path, "r+b") as handle:  # network shares lock only what may be written
            if not _own(handle.fileno()):
                return False
            if os.name == "posix":
                path.unlink()
        if os.name != "posix":
            path.unlink()
    except OSError:  # another process was faster, or may do what this one may not
        return False
    return True


def check_output(path: Path, *, force: bool, inputs: Collection[Path] = ()) -> None:
    """Find out before hours of work whether a file can be written; `inputs` are never overwritten.

    Raises OutputError if it is one of them, exists and `force` is not set, or lies where nothing can be written.
    """
    place = os.path.realpath(path)
    if any(place == os.path.realpath(each) for each in inputs):
        raise OutputError(f"{path}: is an input, and inputs are never overwritten. Choose another place.")
    if os.path.isdir(path):
        raise OutputError(f"{path}: is a folder. Choose another name.")
    if os.path.exists(path) and not force:
        raise OutputError(f"{path}: exists already. Use --force to replace it, or choose another place.")
    folder = next(
        parent for parent in [path.absolute().parent, *path.absolute().parent.parents] if os.path.exists(parent)
    )
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        raise OutputError(f"{path}: {folder} cannot be written to. Choose another place.")


# --- identity -----------------------------------------------------------------------------------


def sha256_file(path: Path) -> str:
    """SHA-256 of a whole file, as 64 hexadecimal digits."""
    digest = hashlib.sha256()
    try:
        with open(path, "rb", buffering=0) as handle:
            while chunk := handle.read(_COPY_CHUNK):
                digest.update(chunk)
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error}).") from error
    return digest.hexdigest()


def content_fingerprint(store: TensorStore) -> str:
    """A quick identity of a store's contents: SHA-256 of its headers, sizes and 64 blocks of each file."""
    digest = hashlib.sha256()
    for path, header in zip(store.files, store.headers, strict=True):
        digest.update(header)
        digest.update(str(path.stat().st_size).encode())
    for block in store.sample():
        digest.update(block)
    return digest.hexdigest()
