"""Files held in memory as a whole, as long as there is room for them."""

from __future__ import annotations

import contextlib
import mmap
import os
import threading
from pathlib import Path

# What a file, and all files together, may take. In a larger file the reads of its tensors are long, and what was just
# read is still in the processor's cache, so that a block of the whole file costs more than it saves.
_LARGEST = 64 << 20
_TOGETHER = 512 << 20

# Of the memory that is free when a file asks for its part.
_OF_FREE = 0.25


class Slabs:
    """Blocks of bytes, each as large as a file, whose sum is bounded. Safe to use from many threads.

    A file that gets no block is read or written tensor by tensor, which gives the same bytes.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._taken = 0

    def take(self, nbytes: int) -> mmap.mmap | None:
        """A block of so many bytes, None if that is too large or there is no room. Give it back with `give`."""
        with self._lock:
            if not 0 < nbytes <= min(_LARGEST, _TOGETHER - self._taken, _OF_FREE * free_memory()):
                return None
            self._taken += nbytes
        try:
            block = mmap.mmap(-1, nbytes)
        except (OSError, ValueError):
            self._return(nbytes)
            return None
        if hasattr(mmap, "MADV_HUGEPAGE"):  # a page of 4 KiB costs more than reading it
            with contextlib.suppress(OSError):
                block.madvise(mmap.MADV_HUGEPAGE)
        return block

    def give(self, block: mmap.mmap) -> None:
        """Give a block back; it is freed with the last tensor that looks at it."""
        self._return(len(block))

    def _return(self, nbytes: int) -> None:
        with self._lock:
            self._taken -= nbytes


SLABS = Slabs()  # of this process


def free_memory() -> float:
    """Bytes that new processes could get; inf where the system does not say."""
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, AttributeError, IndexError):
        return float("inf")
