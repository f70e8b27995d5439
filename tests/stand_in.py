"""A CPU that stands in for a GPU: right numbers, and the errors of a GPU where tensors of two devices meet.

In the threads where `Gpu` is entered there is a device "cuda:0". Its tensors are the CPU's with a mark. Its products of
float32 are in TF32, which a program around the engine may have allowed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from lorashrink.engine import accelerators

DEVICE = torch.device("cuda", 0)

_INDEXED = (Tensor.__getitem__, Tensor.__setitem__)
_MOVED = (Tensor.to, Tensor.cpu, Tensor.cuda)
_PRODUCTS = (Tensor.matmul, Tensor.__matmul__, torch.matmul, torch.bmm, torch.mm)


class Gpu(TorchFunctionMode):
    """Marks tensors that are made on the GPU or from its tensors, and refuses to mix them with others."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if getattr(func, "__self__", None) is Tensor.device:
            return DEVICE if on_gpu(args[0]) else torch.device("cpu")
        if func in _MOVED:
            return self._moved(func, args, kwargs)
        target = kwargs.pop("device", None)
        kwargs.pop("pin_memory", None)
        inputs = list(_tensors((args, kwargs)))
        gpu = any(map(on_gpu, inputs)) or (target is not None and torch.device(target).type == "cuda")
        if func is Tensor.copy_:  # from one device to another
            return func(*args, **kwargs)
        _check(func, args, inputs)
        if gpu and func in _PRODUCTS:
            args = [_as_tf32(factor) if isinstance(factor, Tensor) else factor for factor in args]
        return _marked(func(*args, **kwargs), gpu)

    def _moved(self, func: Callable[..., Tensor], args: Any, kwargs: dict[str, Any]) -> Tensor:
        tensor, *options = args
        named = [kwargs.pop("device", None), *(option for option in options if _is_device(option))]
        like = [option for option in options if isinstance(option, Tensor)]
        rest = [option for option in options if not _is_device(option) and not isinstance(option, Tensor)]
        kinds = [option.dtype for option in like]
        gpu = on_gpu(tensor)
        for device in named:
            gpu = torch.device(device).type == "cuda" if device is not None else gpu
        gpu = any(map(on_gpu, like)) if like else gpu
        gpu = False if func is Tensor.cpu else gpu
        kwargs.pop("non_blocking", None)
        changed = tensor.to(*rest, *kinds, **kwargs) if rest or kinds or kwargs else tensor
        if gpu == on_gpu(tensor):
            return _marked(changed, gpu)
        return _marked(changed.clone(), gpu)


def on_gpu(tensor: Tensor) -> bool:
    """Whether this is a tensor of the GPU."""
    return "_on_gpu" in vars(tensor)


@contextmanager
def installed() -> Iterator[None]:
    """The engine finds one GPU, "cuda", whose threads have entered `Gpu`."""
    workers: dict[torch.device, ThreadPoolExecutor] = {}
    begin, test = accelerators._begin, accelerators._test

    def begin_on_gpu(gpus: Iterator[torch.device]) -> None:
        begin(gpus)
        Gpu().__enter__()

    def test_gpu(device: torch.device) -> None:
        with Gpu():
            test(device)

    class Stream:
        def synchronize(self) -> None:
            pass

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(accelerators, "_begin", begin_on_gpu)
        patch.setattr(accelerators, "_test", test_gpu)
        patch.setattr(accelerators, "_gpus", lambda device: [DEVICE])
        patch.setattr(accelerators, "_workers", workers)
        patch.setattr(accelerators, "_tested", set())
        for name, value in {
            "is_available": True,
            "current_device": 0,
            "device_count": 1,
            "empty_cache": None,
            "set_device": None,
            "set_stream": None,
            "Stream": None,
            "current_stream": Stream(),
        }.items():
            patch.setattr(torch.cuda, name, lambda *_, value=value: value)
        yield
        for pool in workers.values():
            pool.shutdown()


def _as_tf32(factor: Tensor) -> Tensor:
    """float32 with the 10 bits of mantissa that products on a GPU see where TF32 is allowed."""
    if factor.dtype != torch.float32:
        return factor
    return ((factor.contiguous().view(torch.int32) + (1 << 12)) & -(1 << 13)).view(torch.float32)


def _is_device(option: object) -> bool:
    return isinstance(option, (str, torch.device))


def _tensors(value: object) -> Iterable[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        yield from _tensors(tuple(value.values()))
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _tensors(item)


def _marked(value: Any, gpu: bool) -> Any:
    if gpu:
        for tensor in _tensors(value):
            tensor._on_gpu = True  # type: ignore[attr-defined]
    return value


def _check(func: Any, args: Any, inputs: list[Tensor]) -> None:
    if func in _INDEXED and on_gpu(args[0]):  # indices may be on the CPU
        inputs = [args[0], *_tensors(args[2:])]
    kinds = {on_gpu(tensor) for tensor in inputs if tensor.dim() or on_gpu(tensor)}
    if len(kinds) > 1:
        raise RuntimeError(f"{func}: expected all tensors to be on the same device, but found cuda:0 and cpu")
