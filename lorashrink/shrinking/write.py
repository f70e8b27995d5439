"""Writing the outputs of one adapter: computed, written, read back and compared before a file gets its name."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Executor
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from lorashrink.adapters import Adapter, Layer, adapter_of, peft
from lorashrink.engine.accelerators import computed
from lorashrink.engine.delta import AnyDelta, Delta, Experts
from lorashrink.engine.devices import core_device
from lorashrink.engine.gram import grams
from lorashrink.engine.rounding import to_float8
from lorashrink.engine.spectrum import Cut, truncate_together
from lorashrink.errors import OutputError
from lorashrink.files import hashes
from lorashrink.files.in_memory import MemoryStore
from lorashrink.files.store import TensorStore, torch_dtype
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

_CHUNK = 16  # layers per task

Progress = Callable[[int, int], None]  # (steps done, steps in all)

T = TypeVar("T")
R = TypeVar("R")

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
    layers = next(iter(plans.values())).adapter.layers
    steps = _Steps(progress, len(layers) + sum(len(plan.written) for plan in plans.values()))
    with ExitStack() as stack:
        outputs = [
            _Output(
                plan, stack.enter_context(SafetensorsWriter(path, plan.arrangement, plan.metadata, in_memory=True)), {}
            )
            for path, plan in plans.items()
        ]
        # A GPU computes many layers at once, which are in memory together.
        together = 1 if core_device(device).type == "cpu" else _CHUNK

        def write_layers(chunk: Sequence[int]) -> None:
            for start in range(0, len(chunk), together):
                deltas: dict[int, AnyDelta] = {}
                for plan, writer, changes in outputs:
                    for key, value in _values(plan, chunk[start : start + together], deltas, device, changes):
                        writer.write(key, value)

        _run(pool, _chunks(range(len(layers))), write_layers, steps)
        for plan, writer, _ in outputs:
            for key in plan.verbatim:
                writer.copy(key, plan.adapter.store, key)
        # Hashing is one thread's work; it goes on while the others read the files back.
        hashed = [
            pool.submit(hashes.with_hashes, plan.metadata, plan.arrangement, writer.data_chunks)
            for plan, writer, _ in outputs
        ]
        for (plan, writer, changes), entries in zip(outputs, hashed, strict=True):
            writer.flush()
            with writer.opened() as store:
                names = writer.readable_names()
                written[writer.path] = _verify(plan, writer.path, names, store, changes, pool, device, steps)
            writer.replace_metadata(entries.result())
            folder = writer.path.parent
            writer.commit({folder / peft.CONFIG_FILE: peft.to_file(plan.settings)} if plan.adapter.as_folder else None)
    return written


def compute(plan: Plan, *, pool: Executor, device: str = "cpu") -> tuple[dict[str, Tensor], list[str]]:
    """(the tensors of an output on the CPU, the warnings of `Written`), checked in the same way but not written.

    Raises OutputError as `write`.
    """
    layers, store = plan.adapter.layers, plan.adapter.store
    tensors = {key: store.read(key).clone() for key in plan.verbatim}
    changes: Changes = {}

    def of_chunk(chunk: Sequence[int]) -> dict[str, Tensor]:
        return dict(_values(plan, chunk, {}, device, changes))

    for values in _run(pool, _chunks(range(len(layers))), of_chunk, _Steps(None, 0)):
        tensors |= values
    output = MemoryStore(str(plan.adapter.path), tensors, plan.metadata)
    name = Path("the shrunk adapter")
    return tensors, _verify(plan, name, set(tensors), output, changes, pool, device, _Steps(None, 0)).warnings


class _Output(NamedTuple):
    """A file that is being written."""

    plan: Plan
    writer: SafetensorsWriter
    changes: Changes


class _Steps:
    def __init__(self, report: Progress | None, total: int) -> None:
        self.report, self.total, self.done = report, total, 0

    def __call__(self, count: int) -> None:
        self.done += count
        if self.report:
            self.report(self.done, self.total)


def _chunks(items: Sequence[T]) -> list[Sequence[T]]:
    return [items[start : start + _CHUNK] for start in range(0, len(items), _CHUNK)]


def _run(pool: Executor, chunks: Sequence[Sequence[T]], task: Callable[[Sequence[T]], R], steps: _Steps) -> list[R]:
    """What the task returns for every chunk, in the pool; the first error stops the rest."""
    futures = [pool.submit(task, chunk) for chunk in chunks]
    results = []
    try:
        for chunk, future in zip(chunks, futures, strict=True):
            results.append(future.result())
            steps(len(chunk))
        return results
    finally:
        for future in futures:
            future.cancel()


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


def _verify(
    plan: Plan,
    path: Path,
    names: set[str],
    store: TensorStore,
    changes: Changes,
    pool: Executor,
    device: str,
    steps: _Steps,
) -> Written:
    """Open the output as every loader does, and compare the norm of each layer with the input's."""
    by_name = {layer.name: layer for layer in plan.adapter.layers}
    gone = {key for name in plan.removed for key in (by_name[name].keys.values() if name in by_name else [name])}
    replaced = {key for planned in plan.written.values() for key in planned.layer.keys.values()}
    stored = plan.adapter.store.tensors.keys()
    if names != set(plan.tensors) or not gone & stored <= stored - names <= gone | replaced:
        raise OutputError(f"{path}: the written file has other tensors than planned; please report this.")
    by_width: dict[int, list[LayerPlan]] = defaultdict(list)
    for planned in plan.written.values():
        by_width[planned.width].append(planned)
    chunks = [chunk for layers in by_width.values() for chunk in _chunks(layers)]
    adapter = adapter_of(path, store, plan.settings)
    layers = {layer.name: layer for layer in adapter}
    flushed = _run(pool, chunks, lambda chunk: below_tolerance(plan, path, changes, layers, chunk, device), steps)
    return Written(adapter, below_precision([name for names in flushed for name in names]))


def below_tolerance(
    plan: Plan, path: Path, changes: Changes, written: Mapping[str, Layer], chunk: Sequence[LayerPlan], device: str
) -> list[str]:
    """The names of layers whose numbers are too small for the dtype, where that is nothing beside the file.

    The norms of layers of one width as a reader of the file gets them, scale included, are compared with what was to
    be kept. Raises OutputError where they differ otherwise.
    """
    layers = [written[planned.form.name] for planned in chunk]
    deltas = [delta for layer in layers for delta in [layer.delta] if isinstance(delta, Delta | Experts)]
    squares = computed(_squares, deltas, core_device(device))
    rescale, flushed = abs(plan.recipe.rescale), []
    for planned, layer, square in zip(chunk, layers, squares, strict=True):
        norm = abs(layer.scale) * math.sqrt(max(square, 0.0))  # NaN, if a number overflowed
        expected = rescale * planned.norm
        # a norm moves by no more than what rounding changed, and mostly by far less
        change = changes.get(planned.index, 0.0)
        tolerance = _NORM_TOLERANCE[planned.dtype] + (change / expected if expected else 0.0)
        # Singular values cannot vouch for themselves: the norm of the input, less what was cut off, must be left.
        remaining = rescale * planned.remaining
        if change <= _COARSEST * expected and (
            abs(norm - expected) <= tolerance * expected
            and abs(norm**2 - remaining**2) <= (2 + tolerance) * tolerance * rescale**2 * planned.total
        ):
            continue
        negligible = _COARSEST_IN_FILE if change else NEGLIGIBLE
        if math.isnan(norm) or max(change, abs(norm - expected)) > negligible * rescale * plan.norm:
            raise OutputError(
                f"{path}: layer {layer.name} has norm {norm:.4g} after writing, {expected:.4g} before. "
                f"Its numbers do not fit the dtype; use -t {'fp16' if change else 'fp32 or -t bf16'}. "
                "Nothing was written."
            )
        flushed.append(layer.name)
    return flushed


def _squares(deltas: Sequence[Delta | Experts], device: torch.device) -> list[float]:
    """‖up · down‖_F² of each layer, of all its experts together; they are of equal rank."""
    parts = [delta.parts if isinstance(delta, Experts) else [delta] for delta in deltas]
    squares = grams([part for of_layer in parts for part in of_layer], device).squares()[0]
    return [float(of_layer.sum()) for of_layer in torch.split(squares.cpu(), list(map(len, parts)))]
