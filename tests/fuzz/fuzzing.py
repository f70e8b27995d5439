"""What all fuzz targets share: how many cases, and a limit of time and memory for each.

A target is a check of values that are drawn from random bytes. The test suite draws them with hypothesis, a minute in
the short form; LORASHRINK_FUZZ=N makes it N times as many. `guided.py` lets atheris choose the bytes.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import shutil
import signal
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

FACTOR = int(os.environ.get("LORASHRINK_FUZZ", "1"))
SECONDS = 20  # for one case, on a machine with other work
BYTES = 2 << 30  # above what the process has

FOLDER = Path(tempfile.mkdtemp(prefix="lorashrink-fuzz-"))  # for the files of all cases
_OWNER = os.getpid()


@atexit.register
def _clear() -> None:
    if os.getpid() == _OWNER:
        shutil.rmtree(FOLDER, ignore_errors=True)


@dataclass(eq=False)
class Target:
    """One check and the strategies of its arguments."""

    name: str
    check: Callable[..., None]
    strategies: Mapping[str, st.SearchStrategy[Any]]
    count: int  # cases of the short form
    done: int = 0  # cases so far

    def test(self) -> Any:
        """The check as hypothesis runs it, with other cases in each long run."""

        @wraps(self.check)
        def counted(**values: Any) -> None:
            self.done += 1
            self.check(**values)

        options = settings(
            max_examples=self.count * FACTOR,
            derandomize=FACTOR == 1,
            database=None,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        )
        return options(given(**self.strategies)(counted))


TARGETS: dict[str, Target] = {}


def add(name: str, count: int, check: Callable[..., None], **strategies: st.SearchStrategy[Any]) -> None:
    """Add a target to the table."""
    TARGETS[name] = Target(name, check, strategies, count)


@contextlib.contextmanager
def limits() -> Iterator[None]:
    """A case that hangs or takes memory without bound fails: SIGALRM after `SECONDS`, MemoryError beyond `BYTES`."""
    import resource

    def late(*_: object) -> None:
        raise TimeoutError(f"took more than {SECONDS} s")

    with open("/proc/self/statm") as statm:
        size = int(statm.read().split()[0]) * resource.getpagesize()
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(SECONDS)
    resource.setrlimit(resource.RLIMIT_AS, (size + BYTES, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
