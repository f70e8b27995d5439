"""`resize`: shrink adapters by recipes.

request -> session -> pipeline (or stack) -> ledger -> report
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, Unpack

from lorashrink._version import __version__
from lorashrink.adapters import in_memory
from lorashrink.errors import Progress
from lorashrink.results.shrinking import Report
from lorashrink.shrinking.in_memory import resize_in_memory
from lorashrink.shrinking.ledger import Ledger, OnResult, Targets
from lorashrink.shrinking.options import ResizeKeywords, ResizeOptions
from lorashrink.shrinking.outputs import clear_outputs, space_for
from lorashrink.shrinking.pipeline import shrink_each
from lorashrink.shrinking.request import Job, Opener, check_calibration, open_source, prepare
from lorashrink.shrinking.session import Session, open_session
from lorashrink.shrinking.together import shrink_together, stack_budgets


def resize(
    adapters: Any,
    *,
    each: OnResult | None = None,
    progress: Progress | None = None,
    **options: Unpack[ResizeKeywords],
) -> Report:
    """Shrink adapters, each by each recipe.

    adapters: files, folders of files, globs, or weighted sums `A:0.7,B:0.5` as `merge` makes them; or one adapter in
        memory, see below.

    What goes in:
        base: a checkpoint, diffusers folder or norm table, the tensors of a model by their names, or what `open_base`
            returns; needed by recipes that name it. Default None.
        group_by_base: in place of a base, a .toml or .json file, family of models -> base, of which each adapter gets
            its own.
        calibration: statistics that `calibrate` wrote, for recipes with `calib`.
        anchor: the decibels from which quality is predicted, where pictures corrected them; see
            `lorashrink.recipes.quality`.
        recursive: adapters in subfolders too. Default False.
        strict: tensors that belong to no known family are an error. Default False.
    What is kept:
        recipes: strings, or `Recipe` objects. Default "fro_ckpt=1,thr=-3.55", without a base "energy=0.99".
        stack: `size=` is for all adapters together, and their dimensions compete for it; `A:0.7` is then A, whose
            scores are those of 0.7·ΔW. Default False.
        clip, fro_limit: `clip=` and `fro_limit=` of every recipe.
        unmapped: layers that change no weight of the base when a recipe needs one: "keep" (default), "drop" or "error".
    What is written:
        output: a folder, or a file name if there is exactly one output; default is beside the input.
        dtype: "same" (default), "fp8", "fp16", "bf16" or "fp32"; "mixed" is fp8 or fp16 layer by layer, by what a byte
            is worth. "auto" is fp8 as far as its rounding does not show, mixed above, and fp16 under names that a
            program would load, but not in fp8. `quality=` takes "mixed" in place of "same".
        form: what becomes of layers that are not LoRA: "lora" (all that can be are written as LoRA), "same" (they stay
            as they are) or "auto" (default; each is written in the smaller form).
        naming: "kohya", "diffusers", "comfy" or "peft" for other names than the input's, which needs a base.
        target: a program to write for, "vllm".
        force: replace files that exist. Default False.
        skip_existing: outputs of an earlier, equal run stay; in an output folder a journal is kept, by which they are
            known without reading them. One that is damaged is made again. Default False.
        verify: with skip_existing outputs are read, and made again where they are not what the hash in their header
            says. Default False.
        dry_run: report what would be written, and write nothing. Default False.
        space_check: more than 16 outputs are begun only if the disk could take them all without any shrinking.
            Default True.
    How:
        device: "auto" (default: a GPU where it pays to start one), "cpu", "cuda", "cuda:N" or "mps".
        jobs: worker threads; default one per core.
        quantiles: quantiles of the scores in the results, to choose thresholds by. Default False.
        each: called with every result when it is ready, in any order and one at a time; the report then has results
            without their lists of layers and tensors, so that memory does not grow with them.
        progress: called with (what is being done, steps done, steps in all).

    In memory: a mapping of names to tensors, `lorashrink.Tensors`, a PeftModel, or a diffusers pipeline with one active
    adapter. No file is written: `Report.state_dict` has the tensors, and in a PeftModel or pipeline the shrunk adapter
    takes the place of the old one. Options that are about files are errors, and so is a failure.

    An input that fails is listed in `Report.failed` and the others are done. Raises UsageError, RecipeError,
    OutputError or InputError if nothing can be done at all, such as with one file that does not exist; that is found
    out before any work.
    """
    held = in_memory(adapters)
    if held is not None:
        return resize_in_memory(held, options, on_result=each, progress=progress)
    job = prepare(adapters, ResizeOptions(**options))
    return _carry_out(job, on_result=each, progress=progress)


def shrink(
    targets: Targets,
    options: ResizeOptions,
    *,
    opener: Opener = open_source,
    lenient: bool = False,
    variant: str = "",
    most_share: float = math.inf,
    on_result: OnResult | None = None,
    progress: Progress | None = None,
) -> Report:
    """Shrink what `opener` makes of each source, to each of its outputs, source -> output -> recipe.

    options: of these only those that say how one file is shrunk; `targets` stand for the others. lenient: recipes that
    keep nothing of a file, or cannot reach their size, are left out of its results where another recipe can be carried
    out; otherwise they fail the file. variant: names whatever else decides what is written.
    most_share: a result whose file would be larger than this share of its input is reported and not written. on_result:
    as `each` of `resize`.
    """
    check_calibration([recipe for outputs in targets.values() for recipe in outputs.values()], options.calibration)
    job = Job(targets, options, opener=opener, lenient=lenient, variant=variant, most_share=most_share)
    return _carry_out(job, on_result=on_result, progress=progress)


def _carry_out(job: Job, *, on_result: OnResult | None, progress: Progress | None) -> Report:
    with (
        open_session(job, progress=progress) as session,
        Ledger(job.targets, journal=job.journal, on_result=on_result, progress=progress) as ledger,
    ):
        clear(job)
        if job.weights:
            shrink_together(session, ledger)
        else:
            shrink_each(job.targets, session, ledger)
        return report(job, session, ledger)


def clear(job: Job) -> None:
    """Delete what a killed run left behind beside the outputs."""
    if not job.options.dry_run:
        clear_outputs([path for targets in job.targets.values() for path in targets])


def report(job: Job, session: Session, ledger: Ledger) -> Report:
    """The outcome of all targets."""
    results, failed = ledger.results()
    infos = session.infos
    sizes = {Path(result.output): result.bytes_after for result in results if not result.skipped}
    return Report(
        __version__,
        None if job.bases else next(iter(infos), None),
        results,
        failed,
        bases=infos if job.bases else (),
        space=space_for(sizes) if job.options.dry_run else None,
        stacks=stack_budgets(job, results),
    )
