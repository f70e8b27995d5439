"""Start one command and say what it used: `python launch.py CMD...` prints one JSON line on standard output.

A process of its own, because the peak memory that the kernel reports for a child starts at that of its parent,
and a benchmark that has torch loaded is a large parent. Reads no more than the standard library. Not on Windows.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

# Where the started command finds the time of its own start, in seconds since 1970.
STARTED = "BENCH_STARTED"
_RSS_UNIT = 1 if sys.platform == "darwin" else 1024


@dataclass(frozen=True, slots=True)
class Usage:
    """What one process used."""

    wall: float  # s
    cpu: float  # s, user + system
    rss: int  # bytes, peak resident


class CommandFailed(Exception):
    """A started command ended with an error; the message holds the end of its output."""


def usage_of(command: Sequence[str], env: Mapping[str, str] | None = None) -> Usage:
    """Run a command to its end, with `env` added to the environment. Raises CommandFailed."""
    os.sync()  # what earlier commands left to be written should not count against this one
    process = subprocess.Popen(
        [sys.executable, "-I", "-S", __file__, *command],
        env={**os.environ, **(env or {})},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        output, errors = process.communicate()
    except BaseException:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()  # until the command itself has let go of its end of the pipe
        raise
    if process.returncode:
        raise CommandFailed(f"{' '.join(command)}\n{errors[-3000:]}")
    return Usage(**json.loads(output))


def main() -> int:
    """Run the command in the arguments; its own output goes to standard error."""
    environment = {**os.environ, STARTED: repr(time.time())}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)  # what is installed is compiled once, and not at every start
    start = time.perf_counter()
    child = subprocess.Popen(sys.argv[1:], stdout=sys.stderr, env=environment)
    _, status, usage = os.wait4(child.pid, 0)
    wall = time.perf_counter() - start
    child.returncode = os.waitstatus_to_exitcode(status)
    print(json.dumps({"wall": wall, "cpu": usage.ru_utime + usage.ru_stime, "rss": usage.ru_maxrss * _RSS_UNIT}))
    return child.returncode


if __name__ == "__main__":
    sys.exit(main())
