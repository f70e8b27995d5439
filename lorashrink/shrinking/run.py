"""`resize`: shrink adapters by recipes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from lorashrink._version import __version__
from lorashrink.adapters import peft
from lorashrink.errors import Progress
from lorashrink.files.disk import clear_leftovers
from lorashrink.recipes.grammar import DEFAULT
from lorashrink.results.shrinking import Report
from lorashrink.shrinking.ledger import Ledger, Targets
from lorashrink.shrinking.outputs import space_for
from lorashrink.shrinking.pipeline import run
from lorashrink.shrinking.request import How, Job, Opener, check_calibration, prepare
from lorashrink.shrinking.session import Each, Session, log, open_session
from lorashrink.shrinking.together import run_together, stack_budgets


def resize(
    adapters: str | Path | Sequence[str | Path],
    *,
    base: str | Path | None = None,
    recipes: str | Sequence[str] = DEFAULT,
    output: str | Path | None = None,
    dtype: str = "same",
    device: str = "auto",
    jobs: int | None = None,
    unmapped: str = "keep",
    form: str = "auto",
    naming: str | None = None,
    target: str | None = None,
    group_by_base: str | Path | None = None,
    calibration: str | Path | None = None,
    stack: bool = False,
    clip: float | None = None,
    fro_limit: float | None = None,
    recursive: bool = False,
    force: bool = False,
    skip_existing: bool = False,
    dry_run: bool = False,
    strict: bool = False,
    quantiles: bool = False,
    space_check: bool = True,
    each: Each | None = None,
    progress: Progress | None = None,
) -> Report:
    """Shrink adapters, each by each recipe.

    adapters: files, folders of files, globs, or weighted sums `A:0.7,B:0.5` as `merge` makes them. base: a checkpoint,
    diffusers folder or norm table; needed by recipes that name it. recipes: strings as in `lorashrink.recipe`. output:
    a folder, or a file name if there is exactly one output; default is beside the input. dtype: "same", "fp16", "bf16"
    or "fp32". unmapped: what to do with layers that change no weight of the base when a recipe needs one, "keep",
    "drop" or "error". form: what becomes of layers that are not LoRA, "lora" (all that can be are written as LoRA),
    "same" (they stay as they are) or "auto" (each is written in the smaller form). naming: "kohya", "diffusers",
    "comfy" or "peft" for other names than the input's, which needs a base. target: a program to write for, "vllm".
    group_by_base: in place of a base, a .toml or .json file, family of models -> base, of which each adapter gets its
    own. calibration: statistics that `calibrate` wrote, for recipes with `calib`. stack: `size=` is for all adapters
    together, and their dimensions compete for it; `A:0.7` is then A, whose scores are those of 0.7·ΔW. clip, fro_limit:
    `clip=` and `fro_limit=` of every recipe. strict: tensors that belong to no
    known family are an error. skip_existing: outputs of an earlier, equal run stay; in an output folder a journal is
    kept, by which they are known without reading them. space_check: more than 16 outputs are begun only if the disk
    could take them all without any shrinking.

    each: called with every result when it is ready, in any order and one at a time; the report then has results without
    their lists of layers and tensors, so that memory does not grow with them.

    An input that fails is listed in `Report.failed` and the others are done. Raises UsageError, RecipeError,
    OutputError or InputError if nothing can be done at all; that is found out before any work.
    """
    job = prepare(
        adapters,
        base=base,
        recipes=recipes,
        output=output,
        dtype=dtype,
        device=device,
        unmapped=unmapped,
        form=form,
        naming=naming,
        target=target,
        group_by_base=group_by_base,
        calibration=calibration,
        stack=stack,
        clip=clip,
        fro_limit=fro_limit,
        recursive=recursive,
        force=force,
        skip_existing=skip_existing,
        dry_run=dry_run,
        strict=strict,
        quantiles=quantiles,
        space_check=space_check,
    )
    return _carry_out(job, jobs=jobs, each=each, progress=progress)


def shrink(
    targets: Targets,
    opener: Opener,
    *,
    base: str | Path | None = None,
    dtype: str = "same",
    device: str = "auto",
    jobs: int | None = None,
    unmapped: str = "keep",
    form: str = "auto",
    reader: str = "",
    skip_existing: bool = False,
    dry_run: bool = False,
    quantiles: bool = False,
    lenient: bool = False,
    options: str = "",
    calibration: str | Path | None = None,
    progress: Progress | None = None,
) -> Report:
    """Shrink what `opener` makes of each source, to each of its outputs, source -> output -> recipe.

    lenient: recipes that keep nothing of a file, or cannot reach their size, are left out of its results where another
    recipe can be carried out; otherwise they fail the file.
    The other arguments are those of `resize`; `reader` names a program that reads nothing but factors, and `options`
    tells whatever else decides what is written.
    """
    check_calibration([recipe for outputs in targets.values() for recipe in outputs.values()], calibration)
    how = How(
        opener=opener,
        base=base,
        calibration=calibration,
        dtype=dtype,
        device=device,
        unmapped=unmapped,
        form=form,
        reader=reader,
        skip_existing=skip_existing,
        dry_run=dry_run,
        quantiles=quantiles,
        lenient=lenient,
        options=options,
    )
    return _carry_out(Job(targets, how), jobs=jobs, each=None, progress=progress)


def _carry_out(job: Job, *, jobs: int | None, each: Each | None, progress: Progress | None) -> Report:
    with (
        open_session(job.how, jobs=jobs, progress=progress) as session,
        Ledger(job.targets, journal=job.journal, each=each, progress=progress) as ledger,
    ):
        clear(job)
        if job.weights:
            run_together(job, session, ledger)
        else:
            run(job.targets, session, ledger)
        return report(job, session, ledger)


def clear(job: Job) -> None:
    """Delete what a killed run left behind beside the outputs."""
    if not job.how.dry_run:
        outputs = [path for each in job.targets.values() for path in each]
        configs = [path.parent / peft.CONFIG_FILE for path in outputs if path.name == peft.WEIGHTS_FILE]
        for path in clear_leftovers([*outputs, *configs]):
            log.info("%s: deleted, left behind by a process that was killed", path)


def report(job: Job, session: Session, ledger: Ledger) -> Report:
    """The outcome of all targets."""
    results, failed = ledger.results()
    infos = session.infos
    sizes = {Path(each.output): each.bytes_after for each in results if not each.skipped}
    return Report(
        __version__,
        next(iter(infos), None) if not job.how.bases else None,
        results,
        failed,
        bases=infos if job.how.bases else (),
        space=space_for(sizes) if job.how.dry_run else None,
        stacks=stack_budgets(job, results),
    )
