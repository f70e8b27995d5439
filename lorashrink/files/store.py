"""Named tensors that are read when they are needed."""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
import stat
import threading
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial
from io import FileIO
from mmap import mmap
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from lorashrink.errors import DamagedFile, InputError
from lorashrink.files.memory import SLABS

if TYPE_CHECKING:
    import torch
    from torch import Tensor

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

# torch's name -> the format's.
FORMAT_NAMES = {torch_name: name for name, (_, torch_name) in DTYPES.items()}

FLOATS = frozenset(name for name in DTYPES if name.startswith(("F", "BF")))

# The dtypes in which factors can be written.
FACTOR_DTYPES = frozenset({"F8_E4M3", "F16", "BF16", "F32", "F64"})

# The user's word for the dtype to write -> the format's name; None keeps the input's.
OUTPUT_DTYPES: dict[str, str | None] = {
    "same": None,
    "fp8": "F8_E4M3",
    "fp16": "F16",
    "bf16": "BF16",
    "fp32": "F32",
    "16": "F16",
    "32": "F32",
}

# Words for a dtype that is chosen layer by layer, fp8 or fp16, by what shrinks the file most.
MIXTURES = ("mixed", "auto")

# The words for outputs with 8-bit factors.
IN_8_BITS = ("fp8", *MIXTURES)


def dtype_word(kinds: Collection[str]) -> str:
    """The user's word for these dtypes of the format: "mixed" for several, "" for none or one that has no word."""
    words = {kind: word for word, kind in OUTPUT_DTYPES.items() if not word.isdigit()}
    return "mixed" if len(kinds) > 1 else words.get(next(iter(kinds), ""), "")


COPY_CHUNK = 1 << 24

MAX_TEXT_BYTES = 100_000_000  # of a settings file, as of a header


def open_file(path: Path) -> FileIO:
    """A file, open to read. Raises OSError, also for a pipe or device, which would make the reader wait for ever."""
    # a pipe nobody writes to would block already here
    number = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    try:
        if not stat.S_ISREG(os.fstat(number).st_mode):
            kind = errno.EISDIR if stat.S_ISDIR(os.fstat(number).st_mode) else errno.EINVAL
            raise OSError(kind, "not a regular file" if kind == errno.EINVAL else os.strerror(kind), str(path))
        return FileIO(number, "rb")
    except BaseException:
        os.close(number)
        raise


# What the system says of names that no file can have.
_NO_FILE = (errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG, errno.ELOOP, errno.EINVAL)


def is_file(path: Path) -> bool:
    """Whether there is such a file. Raises InputError if the disk does not tell, which is not the same as no."""
    try:
        return stat.S_ISREG(os.stat(path).st_mode)
    except ValueError:
        return False
    except OSError as error:
        if error.errno in _NO_FILE:
            return False
        raise InputError(f"{path}: cannot be read ({error.strerror or error}).") from error


def read_text(path: Path, *, limit: int = MAX_TEXT_BYTES) -> str:
    """The text of a small file in UTF-8. Raises OSError as `open_file`, and ValueError if it is larger or no text."""
    with open_file(path) as handle:
        size = os.fstat(handle.fileno()).st_size
        if size > limit:
            raise ValueError(f"it has {size} bytes, and the most that is read is {limit}")
        return handle.readall().decode("utf-8")


# Bytes between two tensors that are read with them, and of the largest number.
_NEAR, _ALIGNED = 4096, 8

# A whole file is copied out of the system's cache by a few threads.
_READERS, _READ_CHUNK = 4, 1 << 25


class TensorInfo(NamedTuple):
    """What a header says about one tensor."""

    dtype: str  # the format's name: "F16", "BF16", ...
    shape: tuple[int, ...]
    nbytes: int
    file: int = 0  # index into TensorStore.files
    offset: int = 0  # of the first byte, from the start of that file


def tensor_info(dtype: str, shape: tuple[int, ...]) -> TensorInfo:
    """What a header says of a tensor of this dtype (the format's name) and shape."""
    return TensorInfo(dtype, shape, math.prod(shape) * DTYPES[dtype][0])


def info_of(tensor: Tensor) -> TensorInfo:
    """What a header says of this tensor."""
    return tensor_info(FORMAT_NAMES[str(tensor.dtype).removeprefix("torch.")], tuple(tensor.shape))


@cache
def torch_dtype(dtype: str) -> torch.dtype:
    """The dtype that has this name in the format. Raises KeyError."""
    import torch

    name = DTYPES[dtype][1]
    kind: torch.dtype = getattr(torch, name)
    return kind


def cast(tensor: Tensor, dtype: str) -> Tensor:
    """The tensor in a dtype of the format."""
    return tensor.to(torch_dtype(dtype))


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
        slabs: Mapping[int, mmap] | None = None,
    ) -> None:
        self.path = path
        self.tensors = dict(tensors)
        self.metadata = dict(metadata)
        self.files = tuple(files)
        self.headers = tuple(headers)  # raw header of each file: part of a base's identity
        self._slabs = dict(slabs or {})  # whole files, by their index, that belong to someone else
        self._own_slabs: list[mmap] = []
        self._open_files: dict[int, FileIO] = {}
        self._near = threading.local()  # what `together` has read for a thread
        self._lock = threading.Lock()

    @property
    def nbytes(self) -> int:
        """Bytes of the files."""
        return sum(path.stat().st_size for path in self.files)

    def read(self, name: str, rows: tuple[int, int] | None = None) -> Tensor:
        """The tensor `name`, or its rows `[start, stop)` alone, in the dtype of the file.

        Raises DamagedFile if the file ends too early or torch has no such dtype.
        """
        info = self.tensors[name]
        if info.dtype not in DTYPES:
            raise DamagedFile(f"{self.path}: tensor {name} has the unknown dtype {info.dtype}.")
        block, block_start = self._block_of(name)
        if block is not None and rows is None and info.nbytes and info.offset % DTYPES[info.dtype][0] == 0:
            import torch

            count, start = info.nbytes // DTYPES[info.dtype][0], info.offset - block_start
            return torch.frombuffer(block, dtype=torch_dtype(info.dtype), count=count, offset=start).reshape(info.shape)
        shape, start, nbytes = info.shape, 0, info.nbytes
        if rows is not None:
            per_row = info.nbytes // shape[0]
            start, nbytes = rows[0] * per_row, (rows[1] - rows[0]) * per_row
            shape = (rows[1] - rows[0], *shape[1:])
        return self._bytes(name, start, nbytes).view(torch_dtype(info.dtype)).reshape(shape)

    def load(self) -> None:
        """Read the files into memory as a whole, where there is room: tensors are then views, which nobody may change.

        Raises as `read`.
        """
        for index, path in enumerate(self.files):
            slab = None if index in self._slabs else SLABS.take(path.stat().st_size)
            if slab is not None:
                self._own_slabs.append(slab)
                starts = range(0, len(slab), _READ_CHUNK)
                parts = [memoryview(slab)[start : start + _READ_CHUNK] for start in starts]
                with ThreadPoolExecutor(_READERS) as readers:
                    list(readers.map(partial(self._read_at, index), parts, starts))
                self._slabs[index] = slab

    @contextlib.contextmanager
    def together(self, names: Iterable[str]) -> Iterator[None]:
        """Read in one go what lies together of these tensors; within the context, this thread's reads are views of it.

        Reading them one by one gives the same, and costs small tensors more time than their bytes take.
        """
        import torch

        blocks: dict[str, tuple[memoryview, int]] = {}
        for file, start, end, inside in self._stretches(names):
            block = memory_of(torch.empty(end - start, dtype=torch.uint8))
            self._read_at(file, block, start)
            blocks |= dict.fromkeys(inside, (block, start))
        self._near.blocks = blocks
        try:
            yield
        finally:
            self._near.blocks = {}

    def _stretches(self, names: Iterable[str]) -> list[tuple[int, int, int, list[str]]]:
        """(file, first byte, end, tensors) of stretches that hold these tensors; none of files that are in memory."""
        stretches: list[tuple[int, int, int, list[str]]] = []
        for name in sorted(names, key=lambda name: (self.tensors[name].file, self.tensors[name].offset)):
            info = self.tensors[name]
            file, start, end, inside = stretches[-1] if stretches else (-1, 0, 0, [])
            last = info.offset + info.nbytes
            if file == info.file and info.offset <= end + _NEAR and last <= start + COPY_CHUNK:
                inside.append(name)
                stretches[-1] = file, start, max(end, last), inside
            elif info.file not in self._slabs:
                # numbers are as aligned in the stretch as in the file
                stretches.append((info.file, info.offset - info.offset % _ALIGNED, last, [name]))
        return stretches

    def _block_of(self, name: str) -> tuple[Any, int]:
        """(bytes that have been read and hold the tensor, where they begin in its file); None without any."""
        if slab := self._slabs.get(self.tensors[name].file):
            return slab, 0
        blocks: dict[str, tuple[memoryview, int]] = getattr(self._near, "blocks", {})
        return blocks.get(name, (None, 0))

    def loaded(self, index: int) -> memoryview | None:
        """All bytes of a file that `load` has read."""
        slab = self._slabs.get(index)
        return None if slab is None else memoryview(slab)

    def chunks(self, name: str) -> Iterator[memoryview]:
        """The raw bytes of a tensor, in pieces of bounded size, whatever its dtype."""
        total = self.tensors[name].nbytes
        for start in range(0, total, COPY_CHUNK):
            yield memory_of(self._bytes(name, start, min(COPY_CHUNK, total - start)))

    def sample(self, pieces: int = 64, size: int = 4096) -> Iterator[bytes]:
        """Small blocks, `pieces` of them spread over each file, to tell apart files with equal headers."""
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
            self._slabs.clear()
            while self._own_slabs:
                SLABS.give(self._own_slabs.pop())

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
            self._read_at(info.file, memory_of(buffer), info.offset + start)
        return buffer

    def _handle(self, index: int) -> FileIO:
        with self._lock:
            if index not in self._open_files:
                self._open_files[index] = open_file(self.files[index])
            return self._open_files[index]

    def _read_at(self, index: int, view: memoryview, offset: int) -> None:
        path = self.files[index]
        try:
            if not read_at(self._handle(index), view, offset, self._lock):
                raise DamagedFile(f"{path}: the file ends before its tensors do. Download or copy it again.")
        except OSError as error:
            raise InputError(f"{path}: cannot be read ({error.strerror or error}).") from error


def read_at(handle: FileIO, view: memoryview, offset: int, lock: threading.Lock) -> bool:
    """Fill a view with the bytes of a file from an offset on; False if the file ends before. Raises OSError.

    lock: of those who share the handle.
    """
    while view:
        if hasattr(os, "preadv"):
            count = os.preadv(handle.fileno(), [view], offset)
        else:  # Windows has no positioned read
            with lock:
                handle.seek(offset)
                count = handle.readinto(view)
        if not count:
            return False
        view, offset = view[count:], offset + count
    return True


def memory_of(flat: Tensor) -> memoryview:
    """The bytes of a uint8 tensor on the CPU, without a copy."""
    return memoryview(flat.numpy())  # type: ignore[arg-type]  # numpy's arrays are buffers before Python 3.12 too


class ComputedStore(TensorStore):
    """Tensors that are computed when they are read, mostly from another store's.

    `computed` maps names to what a header would say of them, and to the function that computes them.
    """

    def __init__(
        self,
        path: Path,
        computed: Mapping[str, tuple[TensorInfo, Callable[[], Tensor]]],
        metadata: Mapping[str, str],
        files: Sequence[Path],
        headers: Sequence[bytes] = (),
    ) -> None:
        super().__init__(path, {name: info for name, (info, _) in computed.items()}, metadata, files, headers)
        self._compute = {name: compute for name, (_, compute) in computed.items()}

    def load(self) -> None:
        """Nothing: what is computed is not what the files hold."""

    def _stretches(self, names: Iterable[str]) -> list[tuple[int, int, int, list[str]]]:
        return []  # the files hold something else

    def chunks(self, name: str) -> Iterator[memoryview]:
        """The raw bytes of a tensor, which is computed once."""
        data = memory_of(self._bytes(name, 0, self.tensors[name].nbytes))
        for start in range(0, len(data), COPY_CHUNK):
            yield data[start : start + COPY_CHUNK]

    def _bytes(self, name: str, start: int, nbytes: int) -> Tensor:
        import torch

        flat = self._compute[name]().detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        if flat.numel() != self.tensors[name].nbytes:
            raise ValueError(f"{name}: {flat.numel()} bytes for {self.tensors[name]}")
        return flat[start : start + nbytes].clone()


def pickled_store(path: Path, tensors: Mapping[str, Tensor]) -> TensorStore:
    """The tensors of a `.pt`/`.ckpt`/`.bin` file that were loaded with `weights_only=True`."""
    computed = {name: (info_of(tensor), tensor.detach) for name, tensor in tensors.items()}
    return ComputedStore(path, computed, {}, [path], [json.dumps(sorted(computed)).encode()])


def join_stores(path: Path, stores: Mapping[str, TensorStore]) -> TensorStore:
    """Several stores as one, which has their names with the store's key as a prefix."""
    tensors: dict[str, TensorInfo] = {}
    files: list[Path] = []
    headers: list[bytes] = []
    for prefix, store in stores.items():
        if isinstance(store, ComputedStore):
            raise InputError(f"{store.path}: weights of a folder must be safetensors; convert this file first.")
        for name, info in store.tensors.items():
            tensors[prefix + name] = info._replace(file=info.file + len(files))
        files += store.files
        headers += store.headers
        store.close()
    return TensorStore(path, tensors, {}, files, headers)
