"""Tensors of every dtype, and files of them, for the tests of reading and writing."""

import errno
import itertools
import json
import os
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from lorashrink.files.store import DTYPES, TensorInfo, info_of
from lorashrink.files.writing import SafetensorsWriter

KINDS = [name for name, (_, torch_name) in DTYPES.items() if hasattr(torch, torch_name)]
UNICODE = {"ss_tag": 'quote " backslash \\ newline \n tab \t bell \x07', "名前": "ソフト 🎨 é \u2028", "empty": ""}


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


def assert_same(tensor: Tensor, expected: Tensor) -> None:
    assert (tensor.dtype, tensor.shape, raw(tensor)) == (expected.dtype, expected.shape, raw(expected))


def infos(tensors: Mapping[str, Tensor]) -> dict[str, TensorInfo]:
    return {name: info_of(value) for name, value in tensors.items()}


def write(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> Path:
    with SafetensorsWriter(path, infos(tensors), metadata or {}) as writer:
        writer.write(tensors)
        writer.commit()
    return path


def inside(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def raw_file(path: Path, header: object, data: bytes = b"", length: int | None = None) -> Path:
    """A file with this header, as bytes or to be encoded, and a header length that may be a lie."""
    encoded = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(encoded) if length is None else length) + encoded + data)
    return path


def entry(begin: int, end: int, **changes: object) -> dict[str, object]:
    return {"dtype": "U8", "shape": [end - begin], "data_offsets": [begin, end]} | changes


def shards(folder: Path, parts: Sequence[Mapping[str, Tensor]], stem: str = "model") -> Path:
    weight_map: dict[str, str] = {}
    for number, part in enumerate(parts, 1):
        name = f"{stem}-{number:05d}-of-{len(parts):05d}.safetensors"
        save_file(dict(part), folder / name)
        weight_map |= dict.fromkeys(part, name)
    index = folder / f"{stem}.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return index


def disk_full(*_: object) -> int:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
