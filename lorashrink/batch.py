"""Many adapters in one call: find them, check the outputs, and keep reading, computing and writing going."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path

from torch import Tensor

from lorashrink._version import __version__
from lorashrink.adapters import UNKNOWN, Adapter, Layer, open_adapter, peft
from lorashrink.base_norms import BaseNorms, Norms
from lorashrink.bases import Base, Views, open_base
from lorashrink.calibration import OfLayer, Statistics, open_statistics
from lorashrink.combining import combined, contents_sha256, sources_of
from lorashrink.delta import AnyDelta
from lorashrink.errors import InputError, LorashrinkError, OutputError, RecipeError, UsageError
from lorashrink.files import OUTPUT_DTYPES, clear_leftovers, read_header, sha256_file
from lorashrink.grouping import base_for, read_table
from lorashrink.inputs import Sum, find_inputs, split_weight
from lorashrink.journal import Stamp, stamps
from lorashrink.ledger import Done, Ledger, Targets, Trace, origin_of
from lorashrink.machine import pick_device, worker_pool
from lorashrink.matching import FORMS, bind, match, part
from lorashrink.metadata import ENERGY, ERROR, Origin
from lorashrink.outputs import base_files, check_outputs, check_space, name_outputs, shown, space_for
from lorashrink.planning import (
    UNMAPPED,
    Decomposed,
    Outline,
    Plan,
    aligned,
    outline,
    plan,
    result,
)
from lorashrink.recipe import DEFAULT, Member, Recipe, Selection, parse_recipes, select_together
from lorashrink.renaming import check_naming, renamed
from lorashrink.results import BaseInfo, Failure, FileResult, Report, StackBudget
from lorashrink.spectrum import Item, Spectrum, decompose
from lorashrink.targets import TARGETS, Target, with_items
from lorashrink.writing import write

log = logging.getLogger(__name__)

Opener = Callable[[Path, Base | None], Adapter]
Each = Callable[[FileResult], None]
# (what is being done, steps done, steps in all)
Progress = Callable[[str, int, int], None]

# On a GPU small files are decomposed together until this many layers fill a batch.
_CUDA_WAVE_LAYERS = 4096
_IN_FLIGHT = 2  # waves whose spectra are in memory: one is decomposed while another is written
# Up to here a full disk is found out soon enough, by what is written and not by what might be.
_FEW_OUTPUTS = 16


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


@dataclass(frozen=True, eq=False)
class How:
    """What is done with each file. It can be sent to other processes."""

    opener: Opener
    base: str | Path | None = None
    bases: Mapping[str, Path] = field(default_factory=dict)  # family -> base, in place of one base
    calibration: str | Path | None = None  # statistics for calibrated recipes
    dtype: str = "same"
    device: str = "auto"
    unmapped: str = "keep"
    form: str = "auto"
    reader: str = ""
    skip_existing: bool = False
    dry_run: bool = False
    quantiles: bool = False
    lenient: bool = False
    options: str = ""


@dataclass(frozen=True, eq=False)
class Job:
    """A checked request."""

    targets: Targets
    how: How
    journal: Path | None = None  # folder
    weights: Mapping[Path, float] = field(default_factory=dict)  # of each source of a stack; {} if it is none


def prepare(
    adapters: str | Path | Sequence[str | Path],
    *,
    base: str | Path | None = None,
    recipes: str | Sequence[str] = DEFAULT,
    output: str | Path | None = None,
    dtype: str = "same",
    device: str = "auto",
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
) -> Job:
    """Check all that can be checked of a call of `resize` before any work. Raises as that does."""
    if target not in (None, *TARGETS):
        raise UsageError(f"target: '{target}' is not one of {', '.join(TARGETS)}.")
    if base is not None and group_by_base is not None:
        raise UsageError("give one base, or a table of them with --group-by-base, and not both.")
    reader = TARGETS[target] if target else None
    texts = [text for each in ([recipes] if isinstance(recipes, str) else recipes) for text in each.split(":")]
    given_limits = {"clip": clip, "fro_limit": fro_limit}
    limits = [f"{key}={value}" for key, value in given_limits.items() if value is not None]
    texts = [",".join([text, *limits]) for text in texts]
    wanted = parse_recipes([with_items(text, reader) for text in texts] if reader else texts)
    bases = read_table(group_by_base) if group_by_base is not None else {}
    check_naming(naming, next(iter(bases.values()), base))
    given = [adapters] if isinstance(adapters, (str, Path)) else adapters
    if stack:
        weights = _stack(given, wanted, recursive=recursive, group_by_base=group_by_base)
        found: dict[Path, Sum | None] = dict.fromkeys(weights)
    else:
        weights, found = {}, find_inputs(given, recursive=recursive)
    sums = {source: terms for source, terms in found.items() if terms}
    if sums and bases:
        raise UsageError(f"{next(iter(sums))}: a sum has one base, and is not merged with --group-by-base.")
    sources = list(found)
    targets = {
        source: name_outputs(
            sums[source].place if source in sums else source,
            [(recipe.file_items(), recipe) for recipe in wanted],
            output,
            sources=len(sources),
            folder=peft.is_folder(_first(source, sums)) if naming is None else naming == "peft",
        )
        for source in sources
    }
    hint = "--force to replace it or --skip-existing to keep it"
    inputs = [
        *(path for source in sources for path in (sums[source].files if source in sums else [source])),
        *([Path(calibration)] if calibration else ()),
        *base_files(base),
        *(path for each in bases.values() for path in base_files(each)),
    ]
    check_outputs(targets, inputs, force=force or skip_existing or dry_run, hint=hint)
    if not bases:
        check_needs(wanted, base, _first(sources[0], sums))
    check_calibration(wanted, calibration)
    if space_check and not dry_run and sum(map(len, targets.values())) > _FEW_OUTPUTS:
        check_space(_most_bytes(targets, sums, dtype, shared=stack))
    folder = Path(output) if output is not None and not str(output).endswith(".safetensors") else None
    how = How(
        opener=partial(_open, sums=sums, naming=naming, target=reader, strict=strict),
        base=base,
        bases=bases,
        calibration=calibration,
        dtype=dtype,
        device=device,
        unmapped=unmapped,
        form="lora" if reader else form,
        reader=reader.title if reader else "",
        skip_existing=skip_existing,
        dry_run=dry_run,
        quantiles=quantiles,
        options=(f",naming={naming}" if naming else "") + (f",target={target}" if target else ""),
    )
    return Job(targets, how, folder if skip_existing and not dry_run else None, weights)


def _stack(
    given: Sequence[str | Path],
    recipes: Sequence[Recipe],
    *,
    recursive: bool,
    group_by_base: str | Path | None,
) -> dict[Path, float]:
    """The adapters that share a budget, and their weights. Raises UsageError, RecipeError or InputError."""
    if group_by_base is not None:
        raise UsageError("--stack: adapters that are used together have one base; give it with --base.")
    for recipe in recipes:
        if recipe.select != "size":
            raise RecipeError(
                f"recipe '{recipe}': --stack shares out the bytes of size=, and this recipe has {recipe.select}=. "
                "Example: fro_ckpt,bytes,size=32"
            )
    weights: dict[Path, float] = {}
    for entry in given:
        name, weight = split_weight(entry)
        for source, terms in find_inputs([name], recursive=recursive).items():
            if terms:
                raise UsageError(f"{entry}: is a sum, which is one adapter. With --stack name its parts: A:0.7 B:0.5.")
            if not weight:
                raise UsageError(f"{entry}: has no share in a stack at weight 0. Leave it out.")
            if any(os.path.realpath(source) == os.path.realpath(known) for known in weights):
                raise UsageError(f"{source}: is in the stack twice. Give it once.")
            weights[source] = weight
    if len(weights) < 2:
        raise UsageError(f"--stack: {next(iter(weights))} is alone. Name two adapters or more, or leave --stack out.")
    return weights


def _first(source: Path, sums: Mapping[Path, Sum]) -> Path:
    """The adapter itself, or the first one of a sum."""
    return sums[source].files[0] if source in sums else source


def _most_bytes(targets: Targets, sums: Mapping[Path, Sum], dtype: str, *, shared: bool) -> dict[Path, int]:
    """How large each output that is not there yet can become; of a budget that is `shared`, its part on average."""
    factor = 2 if dtype in ("fp32", "32") else 1
    most: dict[Path, int] = {}
    for source, outputs in targets.items():
        terms = sums[source].files if source in sums else [source]
        paths = [peft.weights_in(each) if peft.is_folder(each) else each for each in terms]
        size = factor * sum(path.stat().st_size for path in paths if os.path.isfile(path))
        for output, recipe in outputs.items():
            if not os.path.exists(output):
                budget = int(recipe.value * 2**20)
                part = budget // len(targets) if shared else min(size, budget)
                most[output] = part if recipe.select == "size" else size
    return most


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


def check_calibration(recipes: Sequence[Recipe], calibration: str | Path | None) -> None:
    """Raises RecipeError if a recipe needs statistics and there are none."""
    for recipe in recipes:
        if recipe.calibrated and calibration is None:
            raise RecipeError(
                f"recipe '{recipe}' needs statistics of the model; give them with --calibration, or make some with: "
                "lorashrink calibrate"
            )


def _open(
    source: Path,
    base: Base | None,
    *,
    sums: Mapping[Path, Sum],
    naming: str | None,
    target: Target | None,
    strict: bool,
) -> Adapter:
    adapter = combined(sums[source], base, naming=naming) if source in sums else open_adapter(source)
    try:
        unknown = [key for key, reason in adapter.others.items() if reason == UNKNOWN]
        if strict and unknown:
            raise InputError(
                f"{source}: {len(unknown)} tensors belong to no known family, first {unknown[0]}. "
                "Without --strict they are copied as they are."
            )
        if naming and base and source not in sums:
            adapter = renamed(adapter, naming, base).adapter
        return target.fit(adapter) if target else adapter
    except BaseException:
        adapter.close()
        raise


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
            _run_together(job, session, ledger)
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
        stacks=_budgets(job, results),
    )


def _budgets(job: Job, results: Sequence[FileResult]) -> tuple[StackBudget, ...]:
    recipes = next(iter(job.targets.values())).values() if job.weights else ()
    found = []
    for recipe in recipes:
        made = [each for each in results if each.recipe == str(recipe)]
        threshold = next((each.threshold for each in made), None)
        size = sum(each.bytes_after for each in made)
        found.append(StackBudget(str(recipe), len(made), int(recipe.value * 2**20), size, threshold))
    return tuple(found)


# --- what stays open over many files ------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Against:
    """The base of one adapter, if it has one."""

    base: Base | None = None
    norms: BaseNorms | None = None


@dataclass(frozen=True, eq=False)
class Session:
    """All that is opened once."""

    how: How
    device: str
    pool: Executor
    bases: Mapping[Path, _Against]
    statistics: Statistics | None = None
    progress: Progress | None = None
    selections: Mapping[Path, Selection] = field(default_factory=dict)  # by output, where they are made already

    def against(self, source: Path) -> _Against:
        """The base of this adapter. Raises InputError if a table of bases has none for it."""
        if self.how.bases:
            return self.bases[base_for(source, self.how.bases)]
        return next(iter(self.bases.values()), _Against())

    @cached_property
    def options(self) -> str:
        """Whatever decides what is written, beside the source, the recipe and the base."""
        how = self.how
        statistics = f",calibration={sha256_file(Path(how.calibration))[:16]}" if how.calibration else ""
        return f"dtype={how.dtype},unmapped={how.unmapped},as={how.form}{how.options}{statistics}"

    @property
    def infos(self) -> tuple[BaseInfo, ...]:
        """What reports say of the bases."""
        return tuple(each.base.info for each in self.bases.values() if each.base)

    def reporter(self, text: str) -> Callable[[int, int], None] | None:
        """A progress callback for one part of the work."""
        progress = self.progress
        return None if progress is None else lambda done, total: progress(text, done, total)


@contextlib.contextmanager
def open_session(how: How, *, jobs: int | None = None, progress: Progress | None = None) -> Iterator[Session]:
    """Open the bases and a pool of threads. Raises UsageError, InputError or NotABase."""
    for option, value, allowed in (
        ("dtype", how.dtype, tuple(OUTPUT_DTYPES)),
        ("unmapped", how.unmapped, UNMAPPED),
        ("as", how.form, FORMS),
    ):
        if value not in allowed:
            raise UsageError(f"{option}: '{value}' is not one of {', '.join(allowed)}.")
    how = replace(how, dtype={"16": "fp16", "32": "fp32"}.get(how.dtype, how.dtype))
    device = pick_device(how.device)
    paths = [Path(how.base)] if how.base is not None else list(dict.fromkeys(how.bases.values()))
    with contextlib.ExitStack() as stack:
        bases = {path: stack.enter_context(open_base(path)) for path in paths}
        for family, path in how.bases.items():
            if bases[path].family.name != family:
                raise UsageError(f"{path}: is for {bases[path].family.name}, and the table of bases says {family}.")
        statistics = stack.enter_context(open_statistics(how.calibration)) if how.calibration else None
        pool = stack.enter_context(worker_pool(jobs))
        against = {path: _Against(base, BaseNorms(base)) for path, base in bases.items()}
        yield Session(how, device, pool, against, statistics, progress)


# --- what is there already ----------------------------------------------------------------------


def already_there(source: Path, outputs: Mapping[Path, Recipe], session: Session, ledger: Ledger) -> Done | None:
    """What is known of outputs that an equal run has written, None if there are none.

    Raises LorashrinkError if one was made from something else.
    """
    against = session.against(source)
    known = _known(source, outputs, against, session, ledger)
    rest = {path: recipe for path, recipe in outputs.items() if path not in known and os.path.exists(path)}
    if not rest:
        return Done(source, tuple(known.values())) if known else None
    with session.how.opener(source, against.base) as adapter:
        before = stamps(_files(adapter))
        identity = _Identity.of(source, adapter, against, session)
        found = {
            path: _existing(path, source, adapter, recipe, identity, _own_base(against, session))
            for path, recipe in rest.items()
        }
    results = (*known.values(), *found.values())
    return Done(source, results, identity.trace({path: rest[path] for path in found}, before))


@dataclass(frozen=True, eq=False)
class _Identity:
    """What decides the bytes of an adapter's outputs, but for the recipe."""

    source_hash: Future[str]
    fingerprint: str  # of the base, "" without one
    depends_on_base: bool  # whatever the recipe
    options: str

    @classmethod
    def of(cls, source: Path, adapter: Adapter, against: _Against, session: Session) -> _Identity:
        # By other names, and by layers that are no LoRA.
        depends = bool(session.how.options) or not all(layer.family.written for layer in adapter.layers)
        hashed = session.pool.submit(contents_sha256, adapter)
        return cls(hashed, _fingerprint(against), depends, _options(source, session))

    def origin(self, recipe: Recipe) -> Origin:
        return _origin(self.source_hash.result(), recipe, self.fingerprint, self.depends_on_base, self.options)

    def trace(self, outputs: Mapping[Path, Recipe], before: tuple[Stamp, ...]) -> Trace:
        origins = {path: self.origin(recipe) for path, recipe in outputs.items()}
        return Trace(origins, self.depends_on_base, before)


def _fingerprint(against: _Against) -> str:
    return against.base.fingerprint if against.base else ""


def _options(source: Path, session: Session) -> str:
    """The session's, and the file beside the tensors of a PEFT folder."""
    settings = f",settings={sha256_file(source / peft.CONFIG_FILE)[:16]}" if peft.is_folder(source) else ""
    return f"{session.options}{settings}"


def _origin(source_hash: str, recipe: Recipe, fingerprint: str, depends_on_base: bool, options: str) -> Origin:
    base = fingerprint if recipe.needs_base or depends_on_base else ""
    return Origin(source_hash, str(recipe), base, options, __version__)


def _files(adapter: Adapter) -> list[Path]:
    """All that was read of an adapter."""
    folders = [path.parent for path in adapter.store.files if path.name in peft.WEIGHTS_FILES]
    return [*adapter.store.files, *(folder / peft.CONFIG_FILE for folder in folders if peft.is_folder(folder))]


def _known(
    source: Path, outputs: Mapping[Path, Recipe], against: _Against, session: Session, ledger: Ledger
) -> dict[Path, FileResult]:
    """Results of outputs that the journal knows to be equal; no file is read."""
    found = {}
    for path, recipe in outputs.items():
        entry = ledger.known(path, source)
        if entry is None:
            continue
        options = _options(source, session)
        expected = _origin(entry.source_sha256, recipe, _fingerprint(against), entry.depends_on_base, options)
        if expected == origin_of(entry):
            found[path] = FileResult(
                source=str(source),
                output=str(shown(path)),
                recipe=str(recipe),
                threshold=entry.threshold,
                bytes_before=entry.bytes_before,
                bytes_after=entry.bytes_after,
                relative_error=entry.relative_error,
                seconds=0.0,
                skipped=True,
                base=_own_base(against, session),
                kept_energy=float(read_header(path)[1][ENERGY]) if recipe.caps else None,
            )
    return found


def _own_base(against: _Against, session: Session) -> str | None:
    """What reports say of the base of one adapter, where there are several."""
    return str(against.base.path) if session.how.bases and against.base else None


def _existing(
    path: Path, source: Path, adapter: Adapter, recipe: Recipe, identity: _Identity, base: str | None
) -> FileResult:
    """The result that an output which is already there stands for."""
    entries = read_header(path)[1]
    if not identity.origin(recipe).made(entries):
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
        relative_error=float(entries[ERROR]) if recipe.caps else (1 - float(entries[ENERGY])) ** 0.5,
        seconds=0.0,
        skipped=True,
        base=base,
        kept_energy=float(entries[ENERGY]) if recipe.caps else None,
    )


# --- the pipeline -------------------------------------------------------------------------------


@dataclass(eq=False)
class _Work:
    """One adapter on its way through the pipeline."""

    source: Path
    targets: Mapping[Path, Recipe]
    adapter: Adapter
    views: Sequence[Views]
    against: _Against
    identity: _Identity
    statistics: Sequence[OfLayer | None] = ()  # per layer, of calibrated recipes
    started: float = 0.0
    stamps: tuple[Stamp, ...] = ()
    there: tuple[FileResult, ...] = ()  # results of outputs that are not made again
    traced: Mapping[Path, Recipe] = field(default_factory=dict)  # outputs of which the journal is to know
    spectra: Mapping[bool, Sequence[Future[Spectrum]]] = field(default_factory=dict)  # calibrated or not -> per layer


def run(targets: Targets, session: Session, ledger: Ledger) -> None:
    """Decompose one wave of files while the one before it is written; the ledger gets what becomes of each."""
    in_flight: list[Future[None]] = []
    with ThreadPoolExecutor(1, "lorashrink-files") as finisher:
        try:
            for wave in _waves(targets, session, ledger):
                while len(in_flight) >= _IN_FLIGHT:
                    in_flight.pop(0).result()
                items = [_items(work) for work in wave]
                flat = [item for kinds in items for each in kinds.values() for item in each]
                futures = iter(decompose(flat, device=session.device, pool=session.pool))
                for work, kinds in zip(wave, items, strict=True):
                    work.spectra = {kind: [next(futures) for _ in each] for kind, each in kinds.items()}
                in_flight += [finisher.submit(_finish, work, session, ledger) for work in wave]
            for future in in_flight:
                future.result()
        except BaseException:
            session.pool.shutdown(wait=False, cancel_futures=True)
            finisher.shutdown(wait=True, cancel_futures=True)
            raise


def _items(work: _Work) -> dict[bool, list[Item]]:
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
        there = _known(source, outputs, against, session, ledger)
        if len(there) == len(outputs):
            ledger.add(Done(source, tuple(there.values())))
            return None
    adapter = session.how.opener(source, against.base)
    try:
        before = stamps(_files(adapter))
        identity = _Identity.of(source, adapter, against, session)
        traced = {path: recipe for path, recipe in outputs.items() if path not in there}
        if session.how.skip_existing:
            for path, recipe in traced.items():
                if os.path.exists(path):
                    there[path] = _existing(path, source, adapter, recipe, identity, _own_base(against, session))
        rest = {path: recipe for path, recipe in outputs.items() if path not in there}
        if not rest:
            adapter.close()
            ledger.add(Done(source, tuple(there.values()), identity.trace(traced, before)))
            return None
        ledger.start(source, rest)
        work = _work(source, rest, adapter, against, identity, session)
        return replace(work, started=started, stamps=before, there=tuple(there.values()), traced=traced)
    except BaseException:
        adapter.close()
        raise


def _work(
    source: Path,
    outputs: Mapping[Path, Recipe],
    adapter: Adapter,
    against: _Against,
    identity: _Identity,
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
        done = _failure(work.source, error)
    finally:
        work.adapter.close()
    ledger.add(done)


def _failure(source: Path, error: Exception) -> Done:
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
    results = [replace(each, base=_own_base(work.against, session)) for each in results]
    made = {path: recipe for path, recipe in work.traced.items() if path in plans or path not in work.targets}
    return Done(work.source, (*work.there, *results), work.identity.trace(made, work.stamps))


def _decomposed(work: _Work, session: Session) -> dict[bool, Decomposed]:
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


def _outline(work: _Work, decomposed: Mapping[bool, Decomposed], recipe: Recipe, session: Session) -> Outline:
    how, origin = session.how, work.identity.origin(recipe)
    kind = decomposed[recipe.calibrated]
    return outline(kind, recipe, dtype=how.dtype, unmapped=how.unmapped, form=how.form, origin=origin)


def _plans(work: _Work, session: Session) -> dict[Path, Plan]:
    decomposed = _decomposed(work, session)
    plans: dict[Path, Plan] = {}
    refused: list[RecipeError] = []
    for path, recipe in work.targets.items():
        try:
            outlined = _outline(work, decomposed, recipe, session)
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


# --- several adapters under one budget ----------------------------------------------------------


def _run_together(job: Job, session: Session, ledger: Ledger) -> None:
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
            ledger.add(_failure(source, error))
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
        members.append(f"{contents} {_options(source, session)} {weight!r}")
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
        identity = _Identity.of(source, adapter, against, session)
        work = _work(source, outputs, adapter, against, identity, session)
        items = _items(work)
        flat = [item for kind in items.values() for item in kind]
        futures = iter(decompose(flat, device=session.device, pool=session.pool))
        work.spectra = {kind: [next(futures) for _ in each] for kind, each in items.items()}
        decomposed = _decomposed(work, session)
        return {path: _outline(work, decomposed, recipe, session) for path, recipe in outputs.items()}
