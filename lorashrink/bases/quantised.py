"""Quantised bases in safetensors: the weights that packed tensors and their companions stand for.

Formats that are read: 8-bit floats with a scale (ComfyUI, per tensor or per row), and bitsandbytes' int8, nf4 and fp4
(https://arxiv.org/abs/2208.07339, https://arxiv.org/abs/2305.14314). All other formats are refused by name: norms of
packed numbers would be wrong without a sign of it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from lorashrink.errors import DamagedFile, InputError
from lorashrink.files.store import FLOATS, TensorStore, tensor_info

if TYPE_CHECKING:
    from torch import Tensor

# What a tensor's name ends with -> the format that has such tensors.
_FOREIGN = (
    (".qweight", "GPTQ or AWQ"),
    (".weight_scale_2", "nvfp4"),
    (".weight_packed", "compressed-tensors"),
    (".weight_scale_inv", "fp8 with a scale per block"),
    (".W_q", "HQQ"),
    (".weight._data", "quanto"),
    (".wscales", "SVDQuant (Nunchaku)"),
    (".zero_point", "SDNQ"),
)
_FLOAT8 = frozenset({"F8_E4M3", "F8_E5M2"})
_COMFY_FORMATS = frozenset({"float8_e4m3fn", "float8_e5m2"})
_COMFY_QUANT, _COMFY_METADATA = ".comfy_quant", "_quantization_metadata"
_SCALES = (".weight_scale", ".scale_weight")
_STATE = ".quant_state.bitsandbytes__"
# Companions of a module, and of its weight, which are no weights themselves.
_OF_MODULE = (*_SCALES, ".input_scale", ".scale_input", _COMFY_QUANT, ".SCB", ".weight_format")
_OF_WEIGHT = (".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map")
_ASK = "Give the model in bf16 or fp16."

Rows = tuple[int, int] | None


class Packed(Protocol):
    """A weight that is made of several tensors."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the weight."""

    def read(self, store: TensorStore, rows: Rows) -> Tensor:
        """The weight, or some rows of it, in float32."""


def unpacked(store: TensorStore) -> TensorStore:
    """The store with its weights as they are meant: itself if nothing is quantised.

    Raises InputError for a format that is not read, and DamagedFile if companions do not fit their weight.
    """
    for name in store.tensors:
        for ending, title in _FOREIGN:
            if name.endswith(ending):
                raise InputError(f"{store.path}: quantised as {title}, which cannot be read ({name}). {_ASK}")
    # ComfyUI says it in a tensor beside each weight, or of all of them in the header.
    formats = {name: str(_json(store, name).get("format")) for name in store.tensors if name.endswith(_COMFY_QUANT)}
    try:
        layers = json.loads(store.metadata.get(_COMFY_METADATA, "{}")).get("layers", {})
        formats |= {name: str(layer["format"]) for name, layer in layers.items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DamagedFile(
            f"{store.path}: the header's {_COMFY_METADATA} is broken ({error}). Download it again."
        ) from error
    for name, kind in formats.items():
        if kind not in _COMFY_FORMATS:
            raise InputError(f"{store.path}: quantised as {kind}, which cannot be read ({name}). {_ASK}")
    packed = dict(_packed(store))
    for name, info in store.tensors.items():
        if name.endswith(".weight") and len(info.shape) > 1 and info.dtype not in FLOATS and name not in packed:
            raise InputError(
                f"{store.path}: {name} is stored as {info.dtype}, and nothing beside it tells what weight that "
                f"stands for. {_ASK}"
            )
    return UnpackedStore(store, packed) if packed else store


class DecodedStore(TensorStore):
    """A store whose tensors are made when they are read, so that their bytes are not those of the file."""

    def _bytes(self, name: str, start: int, nbytes: int) -> Tensor:
        import torch

        flat = self.read(name).contiguous().reshape(-1).view(torch.uint8)
        return flat[start : start + nbytes].clone()


class UnpackedStore(DecodedStore):
    """A store whose packed weights read as float32, and which hides their companions."""

    def __init__(self, inner: TensorStore, packed: Mapping[str, Packed]) -> None:
        companions = {
            name
            for name in inner.tensors
            if f".{name}".endswith((".scaled_fp8", *_OF_WEIGHT))
            or _STATE in name
            or any(name.endswith(end) and f"{name.removesuffix(end)}.weight" in inner.tensors for end in _OF_MODULE)
        }
        infos = {name: info for name, info in inner.tensors.items() if name not in companions}
        infos |= {name: tensor_info("F32", weight.shape) for name, weight in packed.items()}
        super().__init__(inner.path, infos, inner.metadata, inner.files, inner.headers)
        self._inner, self._packed = inner, packed

    def read(self, name: str, rows: Rows = None) -> Tensor:
        """The weight `name`, or its rows `[start, stop)` alone."""
        packed = self._packed.get(name)
        return packed.read(self._inner, rows) if packed else self._inner.read(name, rows)

    def sample(self, pieces: int = 64, size: int = 4096) -> Iterator[bytes]:
        """As the store with the packed weights."""
        return self._inner.sample(pieces, size)

    def close(self) -> None:
        """Close the files."""
        self._inner.close()
        super().close()


def _json(store: TensorStore, name: str) -> dict[str, Any]:
    try:
        facts = json.loads(bytes(store.read(name).tolist()))
        if not isinstance(facts, dict):
            raise TypeError("it is no object")
        return facts
    except (ValueError, TypeError, RecursionError) as error:
        raise DamagedFile(f"{store.path}: {name} should be JSON ({error}). Download or copy the file again.") from error


def _packed(store: TensorStore) -> Iterator[tuple[str, Packed]]:
    states = {name.partition(_STATE)[0]: name for name in store.tensors if _STATE in name}
    for name, info in store.tensors.items():
        module = name.removesuffix(".weight")
        if name in states:
            yield name, _four_bits(store, name, states[name])
        elif info.dtype in _FLOAT8:
            for scale in (f"{module}{ending}" for ending in _SCALES):
                if scale in store.tensors:
                    yield name, _scaled(store, name, scale, 1.0)
                    break
        elif info.dtype == "I8" and f"{module}.SCB" in store.tensors:
            yield name, _scaled(store, name, f"{module}.SCB", 1 / 127)


@dataclass(frozen=True, slots=True)
class _Scaled:
    """weight = numbers · scale · factor, with one scale or one for each row."""

    key: str
    scale: str
    factor: float
    shape: tuple[int, ...]

    def read(self, store: TensorStore, rows: Rows) -> Tensor:
        scale = store.read(self.scale).float().reshape(-1) * self.factor
        if rows and scale.numel() > 1:
            scale = scale[rows[0] : rows[1]]
        return store.read(self.key, rows).float() * scale.reshape(-1, *[1] * (len(self.shape) - 1))


def _scaled(store: TensorStore, key: str, scale: str, factor: float) -> Packed:
    shape, of_scale = store.tensors[key].shape, store.tensors[scale].shape
    if math.prod(of_scale) != 1 and (math.prod(of_scale) != shape[0] or of_scale[0] != shape[0]):
        raise InputError(
            f"{store.path}: {scale} is {list(of_scale)} for a weight of {list(shape)}; only one scale, or one per "
            f"row, can be read. {_ASK}"
        )
    return _Scaled(key, scale, factor, shape)


@dataclass(frozen=True, slots=True)
class _FourBits:
    """Two numbers per byte, the high half first, looked up in a table and scaled per block.

    The scales may be 8-bit numbers themselves, looked up and scaled per block of blocks, around an offset.
    """

    key: str
    shape: tuple[int, ...]
    block: int
    nested_block: int  # 0 if the scales are floats
    offset: float

    def read(self, store: TensorStore, rows: Rows) -> Tensor:
        import torch

        width, total = math.prod(self.shape[1:]), math.prod(self.shape)
        start, stop = (rows[0] * width, rows[1] * width) if rows else (0, total)
        # whole blocks, because each has one scale
        first, last = start // self.block, -(-stop // self.block)
        low, high = first * self.block, min(last * self.block, total)
        pairs = store.read(self.key, (low // 2, -(-high // 2))).reshape(-1)
        codes = torch.stack([pairs >> 4, pairs & 15], 1).reshape(-1)[: high - low]
        weight = store.read(f"{self.key}.quant_map").float()[codes.int()]
        scales = store.read(f"{self.key}.absmax")[first:last]
        if self.nested_block:
            numbers = store.read(f"{self.key}.nested_quant_map").float()[scales.int()]
            blocks = torch.arange(first, last) // self.nested_block
            scales = numbers * store.read(f"{self.key}.nested_absmax").float()[blocks] + self.offset
        weight *= scales.float().repeat_interleave(self.block)[: high - low]
        return weight[start - low : stop - low].reshape(-1, *self.shape[1:])


def _four_bits(store: TensorStore, key: str, state: str) -> Packed:
    facts = _json(store, state)
    try:
        shape = tuple(int(side) for side in facts["shape"])
        nested = "nested_blocksize" in facts
        weight = _FourBits(
            key,
            shape,
            int(facts["blocksize"]),
            int(facts["nested_blocksize"]) if nested else 0,
            float(facts["nested_offset"]) if nested else 0.0,
        )
    except (KeyError, TypeError, ValueError) as error:
        raise DamagedFile(f"{store.path}: {state} is broken ({error}). Download or copy the file again.") from error
    numbers, blocks = math.prod(shape), -(-math.prod(shape) // max(weight.block, 1))
    counts = {"": -(-numbers // 2), ".absmax": blocks, ".quant_map": 16}
    if nested:
        counts |= {".nested_absmax": -(-blocks // max(weight.nested_block, 1)), ".nested_quant_map": 256}
    for ending, count in counts.items():
        info = store.tensors.get(key + ending)
        stored = math.prod(info.shape) if info else 0
        if stored != count or weight.block < 1:
            raise DamagedFile(
                f"{store.path}: {key}{ending} should have {count} numbers for a weight of {list(shape)}, it has "
                f"{stored}. Download or copy the file again."
            )
    return weight
