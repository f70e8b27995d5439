"""The pipeline of a run: decompose one adapter while the one before it is planned and written."""

from __future__ import annotations

import time
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from lorashrink.adapters import Adapter, adapter_of
from lorashrink.errors import boundary
from lorashrink.files.store import ComputedStore
from lorashrink.linking.loaders import loads
from lorashrink.recipes.grammar import Recipe
from lorashrink.results.shrinking import FileResult
from lorashrink.shrinking.ledger import Done, Ledger, Targets
from lorashrink.shrinking.plan import Plan, file_result
from lorashrink.shrinking.reuse import OpenSource, own_base, recorded_results
from lorashrink.shrinking.session import Session
from lorashrink.shrinking.work import Work
from lorashrink.shrinking.write import Written, write
from lorashrink.sums.summing import sources_of

_IN_FLIGHT = 2  # adapters whose spectra are in memory: one is decomposed while another is written


def shrink_each(targets: Targets, session: Session, ledger: Ledger) -> None:
    """Decompose one adapter while the one before it is written; the ledger gets what becomes of each."""
    in_flight: list[Future[None]] = []
    with ThreadPoolExecutor(1, "lorashrink-files") as finisher:
        try:
            for source, outputs in targets.items():
                with boundary(source, partial(ledger.fail, source)):
                    if work := begin(source, outputs, session, ledger):
                        in_flight.append(finisher.submit(finish, work, session, ledger))
                while len(in_flight) >= _IN_FLIGHT:  # before the next one takes memory
                    in_flight.pop(0).result()
            for future in in_flight:
                future.result()
        except BaseException:
            session.pool.shutdown(wait=False, cancel_futures=True)
            finisher.shutdown(wait=True, cancel_futures=True)
            raise


def begin(source: Path, outputs: Mapping[Path, Recipe], session: Session, ledger: Ledger) -> Work | None:
    """Open an adapter and begin to decompose it, for the outputs that an equal run has not written.

    None if it has written all of them, which the ledger gets.
    """
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
            results |= opened.existing_results(unrecorded)
        rest = {path: recipe for path, recipe in outputs.items() if path not in results}
        if not rest:
            opened.close()
            ledger.add(Done(source, tuple(results.values()), opened.trace(unrecorded)))
            return None
        ledger.start(source, rest)
        work = Work.begin(opened, rest)
        work.decompose()
        return replace(work, started=started, skipped=tuple(results.values()), traced=unrecorded)
    except BaseException:
        opened.close()
        raise


def finish(work: Work, session: Session, ledger: Ledger) -> None:
    """Plan, write and report one adapter whose layers are being decomposed."""
    source, options = work.source, session.options
    done = None
    with boundary(source.path, partial(ledger.fail, source.path)), closing(work.adapter):
        plans = work.plans()
        written: Mapping[Path, Written] = {}
        if not options.dry_run:
            report = session.reporter(f"writing {source.path.name}")
            most = session.job.most_share * sum(path.stat().st_size for path in work.adapter.store.files)
            worthy = {path: plan for path, plan in plans.items() if plan.nbytes <= most}
            written = write(worthy, pool=session.pool, device=session.device, progress=report) if worthy else {}
        base, sources = own_base(source.against, session), sources_of(work.adapter)
        family = source.against.base.family.name if source.against.base else None
        results = []
        for path, plan in plans.items():
            adapter, warnings = written.get(path) or (planned_adapter(plan), ())
            result = file_result(plan, path, started=work.started, with_quantiles=options.quantiles, warnings=warnings)
            readers = loads(replace(adapter, as_folder=plan.adapter.as_folder), family)
            results.append(replace(result, base=base, sources=sources, loads=readers))
        traced = {path: recipe for path, recipe in work.traced.items() if path in plans or path not in work.outputs}
        done = Done(source.path, (*work.skipped, *results), source.trace(traced))
    if done:
        ledger.add(done)


def planned_adapter(plan: Plan) -> Adapter:
    """The output as a reader of its header will find it."""
    unread = {key: (info, lambda: torch.empty(0)) for key, info in plan.tensors.items()}
    return adapter_of(plan.adapter.path, ComputedStore(plan.adapter.path, unread, plan.metadata, ()), plan.settings)
