"""`shrink`: make adapters smaller without a recipe.

collect -> method and level -> recipe (by prediction, or by pictures) -> resize -> record and page
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorashrink._version import __version__
from lorashrink.adapters import in_memory, open_adapter
from lorashrink.automatic.collecting import Item, check_existing, collect
from lorashrink.automatic.drawing import Gallery, Series, recipe_by_pictures, worst_of
from lorashrink.automatic.in_memory import shrink_in_memory
from lorashrink.automatic.method import Method
from lorashrink.automatic.methods import Methods
from lorashrink.automatic.record import Record, as_earlier, source_stamp
from lorashrink.automatic.request import Request, left_alone
from lorashrink.automatic.sidecars import copy_sidecar, sidecars
from lorashrink.bases import Base
from lorashrink.errors import InputError, LorashrinkError, Progress, UsageError, boundary
from lorashrink.files.disk import check_output, write_bytes
from lorashrink.files.header import read_header
from lorashrink.files.metadata_keys import SOURCE
from lorashrink.recipes.grammar import Recipe
from lorashrink.reports.before_after import shrunk_page
from lorashrink.results.automatic import FailedInput, PicturePair, ShrinkReport, Shrunk
from lorashrink.results.shrinking import FileResult
from lorashrink.shrinking.in_memory import refuse_options
from lorashrink.shrinking.options import ResizeOptions, output_dtype
from lorashrink.shrinking.outputs import shown, source_files
from lorashrink.shrinking.request import open_input
from lorashrink.shrinking.run import shrink as resize_targets
from lorashrink.sums.summing import contents_sha256
from lorashrink.text import size_text

if TYPE_CHECKING:
    from torch import Tensor

PAGE = "before-after.html"


def shrink(
    adapters: Any,
    *,
    model: str | Path | None = None,
    base: str | Path | Mapping[str, Tensor] | Base | None = None,
    calibration: str | Path | None = None,
    quality: str | float = "high",
    size: str | float | None = None,
    rank: int | None = None,
    dtype: str = "auto",
    output: str | Path | None = None,
    prompts: str | Path | None = None,
    settings: str | Path | None = None,
    force: bool = False,
    device: str = "auto",
    jobs: int | None = None,
    progress: Progress | None = None,
) -> ShrinkReport:
    """Shrink adapters by the best method at hand, into a folder `shrunk` with the same names and the same tree.

    adapters: files, PEFT folders, globs, and folders with all that is below them; or one adapter in memory, see below.
    Outputs of earlier runs are left alone, files that would shrink by less than 10 % are reported and not written, and
    what other programs keep beside an adapter (previews, descriptions) is copied. A rerun goes on where the last one
    stopped.

    model: the model that the adapters are for; it is the base, and where it can draw, the worst of the pictures that
    call an adapter decides its size. base: a checkpoint or norm table that only gives norms, the tensors of a model by
    their names, or what `open_base` returns. calibration: a table that `calibrate` wrote; without it one is looked for
    beside the model and in the user's cache.
    quality: "same", "high", "small" or a number of dB. size: of each file, such as "50MB" or a number of MiB. rank: of
    all layers. Size and rank stand in place of a quality.
    dtype: "auto" (default) or as in `resize`. output: a folder; default is `shrunk` beside a file and inside a folder.
    prompts: a file of prompts, or the text of one; default are those that an adapter's metadata suggest. settings: for
    a model in a single file, a folder of such a model.
    force: replace outputs that were made from something else.

    In memory: a mapping of names to tensors, `lorashrink.Tensors`, a PeftModel, or a diffusers pipeline with one active
    adapter. Nothing is drawn or written: `state_dict` of the result has the tensors, or those that went in if the
    adapter is left alone. In a PeftModel or pipeline the shrunk adapter takes the place of the old one, and "auto" is
    "fp16", because models do not compute with 8-bit floats. Options that are about files are errors, and so is a
    failure.

    An adapter that fails is listed in `failed` and the others are done. Raises UsageError, InputError or OutputError if
    nothing can be done at all.
    """
    request = Request.of(quality=quality, size=size, rank=rank, dtype=dtype, prompts=prompts, force=force)
    held = in_memory(adapters)
    if held is not None:
        about_files = {"output": output, "prompts": prompts, "settings": settings, "force": force}
        refuse_options(held, [name for name, value in about_files.items() if value])
        return shrink_in_memory(
            held,
            request,
            Methods(model if base is None else base, _path(calibration)),
            device=device,
            jobs=jobs,
            progress=progress,
        )
    entries = [adapters] if isinstance(adapters, (str, Path)) else list(adapters)
    if not entries:
        raise UsageError("no adapters. Name files, folders or globs.")
    model_path, table = _path(model), _path(calibration)
    collection = collect(entries, _path(output))
    for item in collection.items:
        check_output(item.output, force=True, inputs=source_files(item.source))
    with ExitStack() as stack:
        methods = stack.enter_context(Methods(model_path if base is None else base, table))
        methods.check()
        run = Run(request, methods, ResizeOptions(dtype=dtype, device=device, jobs=jobs), progress)
        if model_path is not None:
            try:
                gallery = Gallery(model_path, settings=_path(settings), device=device, progress=progress)
                run.gallery = stack.enter_context(gallery)
            except (UsageError, InputError) as error:
                run.notes.append(f"no pictures were drawn: {error}")
        run.of_all(collection.items)
    for source in collection.own:
        run.results[source] = left_alone(str(source), source_files(source)[0].stat().st_size)
    report = run.report()
    if not report.written:
        return report
    folder = collection.items[0].folder
    write_bytes(folder / PAGE, shrunk_page(report, folder))
    return replace(report, page=str(folder / PAGE))


def _path(path: str | Path | None) -> Path | None:
    return None if path is None else Path(path)


@dataclass(eq=False)
class Run:
    """One call of `shrink`, adapter after adapter."""

    request: Request
    methods: Methods
    options: ResizeOptions
    progress: Progress | None
    gallery: Gallery | None = None
    notes: list[str] = field(default_factory=list)
    results: dict[Path, Shrunk] = field(default_factory=dict)
    failed: dict[Path, FailedInput] = field(default_factory=dict)
    _records: dict[Path, Record] = field(default_factory=dict)
    _stamps: dict[Path, object] = field(default_factory=dict)
    _replaced: dict[Path, int] = field(default_factory=dict)  # bytes of the outputs that are there before

    def of_all(self, items: Sequence[Item]) -> None:
        """Shrink what no equal run has shrunk."""
        groups: dict[Method, list[Item]] = defaultdict(list)
        for item in items:
            with boundary(item.source, partial(self._fail, item)):
                earlier = self._record(item).result(item)
                if earlier and self.gallery is None:
                    self.results[item.source] = as_earlier(earlier)
                    continue
                self._stamps[item.source] = source_stamp(item)
                if not (earlier or self.request.force):
                    check_existing(item)
                if not earlier and item.output.is_file():
                    self._replaced[item.source] = item.output.stat().st_size
                method = self.methods.of(item.source)
                if self.gallery is None:
                    groups[method].append(item)
                elif earlier:
                    result = as_earlier(earlier)
                    if result.output and result.worst_picture_db is not None:  # its pictures are in the user's cache
                        result = self._drawn(item, result, self.gallery.of(item.source, self.request.prompts))
                    self.results[item.source] = result
                else:
                    self._shrink_by_pictures(item, method, self.gallery)
        for method, members in groups.items():
            self._resize_unseen(members, method)

    # --- by prediction --------------------------------------------------------------------------

    def _resize_unseen(self, items: Sequence[Item], method: Method) -> None:
        """Shrink adapters without a look at pictures."""
        request = self.request
        self._resize_all({item: request.recipe(method) for item in items}, method)
        done = [self.results[item.source] for item in items if item.source in self.results]
        note = request.note(method)
        if self.gallery is None and any(result.predicted_db is not None for result in done):
            note = "pictures not checked: the quality is predicted. With --model MODEL the worst picture decides"
        if done and note:
            self.notes = list(dict.fromkeys((*self.notes, note)))

    def _resize_all(
        self, recipes: Mapping[Item, Recipe], method: Method, finish: Callable[[Item, Shrunk], None] | None = None
    ) -> None:
        """Shrink adapters by recipes; `finish` takes each result, and writes it down where no other is given."""
        then = finish or self._finish
        by_output = {str(shown(item.output)): item for item in recipes}

        def take(result: FileResult) -> None:
            item = by_output[result.output]
            with boundary(item.source, partial(self._fail, item)):
                then(item, self.request.result(str(item.source), result, method))

        report = resize_targets(
            {item.source: {item.output: recipe} for item, recipe in recipes.items()},
            self._options(method),
            opener=partial(open_input, dtype=output_dtype(self.request.dtype, recipes.values())),
            most_share=self.request.most_share,
            on_result=take,
            progress=self.progress,
        )
        items = {str(item.source): item for item in recipes}
        for failure in report.failed:
            item = items[failure.source]
            self.failed[item.source] = FailedInput.of(failure.source, failure.error)

    def _options(self, method: Method) -> ResizeOptions:
        return replace(self.options, base=method.base, calibration=method.calibration)

    def _resize(self, method: Method, source: Path, recipe: Recipe, file: Path | None) -> FileResult:
        """What a recipe makes of one adapter, as `drawing.Resize`. Raises InputError."""
        options = replace(self._options(method), dry_run=file is None)
        report = resize_targets(
            {source: {file or source.with_name("_.safetensors"): recipe}},
            options,
            opener=partial(open_input, dtype=output_dtype(options.dtype, [recipe])),
        )
        if report.failed:
            raise InputError(report.failed[0].error)
        return report.results[0]

    # --- by pictures ----------------------------------------------------------------------------

    def _shrink_by_pictures(self, item: Item, method: Method, gallery: Gallery) -> None:
        """Shrink one adapter by what its pictures look like."""
        request = self.request
        try:
            series = gallery.of(item.source, request.prompts)
        except (UsageError, InputError) as error:
            self._resize_unseen([item], method)
            if result := self.results.get(item.source):
                unchecked = f"pictures not checked: {error}"
                self.results[item.source] = replace(result, warnings=(*result.warnings, unchecked))
            return
        recipe: Recipe | None = request.recipe(method)
        assert recipe
        if request.size is None and request.rank is None:
            expected = self._resize(method, item.source, recipe, None)
            most = request.most_share * expected.bytes_before
            recipe = recipe_by_pictures(
                series,
                item.source,
                method,
                request.level,
                partial(self._resize, method),
                guess=expected.bytes_after,
                most=most,
            )
            if recipe is None:
                why = f"no file below {size_text(most)} has a worst picture of {request.level.worst:g} dB"
                self._finish(
                    item, replace(self.request.result(str(item.source), expected, method), output=None, skipped=why)
                )
                return

        results: list[Shrunk] = []
        self._resize_all({item: recipe}, method, lambda _, result: results.append(result))
        for result in results:  # it is written down with its pictures, or not at all
            self._finish(item, self._drawn(item, result, series) if result.output else result)

    def _drawn(self, item: Item, result: Shrunk, series: Series) -> Shrunk:
        pairs: tuple[PicturePair, ...] = series.pairs(shown(item.output))
        worst, warnings = worst_of(pairs), result.warnings
        if worst < self.request.level.worst and not result.skipped:
            warnings = (
                *warnings,
                f"its worst picture has {worst:.1f} dB, under the {self.request.level.worst:g} dB of quality "
                f"{self.request.level.name}",
            )
        return replace(result, worst_picture_db=worst, pictures=pairs, warnings=warnings)

    # --- results --------------------------------------------------------------------------------

    def _finish(self, item: Item, result: Shrunk) -> None:
        """Keep a result, and write down that the adapter is done."""
        if result.output and (before := self._replaced.get(item.source)):
            result = replace(result, warnings=(*result.warnings, f"replaced an earlier file of {size_text(before)}"))
        self.results[item.source] = result
        if result.output:
            for sidecar, copy in sidecars(item.source, item.output):
                copy_sidecar(sidecar, copy, item.output)
            sha256 = read_header(item.output)[1][SOURCE]
        else:
            with open_adapter(item.source) as adapter:
                sha256 = contents_sha256(adapter)
        self._record(item).add(item, result, self._stamps[item.source], sha256)

    def _fail(self, item: Item, error: LorashrinkError) -> None:
        self.failed[item.source] = FailedInput.of(str(item.source), str(error))

    def _record(self, item: Item) -> Record:
        if item.folder not in self._records:
            self._records[item.folder] = Record(item.folder, self.request.key(self.methods, self.gallery is not None))
        return self._records[item.folder]

    def report(self) -> ShrinkReport:
        """All results, in the order of their paths."""
        ordered = [self.results[source] for source in sorted(self.results)]
        failed = [self.failed[source] for source in sorted(self.failed)]
        return ShrinkReport(__version__, tuple(ordered), tuple(failed), notes=tuple(self.notes))
