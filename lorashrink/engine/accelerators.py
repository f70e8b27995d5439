"""GPUs: started before threads share them, tested before they are trusted, and left where their memory ends.

A few threads per GPU do all of its work, each with a stream of its own, so that one copies while another computes. GPUs
of the same kind share the work of the device "cuda"; "cuda:1" is one of them.
"""

from __future__ import annotations

import itertools
import logging
import re
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

from lorashrink.errors import UsageError

log = logging.getLogger(__name__)

T = TypeVar("T")
R = TypeVar("R")

_WORKERS = 2  # threads per GPU

# cuBLAS and cuSOLVER have their own words for it; where there is no room for what they begin with, they do not begin.
_NO_MEMORY = re.compile(
    r"out of memory|ALLOC_FAILED|(?:CUBLAS|CUSOLVER)_STATUS_NOT_INITIALIZED|not enough memory", re.IGNORECASE
)

_lock = threading.RLock()
_tested: set[torch.device] = set()
_workers: dict[torch.device, ThreadPoolExecutor] = {}
_worker = threading.local()


def computed(task: Callable[[Sequence[T], torch.device], list[R]], items: Sequence[T], device: torch.device) -> list[R]:
    """task(items, device) by a thread of the device; in halves, and at last on the CPU, where memory runs out.

    On the CPU the calling thread does it. A task must not call this again. Raises UsageError if the GPU cannot be used.
    """
    if device.type == "cpu":
        return task(items, device)
    try:
        return start(device).submit(lambda: task(items, _worker.device)).result()
    except RuntimeError as error:
        if not out_of_memory(error):
            raise
    # The error is gone, and with it the tensors of its frames.
    if device.type == "cuda":
        torch.cuda.empty_cache()
    if len(items) < 2:
        log.info("%s has too little memory for one layer, which the CPU computes", device)
        return task(items, torch.device("cpu"))
    half = len(items) // 2
    return [*computed(task, items[:half], device), *computed(task, items[half:], device)]


def out_of_memory(error: RuntimeError) -> bool:
    """Whether a GPU, or one of its libraries, had too little memory."""
    return isinstance(error, torch.cuda.OutOfMemoryError) or bool(_NO_MEMORY.search(str(error)))


def start(device: torch.device) -> ThreadPoolExecutor:
    """The threads of a device that is no CPU; its GPUs are started and tested once, by one thread.

    torch loads libraries at its first call of them, which fails if several threads make that call at once. Raises
    UsageError if a GPU computes nothing, or something wrong.
    """
    with _lock:
        if device not in _workers:
            gpus = _gpus(device)
            for gpu in gpus:
                if gpu not in _tested:
                    _test(gpu)
                    _tested.add(gpu)
            turns = itertools.cycle(gpus)
            _workers[device] = ThreadPoolExecutor(
                len(gpus) * (_WORKERS if device.type == "cuda" else 1), "lorashrink-gpu", _begin, (turns,)
            )
        return _workers[device]


def _begin(gpus: Iterator[torch.device]) -> None:
    """Set up a thread of a device."""
    with _lock:
        _worker.device = next(gpus)
    if _worker.device.type == "cuda":
        torch.cuda.set_device(_worker.device)
        torch.cuda.set_stream(torch.cuda.Stream(_worker.device))  # type: ignore[no-untyped-call]


def _gpus(device: torch.device) -> list[torch.device]:
    """All GPUs like the current one for "cuda", so that it does not matter which of them computes a layer."""
    if str(device) != "cuda":
        return [device]
    current = torch.cuda.current_device()
    indices = [current, *(index for index in range(torch.cuda.device_count()) if index != current)]
    kinds = [(gpu.name, gpu.major, gpu.minor) for gpu in map(torch.cuda.get_device_properties, indices)]
    return [torch.device("cuda", index) for index, kind in zip(indices, kinds, strict=True) if kind == kinds[0]]


def _test(gpu: torch.device) -> None:
    """Call what the engine calls, which loads all libraries, and compare a result with the CPU's."""
    dtype = torch.float32 if gpu.type == "mps" else torch.float64  # which MPS lacks
    wide = torch.randn(2, 33, 40, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype)
    try:
        gram = wide.to(gpu) @ wide.to(gpu).mT
        results = [gram]
        if gpu.type != "mps":
            root = torch.linalg.cholesky_ex(gram)[0]
            half = torch.linalg.solve_triangular(root, gram, upper=False)
            values, vectors = torch.linalg.eigh(gram)
            torch.linalg.eigvalsh(gram)
            q, r = torch.linalg.qr(gram)
            results += [root @ half, vectors * values[:, None, :] @ vectors.mT, q @ r]
        expected = wide @ wide.mT
        equal = all(torch.allclose(result.cpu(), expected, rtol=1e-4, atol=1e-4) for result in results)
        reason = "" if equal else "it computes wrong numbers"
    except (RuntimeError, NotImplementedError, AssertionError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    if reason:
        raise UsageError(
            f"device: {gpu} cannot be used with torch {torch.__version__} ({reason}). Use --device cpu, or install a "
            "torch that is made for this GPU and its driver."
        )
