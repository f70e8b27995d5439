"""Runs on a Ray cluster of this machine: `python cluster_runs.py SOURCES FOLDER` prints what became of them as JSON.

A process of its own: Ray leaves open what it has started, which the tests' strictness does not allow.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ray
from typer.testing import CliRunner

from lorashrink.cli import app
from lorashrink.results.shrinking import FileResult
from lorashrink.shrinking import journal
from lorashrink.shrinking.cluster import resize, shrink_source

RECIPES = ["rank=2", "energy=0.9"]


def working() -> list[int]:
    """The processes of this cluster that work on an adapter."""
    processes = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            title, parents = folder.joinpath("cmdline").read_bytes(), _parents(int(folder.name))
        except OSError:
            continue
        if title.startswith(f"ray::{shrink_source.__name__}".encode()) and os.getpid() in parents:
            processes.append(int(folder.name))
    return processes


def _parents(process: int) -> list[int]:
    parents = []
    while process > 1:
        process = int(Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[1])
        parents.append(process)
    return parents


class Killer:
    """Kills a process that is at work, twice in a run."""

    def __init__(self) -> None:
        self.results: list[FileResult] = []
        self.killed: list[int] = []

    def __call__(self, result: FileResult) -> None:
        self.results.append(result)
        while len(self.killed) < 2 and len(self.results) >= 6 * (len(self.killed) + 1):
            for process in working()[:1]:
                os.kill(process, signal.SIGKILL)
                self.killed.append(process)
            time.sleep(0.005)


def _outputs(results: Sequence[FileResult]) -> list[str]:
    return sorted(result.output for result in results)


def main(sources: Path, folder: Path) -> dict[str, Any]:
    """Do all runs, one after another, on one cluster."""
    journal.SETTLED_SECONDS = 0.0  # the sources were just made
    outcomes: dict[str, Any] = {}
    shared = resize(sources, recipes=RECIPES, output=folder / "shared")
    outcomes["shared"] = [len(shared.results), [failure.error for failure in shared.failed]]
    command = ["resize", str(sources), "--ray", "local", "--ray-transfer", "-o", str(folder / "sent"), "--json"]
    sent = CliRunner().invoke(app, [*command, *(word for recipe in RECIPES for word in ("-r", recipe))])
    document = json.loads(sent.stdout)
    outcomes["sent"] = [len(document["results"]), [failure["error"] for failure in document["failed"]], sent.exit_code]
    killer = Killer()
    lost = resize(sources, recipes=RECIPES, output=folder / "lost", skip_existing=True, each=killer)
    outcomes["lost"] = [len(lost.results), [failure.error for failure in lost.failed], len(killer.killed)]
    outcomes["each"] = _outputs(killer.results) == _outputs(lost.results)
    (missing := Path(lost.results[0].output)).unlink()
    again = resize(sources, recipes=RECIPES, output=folder / "lost", skip_existing=True)
    outcomes["again"] = [str(missing), [result.output for result in again.results if not result.skipped]]
    with journal.Journal(folder / "lost") as opened:
        outcomes["states"] = [entry.state for entry in opened.entries()]
    return outcomes


if __name__ == "__main__":
    with tempfile.TemporaryDirectory(prefix="ray-") as folder:  # the name of a socket in it may have 107 characters
        ray.init("local", num_cpus=2, include_dashboard=False, log_to_driver=False, _temp_dir=folder)
        outcomes = main(*map(Path, sys.argv[1:3]))
        ray.shutdown()
    print(json.dumps(outcomes))  # Ray prints too, until then
