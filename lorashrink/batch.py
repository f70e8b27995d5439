"""Many adapters in one call: find them, check the outputs, and keep reading, computing and writing going."""

from __future__ import annotations

import contextlib
import json
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from torch import Tensor

from lorashrink._version import __version__
from lorashrink.adapters import UNKNOWN, Adapter, Layer, open_adapter, peft
from lorashrink.base_norms import BaseNorms, Norms
from lorashrink.bases import Base, Views, open_base
from lorashrink.delta import AnyDelta
from lorashrink.errors import InputError, LorashrinkError, OutputError, RecipeError, UsageError
from lorashrink.files import OUTPUT_DTYPES, read_header, sha256_file
from lorashrink.inputs import find_adapters
from lorashrink.machine import pick_device, worker_pool
from lorashrink.matching import FORMS, bind, match, part
from lorashrink.metadata import Origin
from lorashrink.outputs import base_files, check_outputs, name_outputs, shown
from lorashrink.planning import (
    UNMAPPED,
    Decomposed,
    Plan,
    aligned,
    plan,
    result,
)
from lorashrink.recipe import DEFAULT, Recipe, parse_recipes
from lorashrink.renaming import check_naming, renamed
from lorashrink.results import Failure, FileResult, Report
from lorashrink.spectrum import Item, Spectrum, decompose
from lorashrink.targets import TARGETS, Target, with_items
from lorashrink.writing import write

log = logging.getLogger(__name__)

# (what is being done, steps done, steps in all)
Progress = Callable[[str, int, int], None]

# On a GPU small files are decomposed together until this many layers fill a batch.
_CUDA_WAVE_LAYERS = 4096
_IN_FLIGHT = 2  # waves whose spectra are in memory: one is decomposed while another is written


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
    recursive: bool = False,
    force: bool = False,
    skip_existing: bool = False,
    dry_run: bool = False,
    strict: bool = False,
    quantiles: bool = False,
    progress: Progress | None = None,
) -> Report:
    """Shrink adapters, each by each recipe.

    adapters: files, folders of files, or globs. base: a checkpoint, diffusers folder or norm table; needed by
    recipes that name it. recipes: strings as in `lorashrink.recipe`. output: a folder, or a file name if there
    is exactly one output; default is beside the input. dtype: "same", "fp16", "bf16" or "fp32". unmapped: what to
    do with layers that change no weight of the base when a recipe needs one, "keep", "drop" or "error". form: what
    becomes of layers that are not LoRA, "lora" (all that can be are written as LoRA), "same" (they stay as they are) or
    "auto" (each is written in the smaller form). naming: "kohya", "diffusers", "comfy" or "peft" for other names than
    the input's, which needs a base. target: a program to write for, "vllm". strict:
    tensors that belong to no known family are an error.

    An input that fails is listed in `Report.failed` and the others are done. Raises UsageError, RecipeError,
    OutputError or InputError if nothing can be done at all; that is found out before any work.
    """
    if target not in (None, *TARGETS):
        raise UsageError(f"target: '{target}' is not one of {', '.join(TARGETS)}.")
    reader = TARGETS[target] if target else None
    texts = [text for each in ([recipes] if isinstance(recipes, str) else recipes) for text in each.split(":")]
    wanted = parse_recipes([with_items(text, reader) for text in texts] if reader else texts)
    check_naming(naming, base)
    sources = find_adapters([adapters] if isinstance(adapters, (str, Path)) else adapters, recursive=recursive)
    targets = {
        source: name_outputs(
            source,
            [(recipe.file_items(), recipe) for recipe in wanted],
            output,
            sources=len(sources),
            folder=peft.is_folder(source) if naming is None else naming == "peft",
        )
        for source in sources
    }
    hint = "--force to replace it or --skip-existing to keep it"
    inputs = [*sources, *base_files(base)]
    check_outputs(targets, inputs, force=force or skip_existing or dry_run, hint=hint)
    check_needs(wanted, base, sources[0])
    return shrink(
        targets,
        partial(_open, naming=naming, target=reader, strict=strict),
        base=base,
        dtype=dtype,
        device=device,
        jobs=jobs,
        unmapped=unmapped,
        form="lora" if reader else form,
        reader=reader.title if reader else "",
        skip_existing=skip_existing,
        dry_run=dry_run,
        quantiles=quantiles,
        options=(f",naming={naming}" if naming else "") + (f",target={target}" if target else ""),
        progress=progress,
    )


def check_needs(recipes: Sequence[Recipe], base: str | Path | None, source: Path) -> None:
    """That recipes which need a base have one.

    Raises:
        RecipeError: one has none.
        InputError: the first adapter cannot be read, and may be the base that was meant.
    """
    for recipe in recipes:
        if recipe.needs_base and base is None:
            # A base that is missing or damaged was taken for an adapter, and its own error says more.
            open_adapter(source).close()
            raise RecipeError(f"recipe '{recipe}' needs the base checkpoint; give it first or with --base.")


def _open(source: Path, base: Base | None, *, naming: str | None, target: Target | None, strict: bool) -> Adapter:
    adapter = open_adapter(source)
    try:
        unknown = [key for key, reason in adapter.others.items() if reason == UNKNOWN]
        if strict and unknown:
            raise InputError(
                f"{source}: {len(unknown)} tensors belong to no known family, first {unknown[0]}. "
                "Without --strict they are copied as they are."
            )
        adapter = renamed(adapter, naming, base).adapter if naming and base else adapter
        return target.fit(adapter) if target else adapter
    except BaseException:
        adapter.close()
        raise


def shrink(
    targets: Mapping[Path, Mapping[Path, Recipe]],
    opener: Callable[[Path, Base | None], Adapter],
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
    progress: Progress | None = None,
) -> Report:
    """Shrink what `opener` makes of each source, to each of its outputs, source -> output -> recipe.

    lenient: recipes that keep nothing of a file, or cannot reach their size, are left out of its results where another
    recipe can be carried out; otherwise they fail the file.
    The other arguments are those of `resize`; `reader` names a program that reads nothing but factors, and `options`
    tells whatever else decides what is written.
    """
    for option, value, allowed in (
        ("dtype", dtype, tuple(OUTPUT_DTYPES)),
        ("unmapped", unmapped, UNMAPPED),
        ("as", form, FORMS),
    ):
        if value not in allowed:
            raise UsageError(f"{option}: '{value}' is not one of {', '.join(allowed)}.")
    for recipe in {recipe for outputs in targets.values() for recipe in outputs.values()}:
        if "calibration" in recipe.needs:
            raise RecipeError(f"recipe '{recipe}' needs calibration statistics, which this version cannot read.")
    device = pick_device(device)
    with contextlib.ExitStack() as stack:
        opened_base = stack.enter_context(open_base(base)) if base is not None else None
        settings = _Settings(
            opener=opener,
            base=opened_base,
            norms=BaseNorms(opened_base) if opened_base else None,
            dtype={"16": "fp16", "32": "fp32"}.get(dtype, dtype),
            device=device,
            unmapped=unmapped,
            form=form,
            reader=reader,
            dry_run=dry_run,
            quantiles=quantiles,
            lenient=lenient,
            skip_existing=skip_existing,
            options=options,
            pool=stack.enter_context(worker_pool(jobs)),
            progress=progress,
            files=len(targets),
        )
        results, failed = _run(targets, settings)
    return Report(__version__, opened_base.info if opened_base else None, tuple(results), tuple(failed))


# --- the pipeline -------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Settings:
    opener: Callable[[Path, Base | None], Adapter]
    base: Base | None
    norms: BaseNorms | None
    dtype: str
    device: str
    unmapped: str
    form: str
    reader: str
    dry_run: bool
    quantiles: bool
    lenient: bool
    skip_existing: bool
    options: str
    pool: Executor
    progress: Progress | None
    files: int

    def count(self, done: int) -> None:
        """Report how many files are done or failed, if there are several."""
        if self.progress and self.files > 1:
            self.progress("files", done, self.files)

    def report(self, text: str) -> Callable[[int, int], None] | None:
        progress = self.progress
        return None if progress is None else lambda done, total: progress(text, done, total)


@dataclass(eq=False)
class _Work:
    """One adapter on its way through the pipeline."""

    source: Path
    targets: Mapping[Path, Recipe]
    started: float
    adapter: Adapter
    views: Sequence[Views]
    source_hash: Future[str]
    depends_on_base: bool
    spectra: Sequence[Future[Spectrum]] = ()


def _run(targets: Mapping[Path, Mapping[Path, Recipe]], settings: _Settings) -> tuple[list[FileResult], list[Failure]]:
    """Decompose one wave of files while the one before it is written. Results keep the order of the inputs."""
    outcomes: dict[Path, list[FileResult] | Failure] = {}
    in_flight: list[Future[None]] = []
    with ThreadPoolExecutor(1, "lorashrink-files") as finisher:
        try:
            for wave in _waves(targets, settings, outcomes):
                while len(in_flight) >= _IN_FLIGHT:
                    in_flight.pop(0).result()
                layers = [(work, layer) for work in wave for layer in work.adapter.layers]
                items = [Item(partial(_read, layer), layer.width, limit=_limit(work)) for work, layer in layers]
                futures = iter(decompose(items, device=settings.device, pool=settings.pool))
                for work in wave:
                    work.spectra = [next(futures) for _ in work.adapter.layers]
                in_flight += [finisher.submit(_finish, work, settings, outcomes) for work in wave]
            for future in in_flight:
                future.result()
        except BaseException:
            settings.pool.shutdown(wait=False, cancel_futures=True)
            finisher.shutdown(wait=True, cancel_futures=True)
            raise
    results: list[FileResult] = []
    failed: list[Failure] = []
    for source, outputs in targets.items():
        outcome = outcomes[source]
        if isinstance(outcome, Failure):
            failed.append(outcome)
        else:
            order = [str(shown(path)) for path in outputs]
            results += sorted(outcome, key=lambda each: order.index(each.output))
    return results, failed


def _read(layer: Layer) -> AnyDelta:
    return layer.delta


def _limit(work: _Work) -> int | None:
    """The most dimensions that any recipe can keep of a layer, None if one may keep all."""
    limits = [recipe.limit for recipe in work.targets.values()]
    known = [limit for limit in limits if limit is not None]
    return max(known) if len(known) == len(limits) else None


def _waves(
    targets: Mapping[Path, Mapping[Path, Recipe]],
    settings: _Settings,
    outcomes: dict[Path, list[FileResult] | Failure],
) -> Iterator[list[_Work]]:
    """Open adapters in waves that are decomposed together; those that fail or are done already go to `outcomes`."""
    enough = _CUDA_WAVE_LAYERS if settings.device.startswith("cuda") else 1
    wave: list[_Work] = []
    for source, outputs in targets.items():
        try:
            work = _begin(source, outputs, settings, outcomes)
        except LorashrinkError as error:
            outcomes[source] = Failure(str(source), str(error))
            settings.count(len(outcomes))
            continue
        if work:
            wave.append(work)
        if sum(len(each.adapter) for each in wave) >= enough:
            yield wave
            wave = []
    if wave:
        yield wave


def _begin(
    source: Path,
    outputs: Mapping[Path, Recipe],
    settings: _Settings,
    outcomes: dict[Path, list[FileResult] | Failure],
) -> _Work | None:
    started = time.perf_counter()
    adapter = settings.opener(source, settings.base)
    try:
        source_hash = settings.pool.submit(sha256_file, adapter.store.files[0])
        if settings.skip_existing and any(path.exists() for path in outputs):
            done = {
                path: _existing(path, source, adapter, recipe, settings, source_hash.result())
                for path, recipe in outputs.items()
            }
            outputs = {path: recipe for path, recipe in outputs.items() if not done[path]}
            outcomes[source] = [each for each in done.values() if each]
            if not outputs:
                adapter.close()
                return None
        views = match(adapter, settings.base) if settings.base else [()] * len(adapter)
        depends = _depends_on_base(adapter, settings)
        adapter, views = part(bind(adapter, views, settings.base), views, settings.form)
        return _Work(source, outputs, started, adapter, views, source_hash, depends)
    except BaseException:
        adapter.close()
        raise


def _depends_on_base(adapter: Adapter, settings: _Settings) -> bool:
    """Whether the base decides what is written, whatever the recipe: by other names, or layers that are no LoRA."""
    return bool(settings.options) or not all(layer.family.written for layer in adapter.layers)


def _origin(recipe: Recipe, settings: _Settings, depends_on_base: bool, source_hash: str) -> Origin:
    base = settings.base.fingerprint if settings.base and (recipe.needs_base or depends_on_base) else ""
    options = f"dtype={settings.dtype},unmapped={settings.unmapped},as={settings.form}{settings.options}"
    return Origin(source_hash, str(recipe), base, options, __version__)


def _existing(
    path: Path, source: Path, adapter: Adapter, recipe: Recipe, settings: _Settings, source_hash: str
) -> FileResult | None:
    """The result that an output which is already there stands for, None if there is no such file."""
    if not path.exists():
        return None
    entries = read_header(path)[1]
    if not _origin(recipe, settings, _depends_on_base(adapter, settings), source_hash).made(entries):
        raise OutputError(
            f"{path}: exists, but was made from another source, base, recipe, options or version. "
            "Use --force to replace it, or choose another place with -o."
        )
    return FileResult(
        source=str(source),
        output=str(shown(path)),
        recipe=str(recipe),
        threshold=json.loads(entries["resize_params"])["threshold"],
        bytes_before=sum(each.stat().st_size for each in adapter.store.files),
        bytes_after=path.stat().st_size,
        relative_error=(1 - float(entries["lorashrink.energy"])) ** 0.5,
        seconds=0.0,
        skipped=True,
    )


def _finish(work: _Work, settings: _Settings, outcomes: dict[Path, list[FileResult] | Failure]) -> None:
    """Select, write and report one adapter whose layers are being decomposed."""
    try:
        plans = _plans(work, settings)
        if not settings.dry_run:
            write(
                plans,
                pool=settings.pool,
                device=settings.device,
                progress=settings.report(f"writing {work.source.name}"),
            )
        results = [
            result(each, path, started=work.started, quantiles=settings.quantiles) for path, each in plans.items()
        ]
        earlier = outcomes.get(work.source, [])
        outcomes[work.source] = [*(earlier if isinstance(earlier, list) else []), *results]
    except LorashrinkError as error:
        outcomes[work.source] = Failure(str(work.source), str(error))
    except Exception as error:
        log.debug("%s", work.source, exc_info=True)
        outcomes[work.source] = Failure(str(work.source), f"{work.source}: unexpected {type(error).__name__}: {error}")
    finally:
        work.adapter.close()
        settings.count(len(outcomes))


def _plans(work: _Work, settings: _Settings) -> dict[Path, Plan]:
    report = settings.report(f"decomposing {work.source.name}")
    spectra = []
    for count, future in enumerate(work.spectra, 1):
        spectra.append(future.result())
        if report and (count % 16 == 0 or count == len(work.spectra)):
            report(count, len(work.spectra))
    recipes = list(work.targets.values())
    norms: Norms = {}
    if settings.norms:
        names = {"fro"}.union(*(recipe.base_norms for recipe in recipes))
        found = [views for views in work.views if views]
        norms = settings.norms.look_up(found, names, pool=settings.pool, progress=settings.report("norms of the base"))
    alignments: list[Tensor | None] = [None] * len(spectra)
    if settings.base and any("weight" in recipe.needs for recipe in recipes):
        measure = partial(aligned, work.adapter, work.views, spectra, settings.base)
        alignments = list(settings.pool.map(measure, range(len(spectra))))
    decomposed = Decomposed(work.adapter, work.views, spectra, norms, alignments)
    plans: dict[Path, Plan] = {}
    refused: list[RecipeError] = []
    for path, recipe in work.targets.items():
        try:
            plans[path] = plan(
                decomposed,
                recipe,
                dtype=settings.dtype,
                unmapped=settings.unmapped,
                form=settings.form,
                origin=_origin(recipe, settings, work.depends_on_base, work.source_hash.result()),
            )
        except RecipeError as error:
            refused.append(error)
    if refused and not (settings.lenient and plans):
        raise refused[0]
    stays = next((item for each in plans.values() for item in each.verbatim.items()), None)
    if settings.reader and stays:
        raise InputError(
            f"{work.source}: {stays[0]} stays as it is ({stays[1]}), and {settings.reader} cannot load it."
        )
    return plans
