"""Bases in GGUF files, through the optional package gguf: its reader maps the file, tensors are unpacked one by one.

Models for pictures keep their native names there. Language models have names of their own, which are turned into those
of transformers here; in some of them the rows of q and k are stored in another order, which is undone.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorashrink.bases.quantised import DecodedStore
from lorashrink.errors import DamagedFile, InputError
from lorashrink.files.store import TensorStore, open_file, tensor_info

if TYPE_CHECKING:
    from torch import Tensor

MAGIC = b"GGUF"
_WHOLE_NUMBERS = {"I8": "I8", "I16": "I16", "I32": "I32", "I64": "I64"}
_BLOCK = re.compile(r"^(?:enc\.)?blk\.(\d+)\.(\w+)\.(weight|bias)$")
_ORIGINAL_SHAPE = "comfy.gguf.orig_shape."  # of convolutions, which are stored flat

# Architecture -> where its blocks are, what their layers are called, and what stands outside; "" is any other.
_T5 = {
    **{f"attn_{letter}": f"layer.0.SelfAttention.{letter}" for letter in "qkvo"},
    "attn_rel_b": "layer.0.SelfAttention.relative_attention_bias",
    "ffn_gate": "layer.1.DenseReluDense.wi_0",
    "ffn_up": "layer.1.DenseReluDense.wi_1",
    "ffn_down": "layer.1.DenseReluDense.wo",
}
_USUAL = {
    **{f"attn_{letter}": f"self_attn.{letter}_proj" for letter in "qkv"},
    "attn_qkv": "self_attn.qkv_proj",
    "attn_output": "self_attn.o_proj",
    **{f"ffn_{name}": f"mlp.{name}_proj" for name in ("gate", "up", "down")},
}
_GPT2 = {"attn_qkv": "attn.c_attn", "attn_output": "attn.c_proj", "ffn_up": "mlp.c_fc", "ffn_down": "mlp.c_proj"}
_NAMES: Mapping[str, tuple[str, Mapping[str, str], Mapping[str, str]]] = {
    "t5": ("encoder.block", _T5, {"token_embd": "shared"}),
    "t5encoder": ("encoder.block", _T5, {"token_embd": "shared"}),
    "gpt2": ("transformer.h", _GPT2, {"token_embd": "transformer.wte", "position_embd": "transformer.wpe"}),
    "phi3": (
        "model.layers",
        {**_USUAL, "ffn_up": "mlp.gate_up_proj"},
        {"token_embd": "model.embed_tokens", "output": "lm_head"},
    ),
    "": ("model.layers", _USUAL, {"token_embd": "model.embed_tokens", "output": "lm_head"}),
}
# Architectures whose q and k rows are stored as pairs, and not as halves, of each head.
_PAIRED = frozenset({"llama", "granite", "minicpm"})
_HEAD_COUNTS = {"attn_q": ("head_count",), "attn_k": ("head_count_kv", "head_count")}


def is_gguf(path: Path) -> bool:
    """Whether this is a GGUF file, by its first bytes or its name."""
    try:
        with open_file(path) as handle:
            return handle.read(len(MAGIC)) == MAGIC or path.suffix.lower() == ".gguf"
    except OSError:
        return False


def open_gguf(path: Path) -> TensorStore:
    """Open a GGUF file. Raises InputError (the package is missing, a type it cannot unpack) or DamagedFile."""
    try:
        import gguf
    except ImportError as error:
        raise InputError(
            f"{path}: GGUF files are read through the package gguf. Install it: pip install gguf"
        ) from error
    try:
        reader = gguf.GGUFReader(path)
        with open(path, "rb") as handle:
            header = handle.read(reader.data_offset)
        count = reader.get_field("split.count")
        if count is not None and count.contents() > 1:
            raise InputError(
                f"{path}: is one of {count.contents()} parts of a model. Join them first: llama-gguf-split --merge"
            )
        return GGUFStore(path, reader, header)
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error}).") from error
    except (ValueError, KeyError, IndexError, TypeError, OverflowError, ArithmeticError) as error:
        raise DamagedFile(f"{path}: no GGUF file, or cut short ({error}). Download or copy it again.") from error


class GGUFStore(DecodedStore):
    """The tensors of a GGUF file under the names that adapters know, unpacked to float32 when they are read."""

    def __init__(self, path: Path, reader: Any, header: bytes) -> None:
        super().__init__(path, {}, {}, [path], [header])
        self._reader: Any = reader
        self._architecture = str(self._fact("general.architecture") or "")
        self._tensors: dict[str, Any] = {}
        blocks, inner, outer = _NAMES.get(self._architecture, _NAMES[""])
        for tensor in reader.tensors:
            name = str(tensor.name)
            original = self._fact(_ORIGINAL_SHAPE + name)
            shape = tuple(map(int, original)) if original else _stored_shape(tensor)
            if math.prod(shape) != math.prod(_stored_shape(tensor)):
                raise ValueError(f"{name} does not have the shape that is said of it")
            if (heads := self._heads(name)) and shape[0] % (2 * heads):
                raise ValueError(f"{name} has {shape[0]} rows, which are no {heads} heads")
            module, _, kind = name.rpartition(".")
            if match := _BLOCK.match(name):
                number, layer, kind = match.groups()
                name = f"{blocks}.{number}.{inner[layer]}.{kind}" if layer in inner else name
            elif module in outer:
                name = f"{outer[module]}.{kind}"
            if name in self._tensors:
                raise ValueError("several tensors have one name")
            self._tensors[name] = tensor
            self.tensors[name] = tensor_info(_WHOLE_NUMBERS.get(tensor.tensor_type.name, "F32"), shape)

    def read(self, name: str, rows: tuple[int, int] | None = None) -> Tensor:
        """The tensor `name`, or its rows `[start, stop)` alone. Raises InputError if its type cannot be unpacked."""
        import numpy as np
        import torch
        from gguf.quants import dequantize

        packed, shape = self._tensors[name], self.tensors[name].shape
        heads, kind = self._heads(str(packed.name)), packed.tensor_type
        # only whole rows of the file can be chosen before they are unpacked
        early = rows is not None and not heads and shape == _stored_shape(packed)
        data = packed.data[rows[0] : rows[1]] if early and rows else packed.data
        try:
            numbers = data if kind.name in (*_WHOLE_NUMBERS, "F64") else dequantize(data, kind)
        except NotImplementedError as error:
            raise InputError(
                f"{self.path}: {packed.name} is packed as {kind.name}, which cannot be unpacked. "
                "Give a file of another type, or the model in bf16."
            ) from error
        # what is not packed is still a part of the mapped file
        tensor = torch.from_numpy(np.array(numbers, copy=not numbers.flags.writeable)).reshape(-1, *shape[1:])
        if heads:
            tensor = tensor.reshape(heads, -1, 2, *shape[1:]).transpose(1, 2).reshape(shape)
        return tensor if early or rows is None else tensor[rows[0] : rows[1]]

    def close(self) -> None:
        """Close the file; the store cannot be read afterwards."""
        self._tensors, self._reader = {}, None
        super().close()

    def _heads(self, name: str) -> int:
        """How many heads have their rows in pairs; 0 for any other tensor."""
        match = _BLOCK.match(name)
        if self._architecture not in _PAIRED or not match or match[2] not in _HEAD_COUNTS:
            return 0
        for fact in _HEAD_COUNTS[match[2]]:
            count = self._fact(f"{self._architecture}.attention.{fact}")
            if count:
                return int(count[int(match[1])] if isinstance(count, list) else count)
        return 0

    def _fact(self, name: str) -> Any:
        field = self._reader.get_field(name)
        return None if field is None else field.contents()


def _stored_shape(tensor: Any) -> tuple[int, ...]:
    return tuple(int(side) for side in reversed(tensor.shape.tolist()))
