"""The header of a safetensors file: names, dtypes, shapes and offsets of its tensors, and its metadata."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lorashrink.errors import DamagedFile, InputError
from lorashrink.files.disk import absent_text
from lorashrink.files.store import DTYPES, TensorInfo, open_file
from lorashrink.text import count_text

# The format's own limit; a larger length is a lie or an attack.
MAX_HEADER_BYTES = 100_000_000

_TOO_LARGE = 2**64

# Endings of files that hold no tensors, and that were named by mistake.
_TEXTS = frozenset({".txt", ".md", ".json", ".toml", ".yaml", ".csv", ".html", ".png", ".jpg", ".webp", ".zip"})

# How files begin that a download saved under the name of a model.
_OTHER_FILES = (
    ("a web page, perhaps because the download needs a login", (b"<!doctyp", b"<html", b"<?xml")),
    ("a picture", (b"\x89png", b"\xff\xd8\xff", b"riff", b"gif8")),
)

_WRITE_ORDER = {dtype: position for position, dtype in enumerate(DTYPES)}

# --- writing ------------------------------------------------------------------------------------


class Arrangement:
    """The tensors of a safetensors file as the reference writer lays them out: wider dtypes first, then by name.

    tensors: what the header says of them. offsets: name -> first byte, counted from the end of the header.
    nbytes: of all tensors. The part of the header that does not depend on metadata is encoded once.
    """

    def __init__(self, tensors: Mapping[str, TensorInfo]) -> None:
        self.tensors = tensors
        self.offsets: dict[str, int] = {}
        self.nbytes = 0
        entries = []
        for name in write_order(tensors):
            info, start = tensors[name], self.nbytes
            self.offsets[name] = start
            self.nbytes += info.nbytes
            head, tail = _entry(name, info)
            entries.append(f"{head}{start},{self.nbytes}{tail}")
        self._entries = ",".join(entries)

    def header(self, metadata: Mapping[str, str]) -> bytes:
        """Length and header of the file with this metadata, padded to 8 bytes."""
        start = _metadata_entry(metadata)
        raw = ("{" + start + ("," if start and self._entries else "") + self._entries + "}").encode()
        raw += b" " * (-len(raw) % 8)
        return struct.pack("<Q", len(raw)) + raw


class Sizes:
    """Exact sizes of files that hold some of many tensors, without laying out each file.

    tensors: all that may be in a file, in any shape. A group is what `group` makes of tensors that come together.
    """

    Group = tuple[Any, Any, Any]  # int64 arrays: place in the order of writing, bytes, characters of the entry

    def __init__(self, tensors: Iterable[tuple[str, TensorInfo]]) -> None:
        self._places: dict[tuple[str, str], int] = {}
        entries = {(info.dtype, name) for name, info in tensors}
        for dtype, name in sorted(entries, key=lambda entry: (_WRITE_ORDER.get(entry[0], -1), entry[1])):
            self._places[dtype, name] = len(self._places)

    def group(self, tensors: Mapping[str, TensorInfo]) -> Group:
        """Tensors that come together into a file."""
        import numpy as np

        rows = []
        for name, info in tensors.items():
            start, end = _entry(name, info)
            rows.append((self._places[info.dtype, name], info.nbytes, len(f"{start},{end}".encode())))
        places, sizes, characters = np.array(rows, np.int64).reshape(-1, 3).T
        return places, sizes, characters

    def size(self, groups: Sequence[Group], metadata: Mapping[str, str]) -> int:
        """Bytes of the file with these groups and this metadata."""
        import numpy as np

        places, sizes, characters = (np.concatenate(arrays) for arrays in zip(*groups, strict=True))
        by_place = np.zeros((2, len(self._places)), np.int64)
        by_place[:, places] = sizes, characters
        present = by_place[:, by_place[1] > 0]
        ends = present[0].cumsum()
        offsets = np.concatenate([ends, ends - present[0]])
        digits = 1 + np.searchsorted(_POWERS, offsets, side="right")
        entries: int = int(present[1].sum() + digits.sum()) + max(0, present.shape[1] - 1)
        start = len(_metadata_entry(metadata).encode())
        length = 2 + start + (1 if start and entries else 0) + entries
        return 8 + length + -length % 8 + int(present[0].sum())


_POWERS = [10**power for power in range(1, 19)]


def _entry(name: str, info: TensorInfo) -> tuple[str, str]:
    """A tensor's entry before its first offset and behind its second one; a comma is between these."""
    shape = ",".join(map(str, info.shape))
    return f'{_compact(name)}:{{"dtype":"{info.dtype}","shape":[{shape}],"data_offsets":[', "]}"


def _metadata_entry(metadata: Mapping[str, str]) -> str:
    return f'"__metadata__":{_compact(dict(metadata))}' if metadata else ""


def header_bytes(tensors: Mapping[str, TensorInfo], metadata: Mapping[str, str]) -> bytes:
    """Length and header of a safetensors file as the reference writer lays it out, padded to 8 bytes."""
    return Arrangement(tensors).header(metadata)


def write_order(tensors: Mapping[str, TensorInfo]) -> list[str]:
    """Names in the order of the reference writer: wider dtypes first, then by name."""
    return sorted(tensors, key=lambda name: (_WRITE_ORDER.get(tensors[name].dtype, -1), name))


_compact = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode


# --- reading ------------------------------------------------------------------------------------


def read_header(path: Path, file: int = 0) -> tuple[dict[str, TensorInfo], dict[str, str], bytes]:
    """Tensors of a safetensors file, its metadata, and the raw header; `file` is the index to note in each TensorInfo.

    Raises InputError if the file cannot be opened, and DamagedFile if it is cut short, no safetensors file, has bytes
    that belong to no tensor, or a header that contradicts itself or the file's size.
    """
    raw, size = _raw_header(path)
    data_start = 8 + len(raw)
    try:
        header = json.loads(raw)
        if not _each_name_once(raw, header):
            header = json.loads(raw, object_pairs_hook=_without_duplicates)
        metadata = {str(key): str(value) for key, value in (header.pop("__metadata__", None) or {}).items()}
        tensors = {name: _tensor_info(entry, file, data_start) for name, entry in header.items()}
        "".join([*tensors, *metadata, *metadata.values()]).encode()  # half a character has no place in a file
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DamagedFile(
            f"{path}: the safetensors header is broken ({str(error)[:200]}). Download or copy it again."
        ) from error
    end = data_start
    for start, nbytes, name in sorted([(info.offset, info.nbytes, name) for name, info in tensors.items()]):
        if start < end:
            raise DamagedFile(f"{path}: tensor {name} overlaps another one. Download or copy the file again.")
        if start > end:  # the reference library refuses such a file, and with it all programs
            unused = count_text(start - end, "byte")
            raise DamagedFile(f"{path}: has {unused} in front of tensor {name}. Download or copy it again.")
        end = start + nbytes
    if end < size:
        raise DamagedFile(
            f"{path}: has {count_text(size - end, 'byte')} behind its last tensor, and programs refuse such a file. "
            f"Download or copy it again. If something was appended: truncate -s {end} FILE"
        )
    if end > size:
        raise DamagedFile(
            f"{path}: cut short: its header promises {end} bytes, the file has {size}. Download or copy it again."
        )
    return tensors, metadata, raw


def _raw_header(path: Path) -> tuple[bytes, int]:
    """(header without its length, size of the file). Raises as `read_header`."""
    try:
        with open_file(path) as handle:
            size = os.fstat(handle.fileno()).st_size
            start = handle.read(8)
            length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
            brace = handle.read(1)
            if 2 <= length <= min(size - 8, MAX_HEADER_BYTES):
                raw = bytearray(brace)
                while len(raw) < length and (piece := handle.read(length - len(raw))):  # which may be shorter
                    raw += piece
                return bytes(raw), size
    except FileNotFoundError as error:
        raise InputError(f"{path}: {absent_text(path)}") from error
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error}).") from error
    if path.suffix.lower() in _TEXTS:
        raise DamagedFile(f"{path}: not a .safetensors file. Give the LoRA or model itself.")
    if kind := next((kind for kind, beginnings in _OTHER_FILES if start.lower().startswith(beginnings)), ""):
        raise DamagedFile(f"{path}: {kind}, and not a .safetensors file. Download it again.")
    # Without the brace of a header: a safetensors file that is cut short may begin like a pickle.
    if brace != b"{" and start.startswith((b"PK", b"\x80")):
        raise DamagedFile(
            f"{path}: a pickle and not safetensors. Rename it to .pt or .ckpt to load it without its code."
        )
    claim = f"its header claims {length} bytes, the file has {size}"
    damage = f"not a safetensors file, or cut short: {claim}" if size else "the file is empty"
    raise DamagedFile(f"{path}: {damage}. Download or copy it again.")


def _each_name_once(raw: bytes, header: Mapping[str, Any]) -> bool:
    """Whether all strings of the text are in the parsed header, where a name that appears twice is there once.

    Quotes are counted, which is many times as fast as a look at each object. False where counting proves nothing.
    """
    if b"\\\\" in raw:  # a quote behind it may be escaped or not
        return False
    entries = {**header}
    metadata = entries.pop("__metadata__", None)
    strings = sum(1 + len(entry) + isinstance(entry["dtype"], str) for entry in entries.values())
    if "__metadata__" in header:
        strings += 1 + sum(1 + isinstance(value, str) for value in (metadata or {}).values())
    return raw.count(b'"') - raw.count(b'\\"') == 2 * strings


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a name appears twice")
    return result


_WHOLE = {int}


def _tensor_info(entry: Mapping[str, Any], file: int, data_start: int) -> TensorInfo:
    begin, end = entry["data_offsets"]
    dtype, shape = entry["dtype"], tuple(entry["shape"])
    sizes = (begin, end, *shape)
    if set(map(type, sizes)) != _WHOLE or min(sizes) < 0 or max(sizes) >= _TOO_LARGE:
        raise ValueError("sizes must be whole numbers of at most 64 bits")
    if end < begin:
        raise ValueError(f"a tensor ends at {end}, before its start at {begin}")
    if not isinstance(dtype, str):
        raise ValueError("a dtype must be a name")
    count = 1
    for side in shape:
        count *= side
        if count >= _TOO_LARGE:  # the product of a hostile shape has millions of digits
            raise ValueError("a shape is larger than any file")
    if dtype in DTYPES and count * DTYPES[dtype][0] != end - begin:
        raise ValueError(f"{dtype} {list(shape)} does not fill bytes {begin} to {end}")
    return TensorInfo(dtype, shape, end - begin, file, data_start + begin)
