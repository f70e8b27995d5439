"""What all fuzz tests share: how many cases, and a limit of time and memory for each.

LORASHRINK_FUZZ=N multiplies the cases by N; the short form takes about a minute.
"""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator

from hypothesis import HealthCheck, settings

FACTOR = int(os.environ.get("LORASHRINK_FUZZ", "1"))
SECONDS = 20  # for one case, on a machine with other work
BYTES = 2 << 30  # above what the process has


def cases(count: int) -> settings:
    """Settings for so many cases, other ones in each long run."""
    return settings(
        max_examples=count * FACTOR,
        derandomize=FACTOR == 1,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )


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
