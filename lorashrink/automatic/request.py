"""What the user wants of each adapter: the recipe that stands for it, and what a result says of it."""

from __future__ import annotations

import json
import math
import os
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from lorashrink._version import __version__
from lorashrink.automatic.method import Method
from lorashrink.automatic.methods import Methods
from lorashrink.errors import UsageError
from lorashrink.recipes.grammar import Recipe
from lorashrink.recipes.levels import Level, level_of
from lorashrink.results.automatic import Shrunk
from lorashrink.results.shrinking import FileResult
from lorashrink.text import bytes_in

LEAST_GAIN = 0.1  # an adapter that would shrink by less is left alone

OWN_OUTPUT = "is smaller already, made by lorashrink"


@dataclass(frozen=True, slots=True)
class Request:
    """What the user wants of each adapter."""

    level: Level
    size: float | None  # bytes
    rank: int | None
    dtype: str
    prompts: str | Path | None
    force: bool

    @classmethod
    def of(
        cls,
        *,
        quality: str | float,
        size: str | float | None,
        rank: int | None,
        dtype: str,
        prompts: str | Path | None,
        force: bool,
    ) -> Request:
        """The request of these options of `shrink`. Raises UsageError."""
        if size is not None and rank is not None:
            raise UsageError("--size and --rank: give one of them.")
        if rank is not None and rank < 1:
            raise UsageError(f"--rank {rank}: a rank is at least 1.")
        limit = None
        if size is not None:
            with suppress(ValueError):
                limit = bytes_in(str(size))
            if limit is None or not 0 < limit < math.inf:
                raise UsageError(f"--size {size}: a size is a number above 0 with a unit, such as 50MB.")
        return cls(level_of(quality), limit, rank, dtype, prompts, force)

    @property
    def most_share(self) -> float:
        """The largest share of an input that is worth writing."""
        return 1.0 if self.size is not None else 1 - LEAST_GAIN

    def recipe(self, method: Method) -> Recipe:
        """The recipe without a look at pictures."""
        if self.size is not None:
            return Recipe.parse(method.of_size(self.size))
        return Recipe.parse(method.of_level(self.level) if self.rank is None else method.of_rank(self.rank))

    def key(self, methods: Methods, drawing: bool) -> str:
        """Text that differs where results may differ, for the record."""
        prompts = self.prompts
        if prompts is not None and os.path.isfile(prompts):
            prompts = Path(prompts).read_text(encoding="utf-8", errors="replace")
        facts = [
            __version__,
            self.level.name,
            self.size,
            self.rank,
            self.dtype,
            prompts,
            drawing,
            *methods.fingerprints,
        ]
        return json.dumps([fact if fact is None else str(fact) for fact in facts])

    def note(self, method: Method) -> str:
        """Which numbers stand for the level of quality, "" where it is predicted or not asked for."""
        return method.stands_in(self.level) if self.size is None and self.rank is None else ""

    def result(self, source: str, result: FileResult, method: Method) -> Shrunk:
        """The result of one adapter; one that was not worth writing has no output."""
        gain = 1 - result.bytes_after / result.bytes_before
        skipped = None
        if result.bytes_after > self.most_share * result.bytes_before:
            skipped = f"would shrink by {gain:.0%} only" if gain > 0 else "would not shrink"
        reasons = Counter(f"copied: {copied.reason}" for copied in result.verbatim)
        reasons += Counter(f"removed: {removed.reason}" for removed in result.removed)
        return Shrunk(
            input=source,
            output=None if skipped else result.output,
            bytes_before=result.bytes_before,
            bytes_after=result.bytes_after,
            method=method.name,
            why=method.why,
            recipe=result.recipe,
            dtype=result.dtype,
            relative_error=result.relative_error,
            predicted_db=result.predicted_db,
            loads_in=result.loads.loads_in,
            skipped=skipped,
            warnings=result.warnings,
            details=tuple(f"{count} {reason}" for reason, count in reasons.items()),
        )


def left_alone(source: str, size: int) -> Shrunk:
    """The result of an output of an earlier run. size: bytes."""
    return Shrunk(source, None, size, size, "", "", "", "", 0.0, skipped=OWN_OUTPUT)
