"""Devices and worker threads for the engine."""

from __future__ import annotations

import contextlib
import os
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


def _cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


@contextlib.contextmanager
def worker_pool(jobs: int | None = None) -> Iterator[ThreadPoolExecutor]:
    """Threads that each do whole layers, while torch and its BLAS stay on one thread apiece."""
    if jobs is not None and jobs < 1:
        raise UsageError(f"jobs: {jobs} is not a whole number of at least 1.")
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    pool = ThreadPoolExecutor(jobs or _cores(), "lorashrink", initializer=torch.set_num_threads, initargs=(1,))
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(before)


def core_device(device: str | torch.device) -> torch.device:
    """Where the r×r part runs: the device itself, or the CPU if it has no float64 (MPS)."""
    device = torch.device(device)
    return torch.device("cpu") if device.type == "mps" else device
