"""`pack`: adapters as files of few bits per number, each dimension as exact as pictures need it."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from lorashrink._version import __version__
from lorashrink.adapters import Adapter, open_adapter
from lorashrink.errors import LorashrinkError, Progress, UsageError, boundary
from lorashrink.files.packed import CODE, PackedStore, coder
from lorashrink.linking.inputs import find_adapters
from lorashrink.packing.allocation import Allocation, Dimensions, cheapest, largest_within, prediction_for
from lorashrink.packing.draft import Draft, build_draft
from lorashrink.packing.judging import dimensions_of
from lorashrink.recipes.grammar import Recipe
from lorashrink.results.packing import Packed, PackReport
from lorashrink.results.shrinking import Failure, Removed, Verbatim
from lorashrink.shrinking.options import ResizeOptions
from lorashrink.shrinking.outputs import (
    base_files,
    check_outputs,
    clear_outputs,
    folders_of_outputs,
    name_outputs,
    source_files,
)
from lorashrink.shrinking.request import Job
from lorashrink.shrinking.reuse import OpenSource
from lorashrink.shrinking.session import Session, open_session
from lorashrink.shrinking.work import Work
from lorashrink.text import count_text

QUALITY = 40.0  # dB, where pictures are the same at a glance

# What decides -> the recipe that judges every dimension by it.
_RECIPES = {"calibration": "calib,thr=-1000", "base": "fro_ckpt,thr=-1000", "weights": "thr=-1000"}

_ATTEMPTS = 6  # to meet a size; each knows what the one before it really took
_AIM, _CLOSE_ENOUGH = 0.993, 0.985  # of the size


def pack(
    adapters: str | Path | Sequence[str | Path],
    *,
    output: str | Path,
    quality: float | None = None,
    size: int | None = None,
    base: str | Path | None = None,
    calibration: str | Path | None = None,
    recursive: bool = False,
    force: bool = False,
    device: str = "auto",
    jobs: int | None = None,
    progress: Progress | None = None,
) -> PackReport:
    """Write adapters as packed files, for keeping and sending; `unpack` makes ordinary files of them.

    output: a folder, or a file name if there is one adapter. quality: about how near pictures are to those of the
    original, PSNR in dB; default 40. size: in its place, bytes that no output exceeds. What matters to pictures is
    judged by the statistics of `calibration` if they are given, else by the weights of the base, else by ΔW alone.

    An input that fails is in `PackReport.failed`. Raises UsageError (contradicting options, the coder is not
    installed), OutputError or InputError if nothing can be done at all.
    """
    if quality is not None and size is not None:
        raise UsageError("pack: takes a quality or a size, and not both.")
    if quality is not None and not 10 <= quality <= 80:
        raise UsageError(
            f"--quality {quality:g}: is a PSNR in dB, from 10 to 80; 40 is hard to tell from the original."
        )
    if size is not None and size < 1:
        raise UsageError("--size: is at least one byte.")
    coder()
    goal = _Goal(quality or QUALITY, size)
    decided_by = "calibration" if calibration else "base" if base else "weights"
    recipe = Recipe.parse(_RECIPES[decided_by])
    sources = find_adapters(adapters, recursive=recursive)
    folders = folders_of_outputs(sources, output)
    targets = {
        source: name_outputs(source, [("packed", recipe)], folders[source], sources=len(sources)) for source in sources
    }
    inputs = [file for source in sources for file in source_files(source)]
    statistics = [Path(calibration)] if calibration else []
    check_outputs(targets, [*inputs, *base_files(base), *statistics], force=force)
    clear_outputs([path for outputs in targets.values() for path in outputs])
    options = ResizeOptions(base=base, calibration=calibration, dtype="fp16", form="lora", device=device, jobs=jobs)
    results: list[Packed] = []
    errors: dict[Path, LorashrinkError] = {}
    with open_session(Job(targets, options), progress=progress) as session:
        for source, outputs in targets.items():
            with boundary(source, partial(errors.__setitem__, source)):
                results.append(_pack_file(source, outputs, session, goal, decided_by))
        infos = session.infos
    failed = tuple(Failure(str(source), str(error)) for source, error in errors.items())
    return PackReport(__version__, "pack", next(iter(infos), None), tuple(results), failed)


@dataclass(frozen=True, slots=True)
class _Goal:
    quality: float
    size: int | None

    def __str__(self) -> str:
        return f"quality={self.quality:g}" if self.size is None else f"size={self.size}"


class TooFewBytes(UsageError):
    """No packed file of the adapter is so small."""


def pack_into(
    source: Path,
    path: Path,
    size: int,
    *,
    decided_by: str,
    base: Path | None = None,
    calibration: Path | None = None,
    device: str = "auto",
) -> Packed:
    """`pack` for one adapter and a size, over what is at the path. Raises what `pack` reports, or TooFewBytes."""
    coder()
    outputs = {path: Recipe.parse(_RECIPES[decided_by])}
    options = ResizeOptions(base=base, calibration=calibration, dtype="fp16", form="lora", device=device)
    with open_session(Job({source: outputs}, options)) as session:
        return _pack_file(source, outputs, session, _Goal(QUALITY, size), decided_by)


def _pack_file(source: Path, outputs: Mapping[Path, Recipe], session: Session, goal: _Goal, decided_by: str) -> Packed:
    started = time.perf_counter()
    (path, recipe), *_ = outputs.items()
    opened = OpenSource.open(source, session.base_of(source), session)
    work = Work.begin(replace(opened, adapter=_without_experts(opened.adapter)), outputs)
    with closing(work.adapter):
        work.decompose()
        decomposed = work.decomposed()[recipe.calibrated]
        outlined = work.outline({recipe.calibrated: decomposed}, recipe)
        dimensions = dimensions_of(decomposed, outlined, decided_by)
        build = partial(build_draft, decomposed, outlined, pool=session.pool, device=session.device, label=str(goal))
        pixels = session.statistics.pixels if session.statistics else None
        prediction = prediction_for(decided_by, dimensions.total, pixels)
        if goal.size is None:
            draft = build(cheapest(dimensions, lambda choice: prediction.psnr(choice) >= goal.quality))
        else:
            draft = _best_within(goal.size, dimensions, build, source)
        warnings = [*draft.plan.warnings, *draft.warnings()]
        draft.write(path)
        with open_adapter(path) as written:
            assert isinstance(written.store, PackedStore)
            written.store.check_code()
    planned = draft.plan
    total = sum(layer.total for layer in planned.layers)
    lost = sum(layer.loss**2 for layer in planned.layers) + draft.rounding / (planned.recipe.rescale**2)
    return Packed(
        source=str(source),
        output=str(path),
        bytes_before=sum(file.stat().st_size for file in planned.adapter.store.files),
        bytes_after=path.stat().st_size,
        bytes_unpacked=draft.unpacked,
        decided_by=decided_by,
        predicted_db=prediction.psnr(draft.allocation),
        relative_error=math.sqrt(lost / total) if total else 0.0,
        bits=8 * draft.own[CODE].nbytes / draft.numbers if draft.numbers else 0.0,
        seconds=time.perf_counter() - started,
        sha256=draft.sha256,
        layers=tuple(layer.result(planned.recipe.rescale) for layer in planned.layers),
        verbatim=tuple(Verbatim(key, reason) for key, reason in planned.verbatim.items()),
        removed=tuple(Removed(name, reason) for name, reason in planned.removed.items()),
        warnings=tuple(warnings),
    )


def _without_experts(adapter: Adapter) -> Adapter:
    """The adapter with factors of experts, whose numbers are in another order, as tensors that are copied."""
    experts = [layer for layer in adapter.layers if layer.family.name == "experts"]
    if not experts:
        return adapter
    copied = {key: "factors of experts, which are not packed" for layer in experts for key in layer.keys.values()}
    layers = tuple(layer for layer in adapter.layers if layer not in experts)
    note = f"factors of experts are copied and not packed: {count_text(len(experts), 'layer')}, first {experts[0].name}"
    return replace(adapter, layers=layers, others={**adapter.others, **copied}, notes=(*adapter.notes, note))


def _best_within(size: int, dimensions: Dimensions, build: Callable[[Allocation], Draft], source: Path) -> Draft:
    """The best file of no more than so many bytes. Raises TooFewBytes if there is none."""
    smallest = build(largest_within(dimensions, 0.0))
    if smallest.nbytes > size:
        raise TooFewBytes(f"{source}: cannot be packed into {size} bytes; the least is {smallest.nbytes}.")
    fixed = smallest.nbytes - smallest.allocation.nbytes  # bytes of what is not allocated
    best, budget = smallest, _AIM * size - fixed
    for _ in range(_ATTEMPTS):
        draft = build(largest_within(dimensions, budget))
        if draft.nbytes <= size:
            best = max(best, draft, key=lambda file: file.nbytes)
            if draft.nbytes >= _CLOSE_ENOUGH * size:
                break
        budget += (_AIM * size - draft.nbytes) * draft.allocation.nbytes / max(1.0, draft.nbytes - fixed)
    return best
