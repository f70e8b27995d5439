"""The session of a run: bases, base norms, statistics and worker threads that all adapters share."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Executor
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

from lorashrink.bases import Base, use_base
from lorashrink.bases.norms import BaseNorms
from lorashrink.bases.views import BaseInfo
from lorashrink.calibration.statistics import Statistics, open_statistics
from lorashrink.engine.devices import pick_device, worker_pool
from lorashrink.errors import Progress, UsageError
from lorashrink.files.disk import sha256_file
from lorashrink.files.store import MIXTURES, OUTPUT_DTYPES
from lorashrink.linking.matching import FORMS
from lorashrink.recipes.choice import Selection
from lorashrink.shrinking.grouping import base_for
from lorashrink.shrinking.options import ResizeOptions
from lorashrink.shrinking.plan import UNMAPPED
from lorashrink.shrinking.request import Job

log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class AdapterBase:
    """The base of one adapter with its norms; both are None if it has none."""

    base: Base | None = None
    norms: BaseNorms | None = None

    @property
    def fingerprint(self) -> str:
        """The fingerprint of the base, "" without a base."""
        return self.base.fingerprint if self.base else ""


@dataclass(frozen=True, eq=False)
class Session:
    """All that is opened once for a job."""

    job: Job
    options: ResizeOptions  # of the job
    device: str
    pool: Executor
    bases: Mapping[Path, AdapterBase]
    statistics: Statistics | None = None
    progress: Progress | None = None
    selections: Mapping[Path, Selection] = field(default_factory=dict)  # by output, where they are made already

    def base_of(self, source: Path) -> AdapterBase:
        """The base of this adapter. Raises InputError if a table of bases has none for it."""
        if self.job.bases:
            return self.bases[base_for(source, self.job.bases)]
        return next(iter(self.bases.values()), AdapterBase())

    @cached_property
    def variant(self) -> str:
        """The options that change what is written, as text for metadata and journal."""
        options, calibration = self.options, self.options.calibration
        statistics = f",calibration={sha256_file(Path(calibration))[:16]}" if calibration else ""
        anchor = "" if options.anchor is None else f",anchor={options.anchor!r}"
        variant = f"{self.job.variant}{statistics}{anchor}"
        return f"dtype={options.dtype},unmapped={options.unmapped},as={options.form}{variant}"

    @property
    def infos(self) -> tuple[BaseInfo, ...]:
        """The bases as reports name them."""
        return tuple(against.base.info for against in self.bases.values() if against.base)

    def reporter(self, text: str) -> Callable[[int, int], None] | None:
        """A progress callback for one part of the work."""
        progress = self.progress
        return None if progress is None else lambda done, total: progress(text, done, total)


def checked_dtype(dtype: str) -> str:
    """The name of a dtype of outputs. Raises UsageError."""
    if dtype not in (*OUTPUT_DTYPES, *MIXTURES):
        raise UsageError(f"dtype: '{dtype}' is not one of {', '.join((*OUTPUT_DTYPES, *MIXTURES))}.")
    return {"16": "fp16", "32": "fp32"}.get(dtype, dtype)


@contextlib.contextmanager
def open_session(job: Job, *, progress: Progress | None = None) -> Iterator[Session]:
    """Open the bases and a pool of threads. Raises UsageError, InputError or NotABase."""
    options = replace(job.options, dtype=checked_dtype(job.options.dtype))
    for name, value, allowed in (("unmapped", options.unmapped, UNMAPPED), ("as", options.form, FORMS)):
        if value not in allowed:
            raise UsageError(f"{name}: '{value}' is not one of {', '.join(allowed)}.")
    sources = [options.base] if options.base is not None else list(dict.fromkeys(job.bases.values()))
    recipes = [recipe for outputs in job.targets.values() for recipe in outputs.values()]
    # Frobenius norms are taken from the base where it lies; others take its weights to the device.
    reads_weights = any("weight" in recipe.needs or "spn" in recipe.base_norms for recipe in recipes)
    files = [source for source in sources if isinstance(source, (str, Path))] if reads_weights else []
    device = pick_device(options.device, [*job.targets, *files])
    with contextlib.ExitStack() as stack:
        opened = [stack.enter_context(use_base(source)) for source in sources]
        bases = {base.path: base for base in opened}
        for family, path in job.bases.items():
            if bases[path].family.name != family:
                raise UsageError(f"{path}: is for {bases[path].family.name}, and the table of bases says {family}.")
        statistics = stack.enter_context(open_statistics(options.calibration)) if options.calibration else None
        pool = stack.enter_context(worker_pool(options.jobs))
        against = {path: AdapterBase(base, BaseNorms(base)) for path, base in bases.items()}
        yield Session(job, options, device, pool, against, statistics, progress)
