"""Tensors that are in memory already, as if they were in a safetensors file."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from lorashrink.errors import InputError
from lorashrink.files.header import Arrangement
from lorashrink.files.store import FORMAT_NAMES, ComputedStore, TensorStore, info_of, memory_of

if TYPE_CHECKING:
    from torch import Tensor


class MemoryStore(ComputedStore):
    """A store over a mapping of tensors, on any device; it belongs to no file.

    name: what messages call it. The mapping is asked again at each reading, so that it may load tensors when
    needed. Raises InputError if a value is no tensor that a file could hold.
    """

    def __init__(self, name: str, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
        import torch

        super().__init__(Path(name), {}, metadata, ())
        self._numbers = tensors
        for key, tensor in tensors.items():
            if not isinstance(tensor, torch.Tensor):
                raise InputError(f"{name}: {key} is {type(tensor).__name__} and no tensor.")
            if str(tensor.dtype).removeprefix("torch.") not in FORMAT_NAMES or tensor.layout != torch.strided:
                raise InputError(f"{name}: {key} is {tensor.dtype}, {tensor.layout}, which no file can hold.")
            self.tensors[key], self._compute[key] = info_of(tensor), partial(tensors.__getitem__, key)

    @property
    def nbytes(self) -> int:
        """Bytes of the file that these tensors would be."""
        arrangement = Arrangement(self.tensors)
        return len(arrangement.header(self.metadata)) + arrangement.nbytes

    def sample(self, pieces: int = 64, size: int = 4096) -> Iterator[bytes]:
        """What a header would say of every tensor, and about `pieces` of its numbers."""
        import torch

        for name, info in sorted(self.tensors.items()):
            yield f"{name} {info.dtype} {info.shape}".encode()
            flat = self._numbers[name].detach().reshape(-1)
            few = flat[:: max(1, len(flat) // pieces)]
            few = torch.empty(len(few), dtype=few.dtype).copy_(few)  # whatever its strides
            yield bytes(memory_of(few.view(torch.uint8)))


def sha256_tensors(store: TensorStore, context: str) -> str:
    """SHA-256 of all tensors and metadata of a store without files, and of what else decides their meaning."""
    digest = hashlib.sha256(repr((context, sorted(store.metadata.items()))).encode())
    for name, info in sorted(store.tensors.items()):
        digest.update(f"{name} {info.dtype} {info.shape}".encode())
        for chunk in store.chunks(name):
            digest.update(chunk)
    return digest.hexdigest()
