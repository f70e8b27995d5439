"""The pipeline of a run: decompose one adapter while the one before it is planned and written."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

from torch import Tensor

from lorashrink.adapters import Adapter, Layer
from lorashrink.bases import Views
from lorashrink.bases.norms import Norms
from lorashrink.calibration.statistics import OfLayer
from lorashrink.engine.delta import AnyDelta
from lorashrink.engine.spectrum import Item, PendingSpectrum, Spectrum, decompose
from lorashrink.errors import InputError, LorashrinkError, RecipeError
from lorashrink.linking.matching import bind, match, part
from lorashrink.recipes.grammar import Recipe
from lorashrink.results.shrinking import Failure, FileResult
from lorashrink.shrinking.decomposed import Decomposed, aligned
from lorashrink.shrinking.journal import Stamp, stamps
from lorashrink.shrinking.ledger import Done, Ledger, Targets
from lorashrink.shrinking.plan import Outline, Plan, outline, plan, result
from lorashrink.shrinking.reuse import Identity, adapter_files, existing_result, own_base, recorded_results
from lorashrink.shrinking.session import BaseContext, Session, log
from lorashrink.shrinking.write import write
from lorashrink.sums.summing import sources_of

# On a GPU small files are decomposed together until this many layers fill a batch.
_CUDA_WAVE_LAYERS = 4096

_IN_FLIGHT = 2  # waves whose spectra are in memory: one is decomposed while another is written

# --- the pipeline -------------------------------------------------------------------------------


@dataclass(eq=False)
class _Work:
    """One adapter on its way through the pipeline."""

    source: Path
    targets: Mapping[Path, Recipe]
    adapter: Adapter
    views: Sequence[Views]
    against: BaseContext
    identity: Identity
    statistics: Sequence[OfLayer | None] = ()  # per layer, of calibrated recipes
    started: float = 0.0
    stamps: tuple[Stamp, ...] = ()
    there: tuple[FileResult, ...] = ()  # results of outputs that are not made again
    traced: Mapping[Path, Recipe] = field(default_factory=dict)  # outputs of which the journal is to know
    spectra: Mapping[bool, Sequence[PendingSpectrum]] = field(default_factory=dict)  # calibrated or not -> per layer


def run(targets: Targets, session: Session, ledger: Ledger) -> None:
    """Decompose one wave of files while the one before it is written; the ledger gets what becomes of each."""
    in_flight: list[Future[None]] = []
    with ThreadPoolExecutor(1, "lorashrink-files") as finisher:
        try:
            for wave in _waves(targets, session, ledger):
                while len(in_flight) >= _IN_FLIGHT:
                    in_flight.pop(0).result()
                items = [decomposition_items(work) for work in wave]
                flat = [item for kinds in items for each in kinds.values() for item in each]
                futures = iter(decompose(flat, session.pool, device=session.device))
                for work, kinds in zip(wave, items, strict=True):
                    work.spectra = {kind: [next(futures) for _ in each] for kind, each in kinds.items()}
                in_flight += [finisher.submit(_finish, work, session, ledger) for work in wave]
            for future in in_flight:
                future.result()
        except BaseException:
            session.pool.shutdown(wait=False, cancel_futures=True)
            finisher.shutdown(wait=True, cancel_futures=True)
            raise


def decomposition_items(work: _Work) -> dict[bool, list[Item]]:
    """What is decomposed of an adapter: its layers as they are, calibrated, or both."""
    limit = _limit(work)
    kinds = {recipe.calibrated for recipe in work.targets.values()}
    return {
        kind: [
            Item(partial(_read, layer), layer.width, work.statistics[index] if kind else None, limit)
            for index, layer in enumerate(work.adapter.layers)
        ]
        for kind in sorted(kinds)
    }


def _read(layer: Layer) -> AnyDelta:
    return layer.delta


def _limit(work: _Work) -> int | None:
    """How many of the first dimensions any recipe can keep of a layer, None if it may be all.

    Recipes that look at the base's weight keep others than the first ones.
    """
    limits = [None if "weight" in recipe.needs else recipe.limit for recipe in work.targets.values()]
    known = [limit for limit in limits if limit is not None]
    return max(known) if len(known) == len(limits) else None


def _waves(targets: Targets, session: Session, ledger: Ledger) -> Iterator[list[_Work]]:
    """Open adapters in waves that are decomposed together; the ledger gets those that fail or are done already."""
    enough = _CUDA_WAVE_LAYERS if session.device.startswith("cuda") else 1
    wave: list[_Work] = []
    for source, outputs in targets.items():
        try:
            work = _begin(source, outputs, session, ledger)
        except LorashrinkError as error:
            ledger.add(Done(source, Failure(str(source), str(error))))
            continue
        if work:
            wave.append(work)
        if sum(len(each.adapter) for each in wave) >= enough:
            yield wave
            wave = []
    if wave:
        yield wave


def _begin(source: Path, outputs: Mapping[Path, Recipe], session: Session, ledger: Ledger) -> _Work | None:
    started = time.perf_counter()
    against = session.against(source)
    there: dict[Path, FileResult] = {}
    if session.how.skip_existing:
        there = recorded_results(source, outputs, against, session, ledger)
        if len(there) == len(outputs):
            ledger.add(Done(source, tuple(there.values())))
            return None
    adapter = session.how.opener(source, against.base)
    try:
        before = stamps(adapter_files(adapter))
        identity = Identity.of(source, adapter, against, session)
        traced = {path: recipe for path, recipe in outputs.items() if path not in there}
        if session.how.skip_existing:
            for path, recipe in traced.items():
                if os.path.exists(path):
                    there[path] = existing_result(path, source, adapter, recipe, identity, own_base(against, session))
        rest = {path: recipe for path, recipe in outputs.items() if path not in there}
        if not rest:
            adapter.close()
            ledger.add(Done(source, tuple(there.values()), identity.trace(traced, before)))
            return None
        ledger.start(source, rest)
        work = prepared_work(source, rest, adapter, against, identity, session)
        return replace(work, started=started, stamps=before, there=tuple(there.values()), traced=traced)
    except BaseException:
        adapter.close()
        raise


def prepared_work(
    source: Path,
    outputs: Mapping[Path, Recipe],
    adapter: Adapter,
    against: BaseContext,
    identity: Identity,
    session: Session,
) -> _Work:
    """An open adapter with all that its recipes need, but for its spectra."""
    views = match(adapter, against.base) if against.base else [()] * len(adapter)
    adapter, views = part(bind(adapter, views, against.base), views, session.how.form)
    calibrated = any(recipe.calibrated for recipe in outputs.values())
    statistics = session.statistics.of_layers(adapter) if session.statistics and calibrated else ()
    return _Work(source, outputs, adapter, views, against, identity, statistics)


def _finish(work: _Work, session: Session, ledger: Ledger) -> None:
    """Select, write and report one adapter whose layers are being decomposed."""
    try:
        done = _written(work, session)
    except Exception as error:
        done = failure_of(work.source, error)
    finally:
        work.adapter.close()
    ledger.add(done)


def failure_of(source: Path, error: Exception) -> Done:
    if isinstance(error, LorashrinkError):
        return Done(source, Failure(str(source), str(error)))
    log.debug("%s", source, exc_info=error)
    return Done(source, Failure(str(source), f"{source}: unexpected {type(error).__name__}: {error}"))


def _written(work: _Work, session: Session) -> Done:
    plans = _plans(work, session)
    if not session.how.dry_run:
        report = session.reporter(f"writing {work.source.name}")
        write(plans, pool=session.pool, device=session.device, progress=report)
    results = [
        result(each, path, started=work.started, quantiles=session.how.quantiles) for path, each in plans.items()
    ]
    if sources := sources_of(work.adapter):
        results = [replace(each, sources=sources) for each in results]
    results = [replace(each, base=own_base(work.against, session)) for each in results]
    made = {path: recipe for path, recipe in work.traced.items() if path in plans or path not in work.targets}
    return Done(work.source, (*work.there, *results), work.identity.trace(made, work.stamps))


def wait_for_spectra(work: _Work, session: Session) -> dict[bool, Decomposed]:
    """The adapter with what its recipes ask, calibrated or not; waits for its spectra."""
    report = session.reporter(f"decomposing {work.source.name}")
    pending = [(kind, future) for kind, each in work.spectra.items() for future in each]
    spectra: dict[bool, list[Spectrum]] = {kind: [] for kind in work.spectra}
    for count, (kind, future) in enumerate(pending, 1):
        spectra[kind].append(future.result())
        if report and (count % 16 == 0 or count == len(pending)):
            report(count, len(pending))
    recipes = list(work.targets.values())
    norms: Norms = {}
    if work.against.norms:
        names = {"fro"}.union(*(recipe.base_norms for recipe in recipes))
        found = [views for views in work.views if views]
        told = session.reporter("norms of the base")
        norms = work.against.norms.look_up(found, names, pool=session.pool, progress=told)
    alignments: list[Tensor | None] = [None] * len(work.adapter)
    if work.against.base and any("weight" in recipe.needs for recipe in recipes):
        measure = partial(aligned, work.adapter, work.views, spectra[False], work.against.base)
        alignments = list(session.pool.map(measure, range(len(alignments))))
    known = [each is not None for each in work.statistics]
    return {
        kind: Decomposed(work.adapter, work.views, each, norms, alignments, known if kind else ())
        for kind, each in spectra.items()
    }


def outline_for(work: _Work, decomposed: Mapping[bool, Decomposed], recipe: Recipe, session: Session) -> Outline:
    how, origin = session.how, work.identity.origin(recipe)
    kind = decomposed[recipe.calibrated]
    return outline(kind, recipe, dtype=how.dtype, unmapped=how.unmapped, form=how.form, origin=origin)


def _plans(work: _Work, session: Session) -> dict[Path, Plan]:
    decomposed = wait_for_spectra(work, session)
    plans: dict[Path, Plan] = {}
    refused: list[RecipeError] = []
    for path, recipe in work.targets.items():
        try:
            outlined = outline_for(work, decomposed, recipe, session)
            plans[path] = plan(decomposed[recipe.calibrated], outlined, session.selections.get(path))
        except RecipeError as error:
            refused.append(error)
    if refused and not (session.how.lenient and plans):
        raise refused[0]
    stays = next((item for each in plans.values() for item in each.verbatim.items()), None)
    if session.how.reader and stays:
        raise InputError(
            f"{work.source}: {stays[0]} stays as it is ({stays[1]}), and {session.how.reader} cannot load it."
        )
    return plans
