"""Devices and worker threads for the engine."""

from __future__ import annotations

import contextlib
import logging
import math
import os
import threading
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from threadpoolctl import threadpool_limits

from lorashrink.engine.accelerators import start
from lorashrink.errors import UsageError

log = logging.getLogger(__name__)

# A core shrinks about 200 MB of adapters per second, and a GPU takes a second or two to start.
_SMALL_BYTES = 1 << 28  # per core

# From here on it pays to start several GPUs.
_LARGE_BYTES = 1 << 33


def pick_device(device: str, files: Iterable[str | Path] | None = None) -> str:
    """The torch device for "auto" or a given name, started and tested.

    files: what is to be computed with, where the cores may be done with it before a GPU has started: then "auto" is the
    CPU, and with many bytes "cuda" stays "cuda", which is all GPUs of one kind; otherwise it becomes one of them.
    Raises UsageError if this machine does not have the device, or it does not work.
    """
    size = 0.0 if files is None else sum(map(_size, files))
    if device == "auto":
        if (files is not None and size < _SMALL_BYTES * usable_cores()) or not torch.cuda.is_available():
            return "cpu"
        device = _gpus_for(size)
        try:
            start(torch.device(device))
        except UsageError as error:
            log.warning("%s The CPU computes.", error)
            return "cpu"
        return device
    kind, _, number = device.partition(":")
    present = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if kind not in present or (number and not number.isdigit()):
        raise UsageError(f"device: '{device}' is not one of auto, {', '.join(present)}, cuda:N.")
    if not present[kind] or (kind == "cuda" and number and int(number) >= torch.cuda.device_count()):
        raise UsageError(f"device: this machine has no usable {device}. Use --device auto.")
    if device == "cuda":
        device = _gpus_for(size)
    if kind != "cpu":
        start(torch.device(device))
    return device


def _gpus_for(size: float) -> str:
    return "cuda" if size >= _LARGE_BYTES else f"cuda:{torch.cuda.current_device()}"


def _size(path: str | Path) -> float:
    """Bytes of a file, or of the files in a folder; infinity for what is neither, such as a sum of adapters."""
    path = Path(path)
    if path.is_dir():
        return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    return path.stat().st_size if path.is_file() else math.inf


def core_device(device: str | torch.device) -> torch.device:
    """Where the engine computes: the device itself, or the CPU if it has no float64 (MPS)."""
    device = torch.device(device)
    return torch.device("cpu") if device.type == "mps" else device


@contextlib.contextmanager
def worker_pool(jobs: int | None = None) -> Iterator[ThreadPoolExecutor]:
    """Threads that each do whole layers, while torch and BLAS stay on one thread apiece."""
    if jobs is not None and jobs < 1:
        raise UsageError(f"jobs: {jobs} is not a whole number of at least 1.")
    with (
        _single_threaded.use(),
        ThreadPoolExecutor(
            jobs or usable_cores(), "lorashrink", initializer=torch.set_num_threads, initargs=(1,)
        ) as pool,
    ):
        try:
            yield pool
        finally:
            pool.shutdown(cancel_futures=True)


def usable_cores() -> int:
    """How many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class _SingleThreaded:
    """Torch and numpy's BLAS on one thread while anyone uses this, and afterwards on as many as before.

    Torch keeps a number for each thread and one for the process, which new threads begin with. A BLAS has one for the
    process. A second user must not take the first one's 1 for the number to restore, so that all users share the
    numbers from before the first.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._users: list[int] = []  # identifiers of their threads
        self._threads_before = 0
        self._blas: threadpool_limits | None = None

    @contextlib.contextmanager
    def use(self) -> Iterator[None]:
        user = threading.get_ident()
        with self._lock:
            if not self._users:
                self._threads_before = torch.get_num_threads()
                self._blas = threadpool_limits(1, user_api="blas")
            self._users.append(user)
            torch.set_num_threads(1)
        try:
            yield
        finally:
            with self._lock:
                self._users.remove(user)
                if user not in self._users:
                    torch.set_num_threads(self._threads_before)
                if not self._users and self._blas:
                    self._blas.restore_original_limits()


_single_threaded = _SingleThreaded()
