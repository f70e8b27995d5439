"""Several adapters under one byte budget (`--stack`)."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from lorashrink.engine.spectrum import decompose
from lorashrink.errors import LorashrinkError, OutputError
from lorashrink.recipes.choice import Member, Selection, select_together
from lorashrink.recipes.grammar import Recipe
from lorashrink.results.shrinking import FileResult, StackBudget
from lorashrink.shrinking.ledger import Done, Ledger, Targets
from lorashrink.shrinking.pipeline import (
    decomposition_items,
    failure_of,
    outline_for,
    prepared_work,
    run,
    wait_for_spectra,
)
from lorashrink.shrinking.plan import Outline
from lorashrink.shrinking.request import Job
from lorashrink.shrinking.reuse import Identity, already_there, options_text
from lorashrink.shrinking.session import Session
from lorashrink.sums.summing import contents_sha256


def stack_budgets(job: Job, results: Sequence[FileResult]) -> tuple[StackBudget, ...]:
    recipes = next(iter(job.targets.values())).values() if job.weights else ()
    found = []
    for recipe in recipes:
        made = [each for each in results if each.recipe == str(recipe)]
        threshold = next((each.threshold for each in made), None)
        size = sum(each.bytes_after for each in made)
        found.append(StackBudget(str(recipe), len(made), int(recipe.value * 2**20), size, threshold))
    return tuple(found)


# --- several adapters under one budget ----------------------------------------------------------


def run_together(job: Job, session: Session, ledger: Ledger) -> None:
    """Shrink adapters whose dimensions compete: each is read for its scores, and again to be written.

    One that cannot be used has no part in the budget. Raises RecipeError if the rest of them cannot reach it, and
    OutputError if outputs that are to stay were made from another stack.
    """
    how = replace(job.how, options=f"{job.how.options},stack={_stack_id(job, session)}")
    session = replace(session, how=how)
    if how.skip_existing and (there := _all_there(job.targets, session, ledger)):
        for done in there:
            ledger.add(done)
        return
    found: dict[Path, dict[Path, Outline]] = {}
    for count, (source, outputs) in enumerate(job.targets.items()):
        if session.progress:
            session.progress("scores", count, len(job.targets))
        try:
            found[source] = _outlines(source, outputs, session)
        except Exception as error:
            ledger.add(failure_of(source, error))
    if session.progress:
        session.progress("scores", len(job.targets), len(job.targets))
    selections: dict[Path, Selection] = {}
    for outlines in zip(*(each.items() for each in found.values()), strict=True):  # of one recipe
        members = [
            Member(each.facts, each.layout.size, job.weights[source])
            for source, (_, each) in zip(found, outlines, strict=True)
        ]
        chosen = select_together(outlines[0][1].recipe, members)
        selections |= {path: selection for (path, _), selection in zip(outlines, chosen, strict=True)}
    run({source: job.targets[source] for source in found}, replace(session, selections=selections), ledger)


def _stack_id(job: Job, session: Session) -> str:
    """How many adapters, and what their contents and weights are, in whatever order."""
    members = []
    for source, weight in job.weights.items():
        try:
            with session.how.opener(source, session.against(source).base) as adapter:
                contents = contents_sha256(adapter)
        except LorashrinkError:
            contents = "unusable"
        members.append(f"{contents} {options_text(source, session)} {weight!r}")
    digest = hashlib.sha256("\n".join(sorted(members)).encode()).hexdigest()
    return f"{len(members)} of {digest[:16]}"


def _all_there(targets: Targets, session: Session, ledger: Ledger) -> list[Done]:
    """What is known of all outputs, [] if one of them is to be made. Raises OutputError if one is of another stack."""
    found = []
    for source, outputs in targets.items():
        try:
            there = already_there(source, outputs, session, ledger)
        except OutputError as error:
            raise OutputError(f"{error} What becomes of an adapter in a stack depends on all of them.") from error
        except LorashrinkError:
            there = None
        if there and len(there.results) == len(outputs):
            found.append(there)
    return found if len(found) == len(targets) else []


def _outlines(source: Path, outputs: Mapping[Path, Recipe], session: Session) -> dict[Path, Outline]:
    """What the recipes can choose from in one adapter; its factors are read and forgotten."""
    against = session.against(source)
    with session.how.opener(source, against.base) as adapter:
        identity = Identity.of(source, adapter, against, session)
        work = prepared_work(source, outputs, adapter, against, identity, session)
        items = decomposition_items(work)
        flat = [item for kind in items.values() for item in kind]
        futures = iter(decompose(flat, session.pool, device=session.device))
        work.spectra = {kind: [next(futures) for _ in each] for kind, each in items.items()}
        decomposed = wait_for_spectra(work, session)
        return {path: outline_for(work, decomposed, recipe, session) for path, recipe in outputs.items()}
