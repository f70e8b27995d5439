"""Work in the background: one job after the other, with progress, and an end on request."""

from __future__ import annotations

import queue
import secrets
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lorashrink.errors import InputError, LorashrinkError, explained

_REMEMBERED = 50  # jobs that ended


class Cancelled(LorashrinkError):
    """The user ended the job."""


@dataclass(eq=False)
class Job:
    """A piece of work. Its own thread changes it, and any thread may read it."""

    kind: str  # "shrink" or "pictures"
    title: str
    work: Callable[[Job], None] = field(repr=False)
    id: str = field(default_factory=lambda: secrets.token_hex(6))
    state: str = "waiting"  # then "running", and "done", "failed" or "cancelled"
    text: str = ""  # what is being done
    done: int = 0  # steps
    total: int = 0
    error: str = ""
    results: list[dict[str, Any]] = field(default_factory=list)
    failed: list[dict[str, str]] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)  # of this kind of job alone
    undo: Callable[[], int] | None = field(default=None, repr=False)  # deletes what was written; the number of files
    undone: bool = False
    cancelled: bool = False  # whether it is to end

    def report(self, text: str, done: int, total: int) -> None:
        """Note progress. Raises Cancelled if the job is to end."""
        self.text, self.done, self.total = text, done, total
        self.check()

    def check(self) -> None:
        """Raises Cancelled if the job is to end."""
        if self.cancelled:
            raise Cancelled("stopped, because you asked for it.")

    @property
    def over(self) -> bool:
        """Whether nothing more will happen."""
        return self.state in ("done", "failed", "cancelled")

    def document(self, most: int | None = None) -> dict[str, Any]:
        """The job as JSON; of results and failures the last `most`, and what all of them add up to."""
        names = ("id", "kind", "title", "state", "text", "done", "total", "error", "undone")
        results, failed = list(self.results), list(self.failed)
        start = 0 if most is None else max(0, len(results) - most)
        # A picture is shown by its address below `/api/pictures/`, not by its path.
        shown = [
            {key: f"{self.id}/{number}-{key}" if isinstance(value, Path) else value for key, value in result.items()}
            for number, result in enumerate(results[start:], start)
        ]
        return {
            **{name: getattr(self, name) for name in names},
            **self.facts,
            "results": shown,
            "failed": failed[0 if most is None else -most :],
            "counts": {"results": len(results), "failed": len(failed)},
            "bytes_before": sum(result.get("bytes_before", 0) for result in results),
            "bytes_after": sum(result.get("bytes_after", 0) for result in results),
            "can_undo": self.undo is not None and self.over and not self.undone,
        }


class Jobs:
    """All jobs; a thread carries them out in order."""

    def __init__(self) -> None:
        self._jobs: dict[str, Job] = {}
        self._waiting: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self._lock = threading.Lock()

    def add(self, job: Job) -> Job:
        """Begin a job as soon as those before it have ended."""
        with self._lock:
            ended = [identity for identity, old in self._jobs.items() if old.over]
            for identity in ended[:-_REMEMBERED]:
                del self._jobs[identity]
            self._jobs[job.id] = job
        self._waiting.put(job)
        return job

    def get(self, identity: str) -> Job:
        """The job of this id. Raises InputError if there is none."""
        with self._lock:
            if identity not in self._jobs:
                raise InputError("there is no such job; it ended before the program was started again.")
            return self._jobs[identity]

    def all(self) -> Sequence[Job]:
        """The jobs, oldest first."""
        with self._lock:
            return list(self._jobs.values())

    def run(self) -> None:
        """Carry out jobs until `stop`. Runs in a thread of its own."""
        while (job := self._waiting.get()) is not None:
            try:
                job.check()
                job.state = "running"
                job.work(job)
                job.state = "done"
            except Cancelled:
                job.state = "cancelled"
            except Exception as error:
                job.error, job.state = str(explained(job.title, error)), "failed"

    def stop(self) -> None:
        """End all jobs, and `run` after the step that is being done."""
        for job in self.all():
            job.cancelled = True
        self._waiting.put(None)
