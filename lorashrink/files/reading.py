"""Opening safetensors, sharded and pickled files without loading their tensors."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorashrink.errors import DamagedFile, InputError
from lorashrink.files.store import DTYPES, TORCH_NAMES, TensorInfo, TensorStore, pickled_store

if TYPE_CHECKING:
    pass

# The format's own limit; a larger length is a lie or an attack.
MAX_HEADER_BYTES = 100_000_000

PICKLE_SUFFIXES = frozenset({".pt", ".pth", ".ckpt", ".bin"})

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
        if str(value.dtype).removeprefix("torch.") not in TORCH_NAMES or value.layout != torch.strided:
            raise DamagedFile(f"{path}: tensor {name} is {value.dtype}, {value.layout}, which safetensors cannot hold.")
    return pickled_store(path, tensors)
