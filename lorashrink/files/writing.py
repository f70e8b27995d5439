"""Writing safetensors files, at once or tensor by tensor."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Mapping
from io import FileIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorashrink.errors import OutputError
from lorashrink.files.disk import as_output_error, cannot_write, complete_files, create_temporary, discard, publish
from lorashrink.files.hashes import Hashes, with_placeholders
from lorashrink.files.header import Arrangement, read_header
from lorashrink.files.memory import SLABS
from lorashrink.files.store import COPY_CHUNK, TensorInfo, TensorStore, info_of, memory_of, read_at

if TYPE_CHECKING:
    from torch import Tensor


_PIECE = 1 << 22  # bytes that are hashed in one go

_READS_BACK_OTHERWISE = "{}: what was written reads back otherwise; check the disk and the memory."


def save_tensors(
    path: Path,
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str],
    *,
    source: TensorStore | None = None,
    companions: Mapping[Path, bytes] | None = None,
) -> None:
    """Write a safetensors file in one step: it appears complete under its name, or not at all.

    tensors: in the dtypes to write, on any device.
    metadata: hashes of the contents that it has, of whatever value, are replaced by those of the new file.
    source: its tensors are copied byte by byte, except those in `tensors`, which must fit the shape in the source.
    companions: other files that appear together with this one.

    Raises OutputError.
    """
    infos = {name: info_of(tensor) for name, tensor in tensors.items()}
    if source is not None:
        infos |= source.tensors
    entries = with_placeholders(metadata)
    with SafetensorsWriter(path, infos, entries) as writer:
        for name in infos:
            if name in tensors:
                writer.write({name: tensors[name].cpu()})
            elif source is not None:
                writer.copy(name, source, name)
        if writer.readable_names() != infos.keys():
            raise OutputError(f"{path}: the written file has other tensors than planned; please report this.")
        writer.write_hashes()
        writer.commit(companions)


class _Unfinished(TensorStore):
    """A file that is being written, read through the writer's own descriptor, under the name that it will have."""

    def __init__(self, file: FileIO, lock: threading.Lock, *rest: Any) -> None:
        super().__init__(*rest)
        self._file, self._lock = file, lock

    def _handle(self, index: int) -> FileIO:
        return self._file


class SafetensorsWriter:
    """A safetensors file of known shapes, filled in any order and from any thread.

    The file lies under a temporary name in the same folder until `commit`, and is deleted if the
    `with` block is left without one.

    in_memory: the file is put together in memory, where there is room, and written at once by `flush`. Otherwise
    memory use does not depend on the size of the file.

    What is complete is hashed while the rest is written, if the metadata has placeholders for hashes.
    """

    def __init__(
        self,
        path: Path,
        tensors: Mapping[str, TensorInfo] | Arrangement,
        metadata: Mapping[str, str],
        *,
        in_memory: bool = False,
    ) -> None:
        self.path = path
        self.tensors = tensors if isinstance(tensors, Arrangement) else Arrangement(dict(tensors))
        header = self.tensors.header(metadata)
        self._header_length = len(header)
        self._lock = threading.Lock()
        nbytes = self.tensors.nbytes
        self._hashes = Hashes(metadata, self.tensors)
        self._hashed = 0  # pieces
        self._begun: set[str] = set()
        self._missing = [min(_PIECE, nbytes - low) for low in range(0, nbytes, _PIECE)]  # bytes of each piece
        self._hashing = threading.Lock()
        self._slab = SLABS.take(len(header) + self.tensors.nbytes) if in_memory else None
        try:
            with as_output_error(path):
                number, self.temporary = create_temporary(path)
        except BaseException:
            self._free()
            raise
        self._file = FileIO(number, "r+b")
        try:
            with as_output_error(path):
                os.ftruncate(number, len(header) + self.tensors.nbytes)
            self._write_header(header)
        except BaseException:
            self._discard()
            raise

    def write(self, tensors: Mapping[str, Tensor]) -> None:
        """Write tensors that are on the CPU, in one go what lies together in the file.

        Raises OutputError (disk full, ...).
        """
        import torch

        runs: list[tuple[int, list[memoryview]]] = []
        end = -1
        for name in sorted(tensors, key=self.tensors.offsets.__getitem__):
            start, flat = self.tensors.offsets[name], tensors[name].contiguous().reshape(-1).view(torch.uint8)
            if flat.numel() != self.tensors.tensors[name].nbytes:
                raise ValueError(f"{name}: {flat.numel()} bytes for {self.tensors.tensors[name]}")
            self._begin(name)
            if start != end:
                runs.append((start, []))
            runs[-1][1].append(memory_of(flat))
            end = start + flat.numel()
        for start, parts in runs:
            if self._slab is None and len(parts) > 1:
                parts = [memoryview(b"".join(parts))]
            for part in parts:
                self._fill(start, part)
                start += len(part)

    def copy(self, name: str, source: TensorStore, source_name: str) -> None:
        """Copy the bytes of a tensor of another file."""
        self._begin(name)
        start = self.tensors.offsets[name]
        for chunk in source.chunks(source_name):
            self._fill(start, chunk)
            start += len(chunk)

    def flush(self) -> None:
        """Write what was put together in memory, read it back and compare. Raises OutputError."""
        import numpy as np

        if self._slab is None:
            return
        contents = memoryview(self._slab)
        self._write_file(0, contents)
        expected, start = np.frombuffer(contents, np.uint8), 0
        with open(self.temporary, "rb", buffering=0) as handle:
            while chunk := handle.read(COPY_CHUNK):
                if not np.array_equal(np.frombuffer(chunk, np.uint8), expected[start : start + len(chunk)]):
                    break
                start += len(chunk)
        if start != len(contents):
            raise OutputError(_READS_BACK_OTHERWISE.format(self.path))

    def opened(self) -> TensorStore:
        """The file as a reader sees it, where tensors are zeros until they are written; from memory if it is there."""
        tensors, metadata, raw = read_header(self.temporary)
        slabs = {} if self._slab is None else {0: self._slab}
        return _Unfinished(self._file, self._lock, self.path, tensors, metadata, [self.path], [raw], slabs)

    def readable_names(self) -> set[str]:
        """The tensors that the reference library finds in what was written. Raises OutputError if it finds no file."""
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(self.temporary, "pt") as opened:
                return set(opened.keys())
        except (SafetensorError, OSError) as error:
            raise OutputError(f"{self.path}: the written file cannot be read back ({error}).") from error

    def write_hashes(self) -> None:
        """Replace placeholders in the metadata by the hashes of all tensors, which are written by now."""
        self._hash_complete_pieces()
        header = self.tensors.header(self._hashes.metadata())
        if any(self._missing) or len(header) != self._header_length:
            raise ValueError(f"{self.path}: not all tensors are written, or a hash is longer than its placeholder")
        self._write_header(header)

    def commit(self, companions: Mapping[Path, bytes] | None = None) -> None:
        """Flush to the disk and give the file its name, together with `companions`. Raises OutputError."""
        if any(self._missing):
            raise ValueError(f"{self.path}: not all tensors are written")
        with complete_files(companions or {}) as temporaries:
            with as_output_error(self.path):
                os.fsync(self._file.fileno())
                if os.name != "posix":  # Windows gives no new name to an open file; elsewhere it stays owned until then
                    self._file.close()
            publish({**temporaries, self.path: self.temporary})
            self._file.close()

    def __enter__(self) -> SafetensorsWriter:
        return self

    def __exit__(self, *exc: object) -> None:
        self._discard()

    def _free(self) -> None:
        if self._slab is not None:
            SLABS.give(self._slab)
            self._slab = None

    def _discard(self) -> None:
        self._free()
        with contextlib.suppress(OSError):
            self._file.close()
        discard(self.temporary)

    def _write_header(self, header: bytes) -> None:
        if self._slab is not None:
            memoryview(self._slab)[: len(header)] = header
        self._write_file(0, header)

    def _begin(self, name: str) -> None:
        with self._lock:
            if name in self._begun:
                raise ValueError(f"{self.path}: {name} is written twice")
            self._begun.add(name)

    def _fill(self, start: int, data: bytes | memoryview) -> None:
        """Write bytes of the data; `start` is counted from the end of the header."""
        offset, end = self._header_length + start, start + len(data)
        if self._slab is None:
            self._write_file(offset, data)
        else:
            memoryview(self._slab)[offset : offset + len(data)] = data
        with self._lock:
            for piece in range(start // _PIECE, -(-end // _PIECE)):
                low = piece * _PIECE
                self._missing[piece] -= min(end, low + _PIECE) - max(start, low)
        self._hash_complete_pieces()

    def _hash_complete_pieces(self) -> None:
        """Hash what is there already, in order, unless another thread does it: hashing is one thread's work."""
        pieces = len(self._missing) if self._hashes.needed else 0
        while self._hashed < pieces and not self._missing[self._hashed] and self._hashing.acquire(blocking=False):
            try:
                while self._hashed < pieces and not self._missing[self._hashed]:
                    start = self._header_length + self._hashed * _PIECE
                    end = min(start + _PIECE, self._header_length + self.tensors.nbytes)
                    self._hashes.update(self._read(start, end - start))
                    self._hashed += 1
                    if self._slab is None and hasattr(os, "posix_fadvise"):
                        # Linux begins to write these bytes to the disk, and the flush at the end has less to do.
                        with contextlib.suppress(OSError):
                            os.posix_fadvise(self._file.fileno(), start, end - start, os.POSIX_FADV_DONTNEED)
            finally:
                self._hashing.release()

    def _read(self, offset: int, length: int) -> bytearray | memoryview:
        if self._slab is not None:
            return memoryview(self._slab)[offset : offset + length]
        data = bytearray(length)
        with as_output_error(self.path):
            if not read_at(self._file, memoryview(data), offset, self._lock):
                raise OutputError(_READS_BACK_OTHERWISE.format(self.path))
        return data

    def _write_file(self, offset: int, data: bytes | memoryview) -> None:
        view = memoryview(data)
        try:
            while view:
                if hasattr(os, "pwrite"):
                    count = os.pwrite(self._file.fileno(), view, offset)
                else:  # Windows has no positioned write
                    with self._lock:
                        self._file.seek(offset)
                        count = self._file.write(view)
                view, offset = view[count:], offset + count
        except OSError as error:
            raise OutputError(cannot_write(self.path, error)) from error
