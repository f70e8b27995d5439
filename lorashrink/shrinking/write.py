"""Writing the outputs of one adapter: computed, written, read back and compared before a file gets its name."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Executor
from contextlib import ExitStack
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from lorashrink.adapters import Layer, adapter_of, peft
from lorashrink.engine.delta import AnyDelta, Delta
from lorashrink.engine.gram import grams
from lorashrink.engine.spectrum import truncate
from lorashrink.errors import OutputError
from lorashrink.files import hashes
from lorashrink.files.in_memory import MemoryStore
from lorashrink.files.store import TensorStore, torch_dtype
from lorashrink.files.writing import SafetensorsWriter
from lorashrink.shrinking.plan import LayerPlan, Plan
from lorashrink.shrinking.remarks import below_precision

# Relative difference of a layer's norm before and after rounding to the dtype that still is rounding.
_NORM_TOLERANCE = {"F64": 1e-6, "F32": 1e-5, "F16": 1e-2, "BF16": 2e-2}

# What rounding may take from a layer whose numbers are too small for the dtype, as a part of the file's norm: far less
# than it takes from the others.
_NEGLIGIBLE = 1e-5

_CHUNK = 16  # layers per task

Progress = Callable[[int, int], None]  # (steps done, steps in all)

T = TypeVar("T")
R = TypeVar("R")


def write(
    plans: Mapping[Path, Plan],
    *,
    pool: Executor,
    device: str = "cpu",
    progress: Progress | None = None,
) -> dict[Path, list[str]]:
    """Compute and write the outputs of one adapter; each layer is read once for all of them.

    Every file is complete, checked against the norms of its input and on the disk before it gets its name. Returns
    warnings by output, about layers whose numbers are too small for the dtype. Raises OutputError, after which no
    unfinished output of this adapter is left.
    """
    warnings = {}
    layers = next(iter(plans.values())).adapter.layers
    steps = _Steps(progress, len(layers) + sum(len(plan.written) for plan in plans.values()))
    with ExitStack() as stack:
        pairs = [
            (plan, stack.enter_context(SafetensorsWriter(path, plan.arrangement, plan.metadata, in_memory=True)))
            for path, plan in plans.items()
        ]
        _run(pool, _chunks(range(len(layers))), lambda chunk: _write_layers(chunk, pairs, device), steps)
        for plan, writer in pairs:
            for key in plan.verbatim:
                writer.copy(key, plan.adapter.store, key)
        # Hashing is one thread's work; it goes on while the others read the files back.
        hashed = [
            pool.submit(hashes.with_hashes, plan.metadata, plan.arrangement, writer.data_chunks)
            for plan, writer in pairs
        ]
        for (plan, writer), entries in zip(pairs, hashed, strict=True):
            writer.flush()
            with writer.opened() as store:
                warnings[writer.path] = _verify(plan, writer.path, writer.readable_names(), store, pool, steps)
            writer.replace_metadata(entries.result())
            folder = writer.path.parent
            writer.commit({folder / peft.CONFIG_FILE: peft.to_file(plan.settings)} if plan.adapter.as_folder else None)
    return warnings


def compute(plan: Plan, *, pool: Executor, device: str = "cpu") -> tuple[dict[str, Tensor], list[str]]:
    """(the tensors of an output on the CPU, warnings as those of `write`), checked in the same way but not written.

    Raises OutputError as `write`.
    """
    layers, store = plan.adapter.layers, plan.adapter.store
    tensors = {key: store.read(key).clone() for key in plan.verbatim}

    def of_chunk(chunk: Sequence[int]) -> dict[str, Tensor]:
        planned = (plan.written[index] for index in chunk if index in plan.written)
        return {key: value for layer in planned for key, value in _values(plan, layer, layer.layer.delta, device)}

    for values in _run(pool, _chunks(range(len(layers))), of_chunk, _Steps(None, 0)):
        tensors |= values
    made = MemoryStore(str(plan.adapter.path), tensors, plan.metadata)
    return tensors, _verify(plan, Path("the shrunk adapter"), set(tensors), made, pool, _Steps(None, 0))


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


def _write_layers(indices: Sequence[int], pairs: Sequence[tuple[Plan, SafetensorsWriter]], device: str) -> None:
    for index in indices:
        delta = None
        for plan, writer in pairs:
            if planned := plan.written.get(index):
                delta = delta or planned.layer.delta
                _write_layer(plan, planned, delta, writer, device)


def _write_layer(plan: Plan, planned: LayerPlan, delta: AnyDelta, writer: SafetensorsWriter, device: str) -> None:
    for key, value in _values(plan, planned, delta, device):
        writer.write(key, value)


def _values(plan: Plan, planned: LayerPlan, delta: AnyDelta, device: str) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a layer that is written anew, in their dtypes."""
    layer, width, scale = planned.layer, planned.width, plan.baked(planned)
    up, down = truncate(
        delta, planned.spectrum, planned.kept, factors=planned.caps, width=width, scale=scale, device=device
    )
    _, family, keys, infos = planned.form
    assert family.written
    values = dict(family.pack(up, down) if family.pack else {"up": up, "down": down})
    values["alpha"] = torch.tensor(float(plan.alpha))
    if "bias" in keys:
        # read at the scale of the factors, which is inside them now
        values["bias"] = layer.store.read(keys["bias"]).float() * (layer.scale * scale)
    for role in (*family.written(infos, width), *({"bias"} & keys.keys())):
        info = plan.tensors[keys[role]]
        yield keys[role], values[role].to(torch_dtype(info.dtype)).reshape(info.shape)


def _verify(plan: Plan, path: Path, names: set[str], store: TensorStore, pool: Executor, steps: _Steps) -> list[str]:
    """Open the output as every loader does, and compare the norm of each layer with the input's; warnings."""
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
    written = {layer.name: layer for layer in adapter_of(path, store, plan.settings)}
    flushed = _run(pool, chunks, lambda chunk: _check_norms(plan, path, written, chunk), steps)
    return below_precision([name for names in flushed for name in names])


def _check_norms(plan: Plan, path: Path, written: Mapping[str, Layer], chunk: Sequence[LayerPlan]) -> list[str]:
    """Compare what a reader of the file gets, scale included, with what was to be kept.

    Returns the names of layers whose numbers are too small for the dtype, where that is nothing beside the file.
    """
    layers = [written[planned.form.name] for planned in chunk]
    deltas = [layer.delta for layer in layers]
    squares = grams([delta for delta in deltas if isinstance(delta, Delta)], torch.device("cpu")).squares()[0].tolist()
    rescale, flushed = abs(plan.recipe.rescale), []
    for planned, layer, square in zip(chunk, layers, squares, strict=True):
        tolerance = _NORM_TOLERANCE[layer.dtype]
        norm = abs(layer.scale) * math.sqrt(max(0.0, square))  # NaN, if a number overflowed, compares as wrong
        expected = rescale * planned.norm
        # Singular values cannot vouch for themselves: the norm of the input, less what was cut off, must be left.
        remaining = rescale * planned.remaining
        if abs(norm - expected) <= tolerance * expected and (
            abs(norm**2 - remaining**2) <= 2 * tolerance * rescale**2 * planned.total
        ):
            continue
        if not abs(norm - expected) <= _NEGLIGIBLE * rescale * plan.norm:
            raise OutputError(
                f"{path}: layer {layer.name} has norm {norm:.4g} after writing, {expected:.4g} before. "
                "Its numbers do not fit the dtype; use -t fp32 or -t bf16. Nothing was written."
            )
        flushed.append(layer.name)
    return flushed
