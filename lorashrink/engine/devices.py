"""Devices and worker threads for the engine."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import torch

from lorashrink.errors import UsageError


def pick_device(device: str) -> str:
    """The torch device for "auto" or a given name. Raises UsageError if this machine does not have it."""
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    kind, _, number = device.partition(":")
    present = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if kind not in present or (number and not number.isdigit()):
        raise UsageError(f"device: '{device}' is not one of auto, {', '.join(present)}, cuda:N.")
    if not present[kind] or (kind == "cuda" and number and int(number) >= torch.cuda.device_count()):
        raise UsageError(f"device: this machine has no usable {device}. Use --device auto.")
    return device


def core_device(device: str | torch.device) -> torch.device:
    """Where the r×r part runs: the device itself, or the CPU if it has no float64 (MPS)."""
    device = torch.device(device)
    return torch.device("cpu") if device.type == "mps" else device


@contextlib.contextmanager
def worker_pool(jobs: int | None = None) -> Iterator[ThreadPoolExecutor]:
    """Threads that each do whole layers, while torch and its BLAS stay on one thread apiece."""
    if jobs is not None and jobs < 1:
        raise UsageError(f"jobs: {jobs} is not a whole number of at least 1.")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with (
        _single_threaded.use(),
        ThreadPoolExecutor(jobs or cores, "lorashrink", initializer=torch.set_num_threads, initargs=(1,)) as pool,
    ):
        try:
            yield pool
        finally:
            pool.shutdown(cancel_futures=True)


class _SingleThreaded:
    """Torch on one thread while anyone uses this, and afterwards on as many as before.

    Torch keeps a number for each thread and one for the process, which new threads begin with. A second user must
    not take the first one's 1 for the number to restore, so that all users share the number found by the first.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._users: list[int] = []  # identifiers of their threads
        self._threads_before = 0

    @contextlib.contextmanager
    def use(self) -> Iterator[None]:
        user = threading.get_ident()
        with self._lock:
            if not self._users:
                self._threads_before = torch.get_num_threads()
            self._users.append(user)
            torch.set_num_threads(1)
        try:
            yield
        finally:
            with self._lock:
                self._users.remove(user)
                if user not in self._users:
                    torch.set_num_threads(self._threads_before)


_single_threaded = _SingleThreaded()
