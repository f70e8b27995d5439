"""Writing the outputs of one adapter: computed, written, read back and compared before a file gets its name."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor
from contextlib import ExitStack
from pathlib import Path

import torch

from lorashrink.adapters import Layer, adapter_of, peft
from lorashrink.engine.delta import AnyDelta, Delta
from lorashrink.engine.gram import grams
from lorashrink.engine.spectrum import truncate
from lorashrink.errors import OutputError
from lorashrink.files import hashes
from lorashrink.files.disk import write_bytes
from lorashrink.files.reading import open_tensors
from lorashrink.files.store import torch_dtype
from lorashrink.files.writing import SafetensorsWriter
from lorashrink.shrinking.plan import Plan

# Relative difference of a layer's norm before and after rounding to the dtype that still is rounding.
_NORM_TOLERANCE = {"F64": 1e-6, "F32": 1e-5, "F16": 1e-2, "BF16": 2e-2}

_CHUNK = 16  # layers per task

Progress = Callable[[int, int], None]


def write(
    plans: Mapping[Path, Plan],
    *,
    pool: Executor,
    device: str = "cpu",
    progress: Progress | None = None,
) -> None:
    """Compute and write the outputs of one adapter; each layer is read once for all of them.

    Every file is complete, checked against its spectrum and on the disk before it gets its name. Raises
    OutputError, after which no part of any output of this adapter is left that was not finished.
    """
    first = next(iter(plans.values()))
    layers = first.decomposed.adapter.layers
    chunks = [range(start, min(start + _CHUNK, len(layers))) for start in range(0, len(layers), _CHUNK)]
    checks = sum(len(each.places) for each in plans.values())
    steps = _Steps(progress, len(layers) + checks)
    with ExitStack() as stack:
        pairs = [
            (each, stack.enter_context(SafetensorsWriter(path, each.tensors, each.metadata)))
            for path, each in plans.items()
        ]
        _run(pool, chunks, lambda chunk: _write_layers(chunk, pairs, device), steps)
        for each, writer in pairs:
            for key in each.verbatim:
                writer.copy(key, each.decomposed.adapter.store, key)
        # Hashing is one thread's work; it goes on while the others read the files back.
        hashed = [pool.submit(_hashed_metadata, each, writer) for each, writer in pairs]
        for (each, writer), entries in zip(pairs, hashed, strict=True):
            _verify(each, writer, pool, steps)
            writer.replace_metadata(entries.result())
            if each.decomposed.adapter.as_folder:
                write_bytes(writer.path.parent / peft.CONFIG_FILE, peft.to_file(each.settings))
            writer.commit()


def _hashed_metadata(each: Plan, writer: SafetensorsWriter) -> dict[str, str]:
    return hashes.with_hashes(each.metadata, each.tensors, writer.data_chunks)


class _Steps:
    def __init__(self, report: Progress | None, total: int) -> None:
        self.report, self.total, self.done = report, total, 0

    def __call__(self, count: int) -> None:
        self.done += count
        if self.report:
            self.report(self.done, self.total)


def _run(pool: Executor, chunks: Sequence[Sequence[int]], task: Callable[[Sequence[int]], None], steps: _Steps) -> None:
    """Run the task for every chunk in the pool; the first error stops the rest."""
    futures = [pool.submit(task, chunk) for chunk in chunks]
    try:
        for chunk, future in zip(chunks, futures, strict=True):
            future.result()
            steps(len(chunk))
    finally:
        for future in futures:
            future.cancel()


def _write_layers(indices: Sequence[int], pairs: Sequence[tuple[Plan, SafetensorsWriter]], device: str) -> None:
    for index in indices:
        delta = None
        for each, writer in pairs:
            place = each.places.get(index)
            if place is None:
                continue
            delta = delta or each.decomposed.adapter.layers[index].delta
            _write_layer(each, place, delta, writer, device)


def _write_layer(each: Plan, place: int, delta: AnyDelta, writer: SafetensorsWriter, device: str) -> None:
    index, width = each.shrunk[place], each.selection.widths[place]
    spectrum, layer = each.decomposed.spectra[index], each.decomposed.adapter.layers[index]
    up, down = truncate(
        delta,
        spectrum,
        each.selection.kept[place],
        factors=each.caps[place],
        width=width,
        scale=each.baked(place),
        device=device,
    )
    _, family, keys, infos = each.forms[place]
    assert family.written
    values = dict(family.pack(up, down) if family.pack else {"up": up, "down": down})
    values["alpha"] = torch.tensor(float(each.alpha))
    if "bias" in keys:
        # read at the scale of the factors, which is inside them now
        values["bias"] = layer.store.read(keys["bias"]).float() * (layer.scale * each.baked(place))
    for role in (*family.written(infos, width), *({"bias"} & keys.keys())):
        info = each.tensors[keys[role]]
        writer.write(keys[role], values[role].to(torch_dtype(info.dtype)))


def _verify(each: Plan, writer: SafetensorsWriter, pool: Executor, steps: _Steps) -> None:
    """Open the written file as every loader does, and compare the norm of each layer with its spectrum."""
    names = writer.readable_names()
    adapter = each.decomposed.adapter
    by_name = {layer.name: layer for layer in adapter.layers}
    gone = {key for name in each.removed for key in (by_name[name].keys.values() if name in by_name else [name])}
    replaced = {key for index in each.places for key in adapter.layers[index].keys.values()}
    stored = adapter.store.tensors.keys()
    if names != set(each.tensors) or not gone & stored <= stored - names <= gone | replaced:
        raise OutputError(f"{writer.path}: the written file has other tensors than planned; please report this.")
    with open_tensors(writer.temporary) as store:
        written = {layer.name: layer for layer in adapter_of(writer.path, store, each.settings)}
        _run(pool, _chunks_of_equal_width(each), lambda places: _check_norms(each, writer.path, written, places), steps)


def _chunks_of_equal_width(each: Plan) -> list[list[int]]:
    by_width: dict[int, list[int]] = defaultdict(list)
    for place in each.places.values():
        by_width[each.selection.widths[place]].append(place)
    return [places[start : start + _CHUNK] for places in by_width.values() for start in range(0, len(places), _CHUNK)]


def _check_norms(each: Plan, path: Path, written: Mapping[str, Layer], places: Sequence[int]) -> None:
    """Compare what a reader of the file gets, scale included, with what was to be kept."""
    layers = [written[each.forms[place].name] for place in places]
    deltas = [layer.delta for layer in layers]
    both = grams([delta for delta in deltas if isinstance(delta, Delta)], torch.device("cpu"))
    squares = (both.down * both.up).sum((-2, -1)).tolist()
    for place, layer, square in zip(places, layers, squares, strict=True):
        wanted = abs(each.recipe.rescale) * each.norms[place]
        norm = abs(layer.scale) * math.sqrt(max(0.0, square))  # NaN, if a number overflowed, compares as wrong
        if not abs(norm - wanted) <= _NORM_TOLERANCE[layer.dtype] * wanted:
            raise OutputError(
                f"{path}: layer {layer.name} has norm {norm:.4g} after writing, {wanted:.4g} before. "
                "Its numbers do not fit the dtype; use -t fp32 or -t bf16. Nothing was written."
            )
