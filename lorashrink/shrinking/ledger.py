"""Outcomes of a run: the ledger passes them to the caller, writes the journal and keeps them for the report."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from lorashrink.errors import LorashrinkError, Progress
from lorashrink.recipes.grammar import Recipe
from lorashrink.results.shrinking import Failure, FileResult
from lorashrink.shrinking.journal import DONE, FAILED, STARTED, Entry, Journal, Stamp
from lorashrink.shrinking.metadata import Origin
from lorashrink.shrinking.outputs import shown

# source -> output -> recipe
Targets = Mapping[Path, Mapping[Path, Recipe]]

OnResult = Callable[[FileResult], None]


@dataclass(frozen=True, slots=True)
class Trace:
    """How a later run knows that outputs need not be made again."""

    origins: Mapping[Path, Origin]  # by output
    depends_on_base: bool
    stamps: tuple[Stamp, ...]


@dataclass(frozen=True, slots=True)
class Done:
    """The outcome of one adapter; small, and can be sent from another process."""

    source: Path
    outcome: tuple[FileResult, ...] | Failure
    trace: Trace | None = None

    @property
    def results(self) -> tuple[FileResult, ...]:
        """Its results, none if it failed."""
        return () if isinstance(self.outcome, Failure) else self.outcome

    def joined(self, earlier: Done | None, before: tuple[Stamp, ...] | None = None) -> Done:
        """The same with the earlier results of other outputs; `before` are stamps to put in place of its own."""
        if isinstance(self.outcome, Failure) or self.trace is None:
            return self
        trace = self.trace if before is None else replace(self.trace, stamps=before)
        if earlier and earlier.trace:
            trace = replace(trace, origins={**earlier.trace.origins, **trace.origins})
        return replace(self, outcome=(*(earlier.results if earlier else ()), *self.outcome), trace=trace)

    def moved(self, source: Path, outputs: Mapping[Path, Path]) -> Done:
        """The same by its real names: `source`, and `outputs`, copy -> output, in place of copies elsewhere."""
        names = {str(self.source): str(source)} | {
            str(shown(copy)): str(shown(output)) for copy, output in outputs.items()
        }
        if isinstance(self.outcome, Failure):
            error = self.outcome.error
            for copy, name in names.items():
                error = error.replace(copy, name)
            return Done(source, Failure(str(source), error))
        results = [replace(result, source=names[result.source], output=names[result.output]) for result in self.outcome]
        origins = {outputs[copy]: origin for copy, origin in self.trace.origins.items()} if self.trace else {}
        return Done(source, tuple(results), self.trace and replace(self.trace, origins=origins))


def origin_of(entry: Entry) -> Origin:
    """The origin of an entry's output."""
    return Origin(entry.source_sha256, entry.recipe, entry.base, entry.options, entry.version)


class Ledger:
    """The outcomes of a run; safe to use from many threads.

    `on_result` is called with every result, one at a time, and then only their short forms are kept.
    """

    def __init__(
        self,
        targets: Targets,
        *,
        journal: Path | None = None,
        on_result: OnResult | None = None,
        progress: Progress | None = None,
    ) -> None:
        self._targets = targets
        self._journal = Journal(journal) if journal is not None else None
        self._on_result, self._progress = on_result, progress
        self._outcomes: dict[Path, tuple[FileResult, ...] | Failure] = {}
        self._lock = threading.Lock()

    def recorded(self, output: Path, source: Path) -> Entry | None:
        """The journal's entry of an output that exists, if it and its source are what they were."""
        return self._journal.finished(output, source) if self._journal else None

    def start(self, source: Path, outputs: Iterable[Path]) -> None:
        """Work on these outputs of a source begins."""
        self._write(source, outputs, state=STARTED)

    def add(self, done: Done) -> None:
        """Work on a source is done, or failed."""
        source, outcome = done.source, done.outcome
        if isinstance(outcome, Failure):
            missing = [path for path in self._targets[source] if not os.path.exists(path)]
            self._write(source, missing, state=FAILED, message=outcome.error)
        elif done.trace:
            self._write_done(source, outcome, done.trace)
        with self._lock:
            if self._on_result and not isinstance(outcome, Failure):
                for result in outcome:
                    self._on_result(result)
                outcome = tuple(result.brief() for result in outcome)
            self._outcomes[source] = outcome
            if self._progress and len(self._targets) > 1:
                self._progress("files", len(self._outcomes), len(self._targets))

    def fail(self, source: Path, error: LorashrinkError) -> None:
        """Work on a source is over, because of this error."""
        self.add(Done(source, Failure(str(source), str(error))))

    def results(self) -> tuple[tuple[FileResult, ...], tuple[Failure, ...]]:
        """Results and failures in the order of the targets."""
        results: list[FileResult] = []
        failed: list[Failure] = []
        for source, outputs in self._targets.items():
            outcome = self._outcomes[source]
            if isinstance(outcome, Failure):
                failed.append(outcome)
            else:
                order = [str(shown(path)) for path in outputs]
                results += sorted(outcome, key=lambda result: order.index(result.output))
        return tuple(results), tuple(failed)

    def __enter__(self) -> Ledger:
        return self

    def __exit__(self, *exc: object) -> None:
        if self._journal:
            self._journal.close()

    def _write(self, source: Path, outputs: Iterable[Path], **facts: Any) -> None:
        if journal := self._journal:
            recipes = self._targets[source]
            journal.write([journal.entry(path, source, recipe=str(recipes[path]), **facts) for path in outputs])

    def _write_done(self, source: Path, results: Sequence[FileResult], trace: Trace) -> None:
        if self._journal is None:
            return
        by_output = {result.output: result for result in results}
        entries = []
        for path, origin in trace.origins.items():
            result = by_output[str(shown(path))]
            entries.append(
                self._journal.entry(
                    path,
                    source,
                    state=DONE,
                    stamps=trace.stamps,
                    **asdict(origin),
                    depends_on_base=trace.depends_on_base,
                    bytes_before=result.bytes_before,
                    threshold=result.threshold,
                    relative_error=result.relative_error,
                    distortion=result.distortion,
                    dtype=result.dtype,
                    seconds=result.seconds,
                )
            )
        self._journal.write(entries)
