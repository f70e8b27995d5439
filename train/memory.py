"""How much of a GPU's memory a training step takes: what lies there all the time is added up, activations are counted.

Everything works with tensors on the meta device, which have shapes and no numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.overrides import TorchFunctionMode

from lorashrink.train.data.buckets import Size
from lorashrink.train.model.loading import Model, set_checkpointing, vae_stride, weight_dtype
from lorashrink.train.model.network import Network
from lorashrink.train.options import Options
from lorashrink.train.run.optimizers import optimizer_name
from lorashrink.train.text import CHUNK, encode

GIB = 2**30

# Numbers per trained parameter that an optimizer keeps from step to step.
_STATES = {
    "adafactor": 1,  # at most: rows and columns of a matrix, and for 3×3 kernels two thirds of a number
    "adagrad": 1,
    "adam": 2,
    "adamw": 2,
    "adamwschedulefree": 2,
    "dadaptadagrad": 3,
    "dadaptadam": 3,
    "dadaptadampreprint": 3,
    "dadaptadan": 5,
    "dadaptadanip": 5,
    "dadaptation": 3,
    "dadaptlion": 2,
    "dadaptsgd": 3,
    "lion": 1,
    "nadam": 2,
    "pagedadamw": 2,
    "pagedlion": 1,
    "prodigy": 4,
    "radam": 2,
    "radamschedulefree": 2,
    "rmsprop": 1,
    "sgd": 0,
    "sgdnesterov": 1,
    "sgdschedulefree": 1,
}


def optimizer_bytes(options: Options) -> int | None:
    """Bytes per trained float32 parameter that the optimizer keeps; None for one that is not known here."""
    name = optimizer_name(options).lower().rpartition(".")[2]
    numbers = _STATES.get(name.removesuffix("8bit").removesuffix("32bit"))
    if numbers == 0 and any(each.startswith("momentum=") for each in options.optimizer_args):
        numbers = 1
    return None if numbers is None else numbers * (1 if name.endswith("8bit") else 4)


def tensor_bytes(tensors: Iterable[Tensor]) -> int:
    """What the tensors take together."""
    return sum(each.numel() * each.element_size() for each in tensors)


@dataclass(frozen=True, slots=True)
class Activations:
    """What is kept from the forward to the backward pass of one batch, in bytes."""

    full: int
    outside: int  # with checkpointing: what enters the blocks, and what lies outside them
    block: int  # with checkpointing: the rest of the largest block, which is computed again

    @property
    def checkpointed(self) -> int:
        """With checkpointing, when the largest block is computed again."""
        return self.outside + self.block


def count_activations(model: Model, network: Network, options: Options, batch: int, size: Size) -> Activations:
    """Run the text encoders and the UNet once, and count the storages that autograd keeps of it.

    On the meta device attention counts as a fused kernel (its inputs, output and one number per query), and arithmetic
    in half precision as under CUDA's autocast, whose normalisations are float32. LyCORIS counts with its plain torch
    arithmetic (its Triton kernels keep float32 where autocast keeps half precision). Not counted are the loss, dropout,
    and what exists only while one operation runs: the peak of a step is up to a twentieth higher.

    The model is left set up for checkpointing, and the network without dropout.

    Args:
        model: on any device; the network is applied to it.
        batch: pictures.
        size: width and height of the pictures in pixels.
    """
    network.to(model.unet.device)
    lasting = {_storage(each)._cdata for each in _all_tensors(model, network)}
    everything, outside = _Kept(lasting), _Kept(lasting)
    blocks: list[_Kept] = []

    def block(run: Callable[..., Any], *inputs: Any) -> Any:
        for each in inputs:
            if isinstance(each, Tensor):
                outside.add(each)
        inside = _Kept(lasting)
        with _keeping(inside, everything):
            output = run(*inputs)
        blocks.append(inside)
        return output

    set_checkpointing(model, replace(options, gradient_checkpointing=True))
    for module in _modules(model):
        if hasattr(module, "_gradient_checkpointing_func"):
            module._gradient_checkpointing_func = block  # type: ignore[assignment]
    network.train(False)
    with _keeping(outside, everything), _precision(model, options):
        _forward(model, network, options, batch, size)
    return Activations(
        full=everything.size,
        outside=outside.size,
        block=max(each.size_without(outside) for each in blocks),
    )


class _Kept:
    """Storages that autograd keeps, each once. They are held so that none takes the place of another."""

    def __init__(self, lasting: set[int]) -> None:
        self._lasting = lasting
        self._storages: dict[int, torch.UntypedStorage] = {}

    def add(self, tensor: Tensor) -> None:
        storage = _storage(tensor)
        if storage._cdata not in self._lasting:
            self._storages[storage._cdata] = storage

    @property
    def size(self) -> int:
        """In bytes."""
        return sum(each.nbytes() for each in self._storages.values())

    def size_without(self, other: _Kept) -> int:
        """In bytes, of what is not in the other."""
        return sum(each.nbytes() for key, each in self._storages.items() if key not in other._storages)


def _storage(tensor: Tensor) -> torch.UntypedStorage:
    return tensor.untyped_storage()


def _keeping(*kept: _Kept) -> AbstractContextManager[Any]:
    """Add to these what autograd saves; of nested contexts, the inner one alone does."""

    def pack(tensor: Tensor) -> Tensor:
        for each in kept:
            each.add(tensor)
        return tensor

    return saved_tensors_hooks(pack, lambda tensor: tensor)


def _modules(model: Model) -> Iterator[nn.Module]:
    for part in (model.unet, *model.encoders):
        yield from part.modules()


def _all_tensors(model: Model, network: Network) -> Iterator[Tensor]:
    for part in (model.unet, *model.encoders, network.module):
        yield from part.parameters()
        yield from part.buffers()


def _forward(model: Model, network: Network, options: Options, batch: int, size: Size) -> None:
    """What a training step computes before the loss, from zeros."""
    unet, dtype = model.unet, weight_dtype(options)
    width, height = (side // vae_stride(model.vae) for side in size)
    chunks = (options.max_token_length or CHUNK) // CHUNK
    tokens = torch.zeros(batch, chunks, CHUNK + 2, dtype=torch.long, device=unet.device)
    with torch.set_grad_enabled(_trains_text(network)):
        text = encode(model.encoders, tokens, tokens)
    unet(
        torch.zeros(batch, unet.config.in_channels, height, width, dtype=dtype, device=unet.device),
        torch.zeros(batch, dtype=torch.long, device=unet.device),
        text.context.to(dtype),
        added_cond_kwargs={
            "text_embeds": text.pooled.to(dtype),
            "time_ids": torch.zeros(batch, 6, device=unet.device),
        },
    )


def _precision(model: Model, options: Options) -> AbstractContextManager[Any]:
    """The arithmetic of a training step; on the CPU that is the CPU's own."""
    kind, dtype = model.unet.device.type, weight_dtype(options)
    if kind == "meta":
        return _AsOnCuda(dtype)
    return torch.autocast(kind, dtype, enabled=dtype != torch.float32)


def _trains_text(network: Network) -> bool:
    """Whether gradients must flow through the text encoders."""
    return any(each.requires_grad for layer in network.module.text_encoder_loras for each in layer.parameters())


# --- arithmetic as on a GPU ---------------------------------------------------------------------

# Of the operations that autocast runs in half precision or in float32 on CUDA (torch's documentation of torch.amp,
# "CUDA Op-Specific Behavior"), those that SDXL and LyCORIS use.
_IN_HALF = frozenset(
    {"__matmul__", "addmm", "baddbmm", "bmm", "conv2d", "einsum", "linear", "matmul", "mm"}
    | {"scaled_dot_product_attention"}
)
_IN_FLOAT = frozenset({"__pow__", "exp", "group_norm", "layer_norm", "norm", "pow", "rsqrt", "softmax", "sum"})


class _AsOnCuda(TorchFunctionMode):
    """For the meta device, which has neither autocast nor an attention that does without the matrix of all pairs."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self._dtype = dtype

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        name = func.__name__
        if name in _IN_HALF or (name in _IN_FLOAT and self._dtype != torch.float32):
            dtype = self._dtype if name in _IN_HALF else torch.float32
            args = tuple(_cast(each, dtype) for each in args)
            kwargs = {key: _cast(each, dtype) for key, each in (kwargs or {}).items()}
        if name == "scaled_dot_product_attention":
            return torch.ops.aten._scaled_dot_product_flash_attention(*args[:3])[0]
        return func(*args, **(kwargs or {}))


def _cast(value: Any, dtype: torch.dtype) -> Any:
    return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value
