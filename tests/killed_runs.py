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
    """Every file but the journal, by its path in the folder."""
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != journal.NAME)
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def run(sources: Path, out: Path) -> int:
    """Start a run in a child process, and return its id."""
    if child := os.fork():
        return child
    status = 1
    try:
        report = resize(sources, recipes=RECIPES, output=out, recursive=True, skip_existing=True, jobs=2)
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


def written(folder: Path) -> list[Path]:
    """The files with tensors of all outputs."""
    return list(folder.rglob("*.safetensors"))


def whole(remains: dict[str, bytes], expected: dict[str, bytes]) -> bool:
    """Whether every output that is there is complete: a file, or a folder with all of its files."""
    outputs = {name for name in remains if name.endswith(".safetensors")}
    needed = {name for output in outputs for name in (output, str(Path(output).with_name("adapter_config.json")))}
    return all(remains.get(name) == expected[name] for name in needed & expected.keys())


def main(sources: Path, out: Path, reference: Path, count: int) -> None:
    """Print what each kill left behind, and whether the next run completed it."""
    warnings.simplefilter("error")
    journal.SETTLED_SECONDS = 0.0  # the sources were just made
    start = time.perf_counter()
    assert os.waitpid(run(sources, reference), 0)[1] == 0
    duration = time.perf_counter() - start
    expected, numbers, trials = contents(reference), random.Random(0), []
    outputs = len(written(reference))
    for _ in range(count):
        shutil.rmtree(out, ignore_errors=True)
        share = duration / outputs
        stops = sorted(numbers.randrange(outputs) for _ in range(2))
        stopped = [killed(sources, out, stop, numbers.uniform(0.0, 2 * share)) for stop in stops]
        remains = contents(out)
        status = os.waitpid(run(sources, out), 0)[1]
        with journal.Journal(out) as opened:
            states = [entry.state for entry in opened.entries()]
        trials.append(
            {
                "killed": any(stopped),
                "outputs": sum(name.endswith(".safetensors") for name in remains),
                "whole": whole(remains, expected),
                "status": status,
                "equal": contents(out) == expected,
                "done": states == [journal.DONE] * outputs,
            }
        )
    print(json.dumps(trials))


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:4]), int(sys.argv[4]))
