"""What all adapters of one run share: bases, base norms, statistics and worker threads."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Executor
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

from lorashrink.bases import Base, open_base
from lorashrink.bases.norms import BaseNorms
from lorashrink.bases.views import BaseInfo
from lorashrink.calibration.statistics import Statistics, open_statistics
from lorashrink.engine.devices import pick_device, worker_pool
from lorashrink.errors import Progress, UsageError
from lorashrink.files.disk import sha256_file
from lorashrink.files.store import OUTPUT_DTYPES
from lorashrink.linking.matching import FORMS
from lorashrink.recipes.choice import Selection
from lorashrink.results.shrinking import FileResult
from lorashrink.shrinking.grouping import base_for
from lorashrink.shrinking.plan import UNMAPPED
from lorashrink.shrinking.request import How

log = logging.getLogger(__name__)

Each = Callable[[FileResult], None]


# --- what stays open over many files ------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class BaseContext:
    """The base of one adapter, if it has one."""

    base: Base | None = None
    norms: BaseNorms | None = None


@dataclass(frozen=True, eq=False)
class Session:
    """All that is opened once."""

    how: How
    device: str
    pool: Executor
    bases: Mapping[Path, BaseContext]
    statistics: Statistics | None = None
    progress: Progress | None = None
    selections: Mapping[Path, Selection] = field(default_factory=dict)  # by output, where they are made already

    def against(self, source: Path) -> BaseContext:
        """The base of this adapter. Raises InputError if a table of bases has none for it."""
        if self.how.bases:
            return self.bases[base_for(source, self.how.bases)]
        return next(iter(self.bases.values()), BaseContext())

    @cached_property
    def options(self) -> str:
        """Whatever decides what is written, beside the source, the recipe and the base."""
        how = self.how
        statistics = f",calibration={sha256_file(Path(how.calibration))[:16]}" if how.calibration else ""
        return f"dtype={how.dtype},unmapped={how.unmapped},as={how.form}{how.options}{statistics}"

    @property
    def infos(self) -> tuple[BaseInfo, ...]:
        """What reports say of the bases."""
        return tuple(each.base.info for each in self.bases.values() if each.base)

    def reporter(self, text: str) -> Callable[[int, int], None] | None:
        """A progress callback for one part of the work."""
        progress = self.progress
        return None if progress is None else lambda done, total: progress(text, done, total)


@contextlib.contextmanager
def open_session(how: How, *, jobs: int | None = None, progress: Progress | None = None) -> Iterator[Session]:
    """Open the bases and a pool of threads. Raises UsageError, InputError or NotABase."""
    for option, value, allowed in (
        ("dtype", how.dtype, tuple(OUTPUT_DTYPES)),
        ("unmapped", how.unmapped, UNMAPPED),
        ("as", how.form, FORMS),
    ):
        if value not in allowed:
            raise UsageError(f"{option}: '{value}' is not one of {', '.join(allowed)}.")
    how = replace(how, dtype={"16": "fp16", "32": "fp32"}.get(how.dtype, how.dtype))
    device = pick_device(how.device)
    paths = [Path(how.base)] if how.base is not None else list(dict.fromkeys(how.bases.values()))
    with contextlib.ExitStack() as stack:
        bases = {path: stack.enter_context(open_base(path)) for path in paths}
        for family, path in how.bases.items():
            if bases[path].family.name != family:
                raise UsageError(f"{path}: is for {bases[path].family.name}, and the table of bases says {family}.")
        statistics = stack.enter_context(open_statistics(how.calibration)) if how.calibration else None
        pool = stack.enter_context(worker_pool(jobs))
        against = {path: BaseContext(base, BaseNorms(base)) for path, base in bases.items()}
        yield Session(how, device, pool, against, statistics, progress)
