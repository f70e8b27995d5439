"""`prepare`: an adapter that is decomposed once, and then answers any recipe."""

from __future__ import annotations

import math
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Mapping
from concurrent.futures import Executor
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Generic, TypeVar

import torch

from lorashrink.adapters import Adapter, Source, in_memory, open_adapter
from lorashrink.bases import Base, open_base
from lorashrink.engine.devices import worker_pool
from lorashrink.errors import Progress, RecipeError
from lorashrink.files.disk import check_output
from lorashrink.files.hashes import with_hashes
from lorashrink.files.store import memory_of
from lorashrink.linking.inputs import is_sum, only_adapter, to_sum
from lorashrink.recipes.grammar import Recipe
from lorashrink.results.prepared import Curve, Outcome
from lorashrink.results.shrinking import FileResult
from lorashrink.shrinking.decomposed import Decomposed
from lorashrink.shrinking.options import ResizeOptions
from lorashrink.shrinking.plan import (
    Outline,
    Plan,
    file_result,
    kept_energy,
    layer_plans,
    plan,
    prediction,
    relative_error,
)
from lorashrink.shrinking.request import Job, check_calibration
from lorashrink.shrinking.reuse import OpenSource, source_variant
from lorashrink.shrinking.session import checked_dtype, open_session
from lorashrink.shrinking.work import Work
from lorashrink.shrinking.write import compute, write
from lorashrink.sums.summing import combined, variant_of

if TYPE_CHECKING:
    from torch import Tensor

T = TypeVar("T")

# What plans call an output that has no name yet.
_OUTPUT = Path("shrunk.safetensors")

# Bytes that the prepared adapters which are remembered take together.
REMEMBERED_BYTES = 1 << 31

_ANSWERS = 128  # that one prepared adapter remembers of each kind

_LEAST_SHARE = 0.02  # of the adapter's dimensions, where a curve begins

# Recipes that keep everything, without and with statistics.
_ALL, _ALL_CALIBRATED = Recipe.parse("energy=1"), Recipe.parse("calib,energy=1")


class Prepared:
    """A decomposed adapter. `prepare` makes it; it is safe to use from many threads."""

    def __init__(self, work: Work, options: ResizeOptions) -> None:
        self._work, self._options = work, options
        self._decomposed: _Memory[Mapping[bool, Decomposed]] = _Memory(_ANSWERS)
        self._outlines: _Memory[Outline] = _Memory(_ANSWERS)
        self._outcomes: _Memory[Outcome] = _Memory(_ANSWERS)

    @property
    def adapter(self) -> Adapter:
        """The adapter as it is, open."""
        return self._work.source.adapter

    @property
    def base(self) -> Base | None:
        """The base that it was prepared with."""
        return self._work.source.against.base

    @property
    def nbytes(self) -> int:
        """About the bytes of memory that it takes."""
        tensors = 0 if self.adapter.store.files else self.adapter.store.nbytes
        spectra = [pending.result() for layers in self._work.spectra.values() for pending in layers]
        parts = [part for of_layer in spectra for part in (of_layer.sigma, of_layer.left, of_layer.right)]
        return tensors + sum(part.numel() * part.element_size() for part in parts if part is not None)

    def at(self, recipe: str | Recipe, *, dtype: str = "same") -> Outcome:
        """What a recipe makes of the adapter: exact size, error and ranks. No tensor is computed.

        Raises RecipeError (it keeps nothing, cannot reach its size, or needs what was not given) or UsageError.
        """
        recipe, dtype = self._checked(recipe), checked_dtype(dtype)

        def outcome() -> Outcome:
            outline = self._outline(recipe, dtype)
            selection = outline.chosen(outline.select())
            layers = layer_plans(self._facts(recipe, dtype)[recipe.calibrated], outline, selection)
            error, energy = relative_error(layers), kept_energy(recipe, layers)
            return Outcome(
                recipe=str(recipe),
                dtype=dtype,
                threshold=selection.threshold,
                bytes=outline.size(selection.widths, selection.threshold, selection.dtypes),
                relative_error=error,
                energy=1 - error**2 if energy is None else energy,
                ranks={layer.layer.name: layer.layer.rank if layer.stays else layer.width for layer in layers},
                copied=len(outline.verbatim),
                predicted_db=prediction(recipe, layers)[1],
            )

        return self._outcomes.get((str(recipe), dtype), outcome)

    def curve(self, score: str = "bytes", *, dtype: str = "same", points: int = 24) -> Curve:
        """Size against error for a score without a selection, such as `fro_ckpt,bytes`. Raises as `at`."""
        outline = self._outline(self._checked(f"{score},thr=0"), checked_dtype(dtype))
        joined = sorted((float(value) for values in outline.scores for value in values), reverse=True)
        scores = [value for value in joined if math.isfinite(value)]
        shares = [_LEAST_SHARE ** (1 - step / (points - 1)) for step in range(points)]
        counts = sorted({max(1, round(share * len(scores))) for share in shares}) if scores else []
        outcomes = [self.at(f"{score},thr={scores[count - 1]!r}", dtype=dtype) for count in counts]
        by_size = dict(sorted({outcome.bytes: outcome for outcome in outcomes}.items()))
        return Curve(str(self.adapter.path), self.adapter.store.nbytes, tuple(by_size.values()))

    def state_dict(self, recipe: str | Recipe, *, dtype: str = "same") -> dict[str, Tensor]:
        """The tensors of the file that `resize` would write, on the CPU.

        Raises as `at`, and OutputError if numbers do not fit the dtype.
        """
        recipe, dtype = self._checked(recipe), checked_dtype(dtype)
        with worker_pool(self._options.jobs) as pool:
            return compute(self._plan(recipe, dtype), pool=pool, device=self._device)[0]

    def shrink(self, recipe: str | Recipe, *, dtype: str = "same") -> FileResult:
        """The report of `resize` without a file: `state_dict` and `metadata` are what would be in it.

        Raises as `state_dict`.
        """
        recipe, dtype = self._checked(recipe), checked_dtype(dtype)
        planned = self._plan(recipe, dtype)
        with worker_pool(self._options.jobs) as pool:
            tensors, warnings = compute(planned, pool=pool, device=self._device)
        arrangement = planned.arrangement

        def data() -> Iterator[memoryview]:
            for name in arrangement.offsets:
                yield memory_of(tensors[name].contiguous().reshape(-1).view(torch.uint8))

        metadata = with_hashes(planned.metadata, arrangement, data())
        result = file_result(planned, _OUTPUT, started=self._work.started, warnings=warnings)
        return replace(result, output="", state_dict=tensors, metadata=metadata, settings=planned.settings)

    def save(self, recipe: str | Recipe, output: str | Path, *, dtype: str = "same", force: bool = False) -> FileResult:
        """Write the shrunk adapter, the same file as `resize` does. Raises as `state_dict`, and OutputError."""
        recipe, dtype, path = self._checked(recipe), checked_dtype(dtype), Path(output)
        check_output(path, force=force, inputs=list(self.adapter.store.files))
        planned = self._plan(recipe, dtype)
        with worker_pool(self._options.jobs) as pool:
            warnings = write({path: planned}, pool=pool, device=self._device)[path].warnings
        return file_result(planned, path, started=self._work.started, warnings=warnings)

    def close(self) -> None:
        """Close the adapter's file, which otherwise is closed when nobody uses this any more."""
        self.adapter.close()

    def __enter__(self) -> Prepared:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"Prepared({self.adapter.path}, {len(self._work.adapter)} layers)"

    # --- answers --------------------------------------------------------------------------------

    @property
    def _device(self) -> str:
        return self._work.source.session.device

    def _checked(self, recipe: str | Recipe) -> Recipe:
        parsed = recipe if isinstance(recipe, Recipe) else Recipe.parse(recipe)
        check_calibration([parsed], self._options.calibration)
        if parsed.needs_base and self._work.source.against.base is None:
            raise RecipeError(f"recipe '{parsed}' needs the base checkpoint; prepare the adapter with base=.")
        return parsed

    def _work_for(self, recipe: Recipe, dtype: str, pool: Executor | None = None) -> Work:
        source = self._work.source
        options = replace(source.session.options, dtype=dtype)
        session = replace(source.session, options=options, pool=pool or source.session.pool)
        source = replace(source, session=session, variant=source_variant(source.path, session))
        return replace(self._work, source=source, outputs={_OUTPUT: recipe})

    def _facts(self, recipe: Recipe, dtype: str) -> Mapping[bool, Decomposed]:
        def look_up() -> Mapping[bool, Decomposed]:
            with worker_pool(self._options.jobs) as pool:  # norms of the base, and alignments
                return self._work_for(recipe, dtype, pool).decomposed()

        return self._decomposed.get((recipe.base_norms, "weight" in recipe.needs), look_up)

    def _outline(self, recipe: Recipe, dtype: str) -> Outline:
        """The outline of the recipe; recipes that differ in their selections alone share one."""
        key = (recipe.weights, tuple(sorted(recipe.modifiers.items())), dtype)
        facts = self._facts(recipe, dtype)
        return self._outlines.get(key, lambda: self._work_for(recipe, dtype).outline(facts, recipe)).of(recipe)

    def _plan(self, recipe: Recipe, dtype: str) -> Plan:
        return plan(self._facts(recipe, dtype)[recipe.calibrated], self._outline(recipe, dtype))


class _Memory(Generic[T]):
    """The latest answers whose sizes add up to no more than a limit."""

    def __init__(self, limit: int, size: Callable[[T], int] = lambda answer: 1) -> None:
        self._limit, self._size = limit, size
        self._answers: OrderedDict[Hashable, tuple[int, T]] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: Hashable, compute: Callable[[], T]) -> T:
        """The answer for the key, computed if it is not remembered."""
        with self._lock:
            if key in self._answers:
                self._answers.move_to_end(key)
                return self._answers[key][1]
        answer = compute()
        with self._lock:
            self._answers[key] = (self._size(answer), answer)
            self._answers.move_to_end(key)
            while len(self._answers) > 1 and sum(size for size, _ in self._answers.values()) > self._limit:
                self._answers.popitem(last=False)
        return answer


_remembered: _Memory[Prepared] = _Memory(REMEMBERED_BYTES, lambda prepared: prepared.nbytes)


def prepare(
    adapter: Source,
    *,
    base: str | Path | Mapping[str, Tensor] | Base | None = None,
    calibration: str | Path | None = None,
    form: str = "auto",
    unmapped: str = "keep",
    device: str = "auto",
    jobs: int | None = None,
    progress: Progress | None = None,
) -> Prepared:
    """Decompose an adapter once, so that sizes, errors and tensors for any recipe follow quickly.

    adapter: a path, a weighted sum of paths such as `A:0.7,B:0.5`, a mapping of names to tensors,
        `Tensors`, a PeftModel, or a diffusers pipeline with one adapter.
    base: also the tensors of a model by their names, or what `open_base` returns, which stays open.
    Other options are those of `resize`.

    The adapters that were prepared last are remembered by their contents, up to `REMEMBERED_BYTES`. Raises as
    `resize`; a file that is missing or damaged is an error.
    """
    held = in_memory(adapter)
    entry = str(adapter) if held is None else ""
    terms = to_sum([entry]) if entry and is_sum(entry) else None
    source = held or (terms.path if terms else only_adapter(entry))
    opened = base if isinstance(base, Base) or base is None else open_base(base)
    options = ResizeOptions(
        base=opened, calibration=calibration, form=form, unmapped=unmapped, device=device, jobs=jobs, dry_run=True
    )
    path = Path(str(source))
    recipes = [_ALL, _ALL_CALIBRATED] if calibration is not None else [_ALL]
    outputs = {Path(str(number)): recipe for number, recipe in enumerate(recipes)}
    job = Job(
        {path: outputs},
        options,
        opener=lambda path, base: combined(terms, base) if terms else open_adapter(source),
        variant=variant_of() if terms else "",
    )
    with open_session(job, progress=progress) as session:
        against = session.base_of(path)
        current = OpenSource.open(path, against, session, load=False)

        def decompose() -> Prepared:
            work = replace(Work.begin(current, outputs), started=time.perf_counter())
            work.decompose()
            work.decomposed()  # waits, and raises what a layer raises
            return Prepared(work, options)

        prepared = None
        try:
            key = (current.sha256.result(), against.fingerprint, session.variant, session.device, path)
            prepared = _remembered.get(key, decompose)
        finally:
            if prepared is None or prepared.adapter is not current.adapter:
                current.close()
        return prepared
