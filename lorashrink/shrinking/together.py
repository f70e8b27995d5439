"""Several adapters under one byte budget (`--stack`)."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from functools import partial
from pathlib import Path

from lorashrink.errors import LorashrinkError, OutputError, boundary
from lorashrink.recipes.choice import Member, Selection, select_together
from lorashrink.results.shrinking import FileResult, StackBudget
from lorashrink.shrinking.ledger import Done, Ledger, Targets
from lorashrink.shrinking.pipeline import shrink_each
from lorashrink.shrinking.plan import Outline
from lorashrink.shrinking.request import Job
from lorashrink.shrinking.reuse import OpenSource, existing_results, source_variant
from lorashrink.shrinking.session import Session
from lorashrink.shrinking.work import Work
from lorashrink.sums.summing import contents_sha256


def stack_budgets(job: Job, results: Sequence[FileResult]) -> tuple[StackBudget, ...]:
    """Per recipe its budget and the bytes used; () if the job is no stack."""
    recipes = next(iter(job.targets.values())).values() if job.weights else ()
    budgets = []
    for recipe in recipes:
        members = [result for result in results if result.recipe == str(recipe)]
        threshold = members[0].threshold if members else None
        size = sum(result.bytes_after for result in members)
        budgets.append(StackBudget(str(recipe), len(members), int(recipe.value * 2**20), size, threshold))
    return tuple(budgets)


def shrink_together(session: Session, ledger: Ledger) -> None:
    """Shrink adapters whose dimensions compete: each adapter is read for its scores, and again to be written.

    An adapter that cannot be used is a failure, and the others share the budget. Raises RecipeError if they cannot
    reach it, and OutputError if existing outputs were made from another stack.
    """
    job = replace(session.job, variant=f"{session.job.variant},stack={_stack_id(session)}")
    session = replace(session, job=job)
    if session.options.skip_existing and (existing := _all_existing(job.targets, session, ledger)):
        for done in existing:
            ledger.add(done)
        return
    outlines = open_outlines(session, ledger)
    selections = select_by_recipe(outlines, job.weights)
    targets = {source: job.targets[source] for source in outlines}
    shrink_each(targets, replace(session, selections=selections), ledger)


def open_outlines(session: Session, ledger: Ledger) -> dict[Path, dict[Path, Outline]]:
    """Source -> output -> what its recipe can choose from; the ledger gets the sources that fail.

    One adapter is read after another, and its factors are forgotten.
    """
    outlines: dict[Path, dict[Path, Outline]] = {}
    targets = session.job.targets
    report = session.reporter("scores")
    for count, (source, outputs) in enumerate(targets.items()):
        if report:
            report(count, len(targets))
        with (
            boundary(source, partial(ledger.fail, source)),
            closing(OpenSource.open(source, session.base_of(source), session)) as opened,
        ):
            work = Work.begin(opened, outputs)
            work.decompose()
            decomposed = work.decomposed()
            outlines[source] = {path: work.outline(decomposed, recipe) for path, recipe in outputs.items()}
    if report:
        report(len(targets), len(targets))
    return outlines


def select_by_recipe(
    outlines: Mapping[Path, Mapping[Path, Outline]], weights: Mapping[Path, float]
) -> dict[Path, Selection]:
    """Output -> what is kept of it, chosen for all sources together, recipe by recipe."""
    selections: dict[Path, Selection] = {}
    for of_recipe in zip(*(outputs.items() for outputs in outlines.values()), strict=True):
        members = [
            Member(outline.facts, outline.size, weights[source])
            for source, (_, outline) in zip(outlines, of_recipe, strict=True)
        ]
        chosen = select_together(of_recipe[0][1].recipe, members)
        selections |= {path: selection for (path, _), selection in zip(of_recipe, chosen, strict=True)}
    return selections


def _stack_id(session: Session) -> str:
    """A text for the number, contents and weights of the adapters, in any order."""
    members = []
    for source, weight in session.job.weights.items():
        contents = "unusable"  # which the run itself reports
        with (
            boundary(source, lambda _: None),
            session.job.opener(source, session.base_of(source).base) as adapter,
        ):
            contents = contents_sha256(adapter)
        members.append(f"{contents} {source_variant(source, session)} {weight!r}")
    digest = hashlib.sha256("\n".join(sorted(members)).encode()).hexdigest()
    return f"{len(members)} of {digest[:16]}"


def _all_existing(targets: Targets, session: Session, ledger: Ledger) -> list[Done]:
    """Results of all outputs, [] if one is missing. Raises OutputError if one was made from another stack."""
    existing = []
    for source, outputs in targets.items():
        try:
            done = existing_results(source, outputs, session, ledger)
        except OutputError as error:
            raise OutputError(f"{error} All LoRAs of a stack are shrunk together, so that this stops all.") from error
        except LorashrinkError:
            done = None
        if done and len(done.results) == len(outputs):
            existing.append(done)
    return existing if len(existing) == len(targets) else []
