"""Writing the outputs of one adapter: computed, written, read back and compared before a file gets its name."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, wait
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from lorashrink.adapters import Adapter, adapter_of, peft
from lorashrink.engine.accelerators import computed
from lorashrink.engine.delta import AnyDelta, Delta, Experts
from lorashrink.engine.devices import core_device
from lorashrink.engine.gram import product_squares
from lorashrink.engine.rounding import to_float8
from lorashrink.engine.spectrum import Cut, truncate_together
from lorashrink.errors import OutputError
from lorashrink.files.store import DTYPES, ComputedStore, TensorStore, torch_dtype
from lorashrink.files.writing import SafetensorsWriter
from lorashrink.shrinking.layout import FP8
from lorashrink.shrinking.plan import LayerPlan, Plan
from lorashrink.shrinking.remarks import below_precision

# Relative difference of a layer's norm before and after rounding to the dtype that still is rounding.
_NORM_TOLERANCE = {"F64": 1e-6, "F32": 1e-5, "F16": 1e-2, "BF16": 2e-2, "F8_E4M3": 1e-3}

# What rounding to 8 bits may change of a layer, as a part of its norm; and of a layer that changes more, as a part of
# the file's.
_COARSEST, _COARSEST_IN_FILE = 0.4, 1e-2

# What rounding may take from a layer whose numbers are too small for the dtype, as a part of the file's norm: far less
# than it takes from the others.
NEGLIGIBLE = 1e-5

_CHUNK_LAYERS, _CHUNK_BYTES = 16, 1 << 25  # of a task, at most

Progress = Callable[[int, int], None]  # (steps done, steps in all)

Changes = dict[int, float]  # index of a layer -> ‖ΔW'' − ΔW'‖_F by rounding to 8 bits


class Written(NamedTuple):
    """An output that was written and read back."""

    adapter: Adapter  # as a reader of the file finds it; the file is closed
    warnings: list[str]  # about layers whose numbers are too small for the dtype


def write(
    plans: Mapping[Path, Plan],
    *,
    pool: Executor,
    device: str = "cpu",
    progress: Progress | None = None,
) -> dict[Path, Written]:
    """Compute and write the outputs of one adapter; each layer is read once for all of them.

    Every file is complete, checked against the norms of its input and on the disk before it gets its name. Raises
    OutputError, after which no unfinished output of this adapter is left.
    """
    written = {}
    source = next(iter(plans.values())).adapter
    with ExitStack() as stack:
        outputs = [_Output.begin(path, plan, device, stack) for path, plan in plans.items()]

        def write_layers(chunk: Sequence[int]) -> None:
            deltas: dict[int, AnyDelta] = {}
            with source.reading(index for index in chunk if any(index in plan.written for plan in plans.values())):
                for plan, writer, checks in outputs:
                    writer.write(dict(_values(plan, chunk, deltas, device, checks.changes)))
                    checks.check(chunk)

        _run(pool, _chunks(source), write_layers, _Steps(progress, len(source)))
        for plan, writer, _ in outputs:
            for key in plan.verbatim:
                writer.copy(key, plan.adapter.store, key)
        for plan, writer, checks in outputs:
            writer.flush()
            checks.check_names(writer.readable_names())
            checks.adapter.close()
            written[writer.path] = Written(checks.adapter, checks.warnings())
            writer.write_hashes()
            folder = writer.path.parent
            writer.commit({folder / peft.CONFIG_FILE: peft.to_file(plan.settings)} if plan.adapter.as_folder else None)
    return written


def compute(plan: Plan, *, pool: Executor, device: str = "cpu") -> tuple[dict[str, Tensor], list[str]]:
    """(the tensors of an output on the CPU, the warnings of `Written`), checked in the same way but not written.

    Raises OutputError as `write`.
    """
    store = plan.adapter.store
    tensors = {key: store.read(key).clone() for key in plan.verbatim}
    computed = {key: (info, partial(tensors.__getitem__, key)) for key, info in plan.tensors.items()}
    path = Path("the shrunk adapter")
    checks = _Checks(plan, path, ComputedStore(plan.adapter.path, computed, plan.metadata, ()), device)

    def compute_layers(chunk: Sequence[int]) -> None:
        tensors.update(_values(plan, chunk, {}, device, checks.changes))
        checks.check(chunk)

    _run(pool, _chunks(plan.adapter), compute_layers, _Steps(None, len(plan.adapter)))
    checks.check_names(set(tensors))
    return tensors, checks.warnings()


class _Output(NamedTuple):
    """A file that is being written."""

    plan: Plan
    writer: SafetensorsWriter
    checks: _Checks

    @classmethod
    def begin(cls, path: Path, plan: Plan, device: str, stack: ExitStack) -> _Output:
        """Create the file, which is removed at the end of the stack unless it is complete then."""
        writer = stack.enter_context(SafetensorsWriter(path, plan.arrangement, plan.metadata, in_memory=True))
        return cls(plan, writer, _Checks(plan, path, stack.enter_context(writer.opened()), device))


class _Steps:
    def __init__(self, report: Progress | None, total: int) -> None:
        self.report, self.total, self.done = report, total, 0

    def __call__(self, count: int) -> None:
        self.done += count
        if self.report:
            self.report(self.done, self.total)


def _chunks(adapter: Adapter) -> list[list[int]]:
    """The layers in chunks of neighbours, which are in memory together."""
    chunks: list[list[int]] = [[]]
    nbytes = 0
    for index, layer in enumerate(adapter.layers):
        size = 4 * layer.width * layer.numbers  # of its factors, which may be far more than what is stored
        if chunks[-1] and (len(chunks[-1]) == _CHUNK_LAYERS or nbytes + size > _CHUNK_BYTES):
            chunks.append([])
            nbytes = 0
        chunks[-1].append(index)
        nbytes += size
    return chunks


def _run(pool: Executor, chunks: Sequence[Sequence[int]], task: Callable[[Sequence[int]], None], steps: _Steps) -> None:
    """Do the task for every chunk, in the pool; the first error stops the rest."""
    futures = [pool.submit(task, chunk) for chunk in chunks]
    try:
        for chunk, future in zip(chunks, futures, strict=True):
            future.result()
            steps(len(chunk))
    finally:
        wait([future for future in futures if not future.cancel()])  # those that run have files open


def _values(
    plan: Plan, indices: Sequence[int], deltas: dict[int, AnyDelta], device: str, changes: Changes
) -> Iterator[tuple[str, Tensor]]:
    """The tensors of layers that are written anew, in their dtypes.

    `deltas` has the ΔW that were read before, and gets the others; `changes` gets what rounding changed.
    """
    written = [plan.written[index] for index in indices if index in plan.written]
    cuts = []
    for planned in written:
        delta = deltas[planned.index] = deltas.get(planned.index) or planned.layer.delta
        cuts.append(Cut(delta, planned.spectrum, planned.kept, planned.caps, planned.width, plan.baked(planned)))
    for planned, (up, down) in zip(written, truncate_together(cuts, device), strict=True):
        layer, scale = planned.layer, plan.baked(planned)
        if planned.dtype == FP8:
            rounded = to_float8(up, down, *(planned.energies() or ()))
            up, down = rounded.up, rounded.down
            # readers multiply with what the factors lack
            changes[planned.index] = rounded.error * abs(plan.recipe.rescale / scale)
        _, family, keys, infos = planned.form
        assert family.written
        values = dict(family.pack(up, down) if family.pack else {"up": up, "down": down})
        values["alpha"] = torch.tensor(float(plan.alpha))
        if "bias" in keys:
            # read at the scale of the factors, which is inside them now
            values["bias"] = layer.store.read(keys["bias"]).float() * (layer.scale * scale)
        for role in (*family.written(infos, planned.width), *({"bias"} & keys.keys())):
            info = plan.tensors[keys[role]]
            yield keys[role], values[role].to(torch_dtype(info.dtype)).reshape(info.shape)


class _Checks:
    """Compares an output, as every program opens it, with its plan and with the norms of its input.

    store: what is written; a layer is read when it is checked, and no sooner.
    """

    def __init__(self, plan: Plan, path: Path, store: TensorStore, device: str) -> None:
        self.adapter = adapter_of(path, store, plan.settings)
        self.changes: Changes = {}  # to be filled
        self._plan, self._path, self._device = plan, path, core_device(device)
        self._layers = {layer.name: layer for layer in self.adapter}
        self._too_weak: dict[int, str] = {}

    def check(self, indices: Sequence[int]) -> None:
        """Compare the norms of layers, by their index. Raises OutputError where they differ."""
        by_width: dict[int, list[LayerPlan]] = defaultdict(list)
        for index in indices:
            if planned := self._plan.written.get(index):
                by_width[planned.width].append(planned)
        written = [self._layers[planned.form.name] for layers in by_width.values() for planned in layers]
        with self.adapter.store.together(key for layer in written for key in layer.keys.values()):
            for layers in by_width.values():
                # On a CPU float32 takes half the time, and tells nearly always that all is well.
                quick = self._device.type == "cpu" and all(DTYPES[layer.dtype][0] <= 2 for layer in layers)
                doubtful = [layer for layer, _ in self._differing(layers, torch.float32)] if quick else layers
                for layer, norm in self._differing(doubtful, torch.float64) if doubtful else ():
                    self._note_or_refuse(layer, norm)

    def check_names(self, names: set[str]) -> None:
        """Compare the names of all tensors. Raises OutputError where they differ from the planned ones."""
        plan = self._plan
        by_name = {layer.name: layer for layer in plan.adapter.layers}
        gone = {key for name in plan.removed for key in (by_name[name].keys.values() if name in by_name else [name])}
        replaced = {key for planned in plan.written.values() for key in planned.layer.keys.values()}
        stored = plan.adapter.store.tensors.keys()
        if names != set(plan.tensors) or not gone & stored <= stored - names <= gone | replaced:
            raise OutputError(f"{self._path}: the written file has other tensors than planned; please report this.")

    def warnings(self) -> list[str]:
        """About layers whose numbers are too small for the dtype."""
        return below_precision([name for _, name in sorted(self._too_weak.items())])

    def _differing(self, layers: Sequence[LayerPlan], dtype: torch.dtype) -> list[tuple[LayerPlan, float]]:
        """The layers, all of one width, whose norm is not the expected one, and that norm, computed in `dtype`."""
        rescale = abs(self._plan.recipe.rescale)
        written = [self._layers[planned.form.name] for planned in layers]
        deltas = [delta for layer in written for delta in [layer.delta] if isinstance(delta, Delta | Experts)]
        squares = computed(partial(_squares, dtype=dtype), deltas, self._device)
        differing = []
        for planned, layer, square in zip(layers, written, squares, strict=True):
            norm = abs(layer.scale) * math.sqrt(max(square, 0.0))  # NaN, if a number overflowed
            expected = rescale * planned.norm
            # a norm moves by no more than what rounding changed, and mostly by far less
            change = self.changes.get(planned.index, 0.0)
            tolerance = _NORM_TOLERANCE[planned.dtype] + (change / expected if expected else 0.0)
            # Singular values cannot vouch for themselves: the norm of the input, less what was cut off, must be left.
            remaining = rescale * planned.remaining
            if not (
                change <= _COARSEST * expected
                and abs(norm - expected) <= tolerance * expected
                and abs(norm**2 - remaining**2) <= (2 + tolerance) * tolerance * rescale**2 * planned.total
            ):
                differing.append((planned, norm))
        return differing

    def _note_or_refuse(self, planned: LayerPlan, norm: float) -> None:
        """Note a layer that differs where that is nothing beside the file. Raises OutputError otherwise."""
        rescale, change = abs(self._plan.recipe.rescale), self.changes.get(planned.index, 0.0)
        name, expected = self._layers[planned.form.name].name, rescale * planned.norm
        negligible = _COARSEST_IN_FILE if change else NEGLIGIBLE
        if math.isnan(norm) or max(change, abs(norm - expected)) > negligible * rescale * self._plan.norm:
            raise OutputError(
                f"{self._path}: layer {name} has norm {norm:.4g} after writing, {expected:.4g} before. "
                f"Its numbers do not fit the dtype; use -t {'fp16' if change else 'fp32 or -t bf16'}. "
                "Nothing was written."
            )
        self._too_weak[planned.index] = name


def _squares(deltas: Sequence[Delta | Experts], device: torch.device, dtype: torch.dtype) -> list[float]:
    """‖up · down‖_F² of each layer, of all its experts together; they are of equal rank."""
    parts = [delta.parts if isinstance(delta, Experts) else [delta] for delta in deltas]
    squares = iter(product_squares([part for of_layer in parts for part in of_layer], device, dtype))
    return [sum(next(squares) for _ in of_layer) for of_layer in parts]
