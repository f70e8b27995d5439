"""Writing safetensors files tensor by tensor."""

from __future__ import annotations

import contextlib
import json
import os
import struct
import tempfile
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from lorashrink.errors import OutputError
from lorashrink.files.disk import cannot_write, lock_file, publish, temporary_prefix
from lorashrink.files.store import COPY_CHUNK, DTYPES, TensorInfo, TensorStore, memory_of

if TYPE_CHECKING:
    from torch import Tensor

_WRITE_ORDER = {name: place for place, name in enumerate(DTYPES)}

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
            number, temporary = tempfile.mkstemp(prefix=temporary_prefix(path), suffix=".tmp", dir=path.parent)
            lock_file(number)
            self.temporary = Path(temporary)
            self._file = os.fdopen(number, "r+b", buffering=0)
        except OSError as error:
            raise OutputError(cannot_write(path, error)) from error
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
            self._write_at(self._offsets[name], memory_of(flat))

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
            while chunk := handle.read(COPY_CHUNK):
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
            publish(self.temporary, self.path)
            self._file.close()
        except OSError as error:
            raise OutputError(cannot_write(self.path, error)) from error

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
            raise OutputError(cannot_write(self.path, error)) from error
