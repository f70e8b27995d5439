"""Opening safetensors, sharded and pickled files without loading their tensors."""

from __future__ import annotations

import contextlib
import json
import zipfile
from collections.abc import Mapping
from pathlib import Path

from lorashrink.errors import DamagedFile, InputError
from lorashrink.files.disk import absent_text
from lorashrink.files.header import read_header
from lorashrink.files.store import FORMAT_NAMES, TensorInfo, TensorStore, pickled_store, read_text

_SHARED, _SLACK = 4, 1 << 20

PICKLE_SUFFIXES = frozenset({".pt", ".pth", ".ckpt", ".bin"})


def open_tensors(path: Path) -> TensorStore:
    """Open one file: safetensors, a shard index (`*.index.json`), or a pickle with tensors only.

    Raises InputError (missing, unreadable) or DamagedFile (not what its name says).
    """
    if path.name.endswith(".json") and ".index." in path.name:
        return open_shards(path)
    if path.suffix.lower() in PICKLE_SUFFIXES:
        return open_pickle(path)
    tensors, metadata, header = read_header(path)
    return TensorStore(path, tensors, metadata, [path], [header])


def open_shards(index: Path) -> TensorStore:
    """Open the files that a shard index names. Raises as `open_tensors`."""
    try:
        weight_map = json.loads(read_text(index))["weight_map"]
        names = sorted(set(weight_map.values()))
        if not all(isinstance(name, str) for name in names):
            raise TypeError("a shard's name is no text")
        "".join([*names, *weight_map]).encode()  # half a character has no place in a name
    except OSError as error:
        raise InputError(f"{index}: cannot be read ({error.strerror or error}).") from error
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
        raise DamagedFile(f"{index}: not a shard index: no usable 'weight_map' ({error}).") from error
    tensors: dict[str, TensorInfo] = {}
    headers = []
    for index_of_shard, name in enumerate(names):
        if Path(name).name != name or name in {"", ".", ".."} or "\0" in name:
            raise DamagedFile(f"{index}: names a shard outside its own folder: {name!r}.")
        shard, _, header = read_header(index.parent / name, index_of_shard)
        tensors |= shard
        headers.append(header)
    missing = weight_map.keys() - tensors.keys()
    if missing:
        raise DamagedFile(f"{index}: {len(missing)} tensors are in none of the shards, first {min(missing)}.")
    return TensorStore(index, tensors, {}, [index.parent / name for name in names], headers)


def open_pickle(path: Path) -> TensorStore:
    """Load a pickle that holds nothing but tensors. Raises as `open_tensors`."""
    if not path.is_file():
        raise InputError(f"{path}: {absent_text(path)}")
    import torch

    if zipfile.is_zipfile(path):  # whose parts torch writes as they are, so that they do not unpack to far more
        # torch says what is wrong with a damaged one
        with (
            contextlib.suppress(zipfile.BadZipFile, ValueError, OSError, NotImplementedError),
            zipfile.ZipFile(path) as archive,
        ):
            _check_claims(path, sum(part.file_size for part in archive.infolist()))
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
    for name, tensor in tensors.items():
        if str(tensor.dtype).removeprefix("torch.") not in FORMAT_NAMES or tensor.layout != torch.strided:
            raise DamagedFile(
                f"{path}: tensor {name} is {tensor.dtype}, {tensor.layout}, which safetensors cannot hold."
            )
    _check_claims(path, sum(tensor.numel() * tensor.element_size() for tensor in tensors.values()))
    return pickled_store(path, tensors)


def _check_claims(path: Path, claimed: int) -> None:
    """Tensors may share or repeat numbers, so that some more than the file holds is in order."""
    size = path.stat().st_size
    if claimed > _SHARED * size + _SLACK:
        raise DamagedFile(
            f"{path}: says that it holds {claimed} bytes of numbers, and has {size}. Ask its author for a safetensors "
            "file."
        )
