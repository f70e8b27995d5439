"""The pipeline of a run: decompose one adapter while the one before it is planned and written."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

from lorashrink.errors import LorashrinkError
from lorashrink.recipes.grammar import Recipe
from lorashrink.results.shrinking import Failure, FileResult
from lorashrink.shrinking.ledger import Done, Ledger, Targets
from lorashrink.shrinking.plan import file_result
from lorashrink.shrinking.reuse import OpenSource, own_base, recorded_results
from lorashrink.shrinking.session import Session, log
from lorashrink.shrinking.work import Work, decompose_together
from lorashrink.shrinking.write import write
from lorashrink.sums.summing import sources_of

# On a GPU small files are decomposed together until this many layers fill a batch.
_CUDA_WAVE_LAYERS = 4096

_IN_FLIGHT = 2  # waves whose spectra are in memory: one is decomposed while another is written


def shrink_each(targets: Targets, session: Session, ledger: Ledger) -> None:
    """Decompose one wave of files while the one before it is written; the ledger gets what becomes of each."""
    in_flight: list[Future[None]] = []
    with ThreadPoolExecutor(1, "lorashrink-files") as finisher:
        try:
            for wave in _waves(targets, session, ledger):
                decompose_together(wave, session)
                in_flight += [finisher.submit(_finish, work, session, ledger) for work in wave]
                while len(in_flight) >= _IN_FLIGHT:  # before the next wave takes memory
                    in_flight.pop(0).result()
            for future in in_flight:
                future.result()
        except BaseException:
            session.pool.shutdown(wait=False, cancel_futures=True)
            finisher.shutdown(wait=True, cancel_futures=True)
            raise


def _waves(targets: Targets, session: Session, ledger: Ledger) -> Iterator[list[Work]]:
    """Open adapters in waves that are decomposed together; the ledger gets those that fail or are done already."""
    enough = _CUDA_WAVE_LAYERS if session.device.startswith("cuda") else 1
    wave: list[Work] = []
    for source, outputs in targets.items():
        try:
            work = _begin(source, outputs, session, ledger)
        except LorashrinkError as error:
            ledger.add(failure_of(source, error))
            continue
        if work:
            wave.append(work)
        if sum(len(work.adapter) for work in wave) >= enough:
            yield wave
            wave = []
    if wave:
        yield wave


def _begin(source: Path, outputs: Mapping[Path, Recipe], session: Session, ledger: Ledger) -> Work | None:
    """Open an adapter for the outputs that an equal run has not written; None if it has written all of them."""
    started = time.perf_counter()
    against, skip = session.base_of(source), session.options.skip_existing
    results: dict[Path, FileResult] = {}
    if skip:
        results = recorded_results(source, outputs, against, session, ledger)
    if len(results) == len(outputs):
        ledger.add(Done(source, tuple(results.values())))
        return None
    opened = OpenSource.open(source, against, session)
    try:
        unrecorded = {path: recipe for path, recipe in outputs.items() if path not in results}
        if skip:
            existing = {path: recipe for path, recipe in unrecorded.items() if os.path.exists(path)}
            results |= {path: opened.existing_result(path, recipe) for path, recipe in existing.items()}
        rest = {path: recipe for path, recipe in outputs.items() if path not in results}
        if not rest:
            opened.close()
            ledger.add(Done(source, tuple(results.values()), opened.trace(unrecorded)))
            return None
        ledger.start(source, rest)
        work = Work.begin(opened, rest)
        return replace(work, started=started, skipped=tuple(results.values()), traced=unrecorded)
    except BaseException:
        opened.close()
        raise


def _finish(work: Work, session: Session, ledger: Ledger) -> None:
    """Plan, write and report one adapter whose layers are being decomposed."""
    source, options = work.source, session.options
    try:
        plans = work.plans()
        warnings: Mapping[Path, list[str]] = {}
        if not options.dry_run:
            report = session.reporter(f"writing {source.path.name}")
            warnings = write(plans, pool=session.pool, device=session.device, progress=report)
        base, sources = own_base(source.against, session), sources_of(work.adapter)
        results = []
        for path, plan in plans.items():
            result = file_result(
                plan,
                path,
                started=work.started,
                with_quantiles=options.quantiles,
                warnings=warnings.get(path, ()),
            )
            results.append(replace(result, base=base, sources=sources))
        traced = {path: recipe for path, recipe in work.traced.items() if path in plans or path not in work.outputs}
        done = Done(source.path, (*work.skipped, *results), source.trace(traced))
    except Exception as error:
        done = failure_of(source.path, error)
    finally:
        work.adapter.close()
    ledger.add(done)


def failure_of(source: Path, error: Exception) -> Done:
    """The outcome of an adapter that could not be shrunk."""
    if isinstance(error, LorashrinkError):
        return Done(source, Failure(str(source), str(error)))
    log.debug("%s", source, exc_info=error)
    return Done(source, Failure(str(source), f"{source}: unexpected {type(error).__name__}: {error}"))
