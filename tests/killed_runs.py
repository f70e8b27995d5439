"""Runs that are killed at random moments, and then go on: `python killed_runs.py SOURCES OUT REFERENCE COUNT` in JSON.

A process of its own that imports everything once and forks, so that a run takes as long as its work.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import sys
import time
import warnings
from pathlib import Path

from lorashrink.shrinking import journal
from lorashrink.shrinking.run import resize

RECIPES = ["rank=2", "energy=0.9"]


def contents(folder: Path) -> dict[str, bytes]:
    """Every file but the journal, by name."""
    paths = folder.iterdir() if folder.exists() else ()
    return {path.name: path.read_bytes() for path in paths if path.name != journal.NAME}


def run(sources: Path, out: Path) -> int:
    """Start a run in a child process, and return its id."""
    if child := os.fork():
        return child
    status = 1
    try:
        report = resize(sources, recipes=RECIPES, output=out, skip_existing=True, jobs=2)
        status = len(report.failed)
    finally:
        os._exit(status)


def killed(sources: Path, out: Path, outputs: int, delay: float) -> bool:
    """Kill a run a moment after it has written so many outputs; return whether it was still at work.

    Time alone would not do: on a machine with other work a run may not have begun, or be over.
    """
    child = run(sources, out)
    while len(written(out)) < outputs and not os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT):
        time.sleep(0.001)
    time.sleep(delay)
    os.kill(child, signal.SIGKILL)  # a child that has ended is still there until it is waited for
    return os.WIFSIGNALED(os.waitpid(child, 0)[1])


def written(folder: Path) -> list[str]:
    """The names of the outputs."""
    names = os.listdir(folder) if folder.exists() else []
    return [name for name in names if name.endswith(".safetensors")]


def main(sources: Path, out: Path, reference: Path, count: int) -> None:
    """Print what each kill left behind, and whether the next run completed it."""
    warnings.simplefilter("error")
    journal.SETTLED_SECONDS = 0.0  # the sources were just made
    start = time.perf_counter()
    assert os.waitpid(run(sources, reference), 0)[1] == 0
    duration = time.perf_counter() - start
    expected, numbers, trials = contents(reference), random.Random(0), []
    for _ in range(count):
        shutil.rmtree(out, ignore_errors=True)
        share = duration / len(expected)
        stops = sorted(numbers.randrange(len(expected)) for _ in range(2))
        stopped = [killed(sources, out, stop, numbers.uniform(0.0, 2 * share)) for stop in stops]
        remains = contents(out)
        outputs_left = {name: data for name, data in remains.items() if name.endswith(".safetensors")}
        status = os.waitpid(run(sources, out), 0)[1]
        with journal.Journal(out) as opened:
            states = [entry.state for entry in opened.entries()]
        trials.append(
            {
                "killed": any(stopped),
                "outputs": len(outputs_left),
                "leftovers": len(remains.keys() - outputs_left.keys()),
                "whole": all(expected[name] == data for name, data in outputs_left.items()),
                "status": status,
                "equal": contents(out) == expected,
                "done": states == [journal.DONE] * len(expected),
            }
        )
    print(json.dumps(trials))


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:4]), int(sys.argv[4]))
