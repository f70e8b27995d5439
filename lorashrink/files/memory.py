"""Files held in memory as a whole, as long as there is room for them."""

from __future__ import annotations

import contextlib
import mmap
import os
import threading
from pathlib import Path

# What files may take together in any case, and as a multiple of the largest one.
_ALWAYS = 900 << 20
_OF_LARGEST = 1.5

# Of the memory that is free when a file asks for its part.
_OF_FREE = 0.25


class Slabs:
    """Blocks of bytes, each as large as a file, whose sum is bounded. Safe to use from many threads.

    A file that gets no block is read or written tensor by tensor, which gives the same bytes.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._taken = 0

    def take(self, nbytes: int, largest: int | None = None) -> mmap.mmap | None:
        """A block of so many bytes, None if there is no room. Give it back with `give`.

        largest: size of the largest file that belongs to this one, which decides how much there is.
        """
        bound = max(_ALWAYS, _OF_LARGEST * (largest or nbytes))
        with self._lock:
            if not nbytes or self._taken + nbytes > bound or nbytes > _OF_FREE * free_memory():
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
