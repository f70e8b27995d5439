"""What this machine can do at best at the kinds of work that shrinking consists of, measured here and now."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from lorashrink.engine.devices import worker_pool
from lorashrink.engine.products import square

_CHUNK = 1 << 24  # bytes read or written at a time
_WRITTEN = 1 << 28  # bytes written to measure the disk
_SECONDS = 0.3  # that each product is repeated for
_COLUMNS = 2048  # of the factors that are multiplied: small enough for the cache
_ROWS = 1280  # the most common width in SDXL


@dataclass(frozen=True, slots=True)
class Rates:
    """Best rates of this machine on all cores."""

    gram: float  # flop/s, one half of a float64 [r, n]·[n, r]
    core: float  # flop/s, float64 [r, r]·[r, r]
    form: float  # flop/s, float32 [n, r]·[r, k]
    eigh: float  # r×r float64 eigenproblems per second
    copy: float  # B/s copied in memory
    read: float  # B/s read from files in the page cache
    write: float  # B/s written and flushed to the disk


def cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def measure(rank: int, kept: int, file: Path) -> Rates:
    """Measure all of them, for problems of this rank of which `kept` dimensions are formed; reads `file`."""
    wide, tall, maps = torch.randn(rank, _COLUMNS).double(), torch.randn(_ROWS, rank), torch.randn(rank, kept)
    core = square(wide)
    source = torch.ones(_CHUNK, dtype=torch.uint8)
    return Rates(
        gram=rank * rank * _COLUMNS * calls_per_second(lambda: square(wide)),
        core=2 * rank**3 * calls_per_second(lambda: core @ core),
        form=2 * rank * kept * _ROWS * calls_per_second(lambda: tall @ maps),
        eigh=calls_per_second(lambda: torch.linalg.eigh(core)),
        copy=_CHUNK * calls_per_second(source.clone),
        read=_read_rate(file),
        write=_write_rate(file.parent / "rate.tmp"),
    )


def calls_per_second(function: Callable[[], object]) -> float:
    """Calls of a function per second when every core calls it, with one thread per call."""
    with worker_pool() as pool:
        return sum(pool.map(partial(_repeat, function), range(cores())))


def _repeat(function: Callable[[], object], _: int) -> float:
    function()
    calls, start = 0, time.perf_counter()
    while time.perf_counter() - start < _SECONDS:
        function()
        calls += 1
    return calls / (time.perf_counter() - start)


def _read_rate(path: Path) -> float:
    """The second of two readings, so that the file is in memory."""
    buffer = bytearray(_CHUNK)
    seconds = 0.0
    for _ in range(2):
        start = time.perf_counter()
        with open(path, "rb", buffering=0) as handle:
            while handle.readinto(buffer):
                pass
        seconds = time.perf_counter() - start
    return path.stat().st_size / seconds


def _write_rate(path: Path) -> float:
    """The best of some runs: a disk may still be busy with what was written before."""
    chunk = os.urandom(_CHUNK)
    try:
        return _WRITTEN / min(_write_seconds(path, chunk) for _ in range(4))
    finally:
        path.unlink(missing_ok=True)


def _write_seconds(path: Path, chunk: bytes) -> float:
    os.sync()
    start = time.perf_counter()
    with open(path, "wb", buffering=0) as handle:
        for _ in range(_WRITTEN // _CHUNK):
            handle.write(chunk)
        os.fsync(handle.fileno())
    return time.perf_counter() - start
