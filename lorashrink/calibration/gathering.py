"""Gathering statistics of a model for calibrated recipes: of given adapters, or of the model for all adapters."""

from __future__ import annotations

import hashlib
import json
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lorashrink._version import __version__
from lorashrink.adapters import Adapter, open_adapter
from lorashrink.bases import Base, View, open_base
from lorashrink.calibration.sites import Watched, by_weight, pieces, watched
from lorashrink.calibration.statistics import adapter_key, write_adapters, write_table
from lorashrink.calibration.subjects import Subject, model_dtype, open_subject
from lorashrink.calibration.watching import Projected, Recorder, Site, Sketched, Watcher
from lorashrink.engine.delta import Delta
from lorashrink.engine.devices import pick_device
from lorashrink.engine.gram import Grams
from lorashrink.errors import InputError, Progress, UsageError
from lorashrink.files.disk import check_output
from lorashrink.files.reading import open_tensors
from lorashrink.files.writing import save_tensors
from lorashrink.linking.inputs import find_adapters
from lorashrink.linking.matching import match
from lorashrink.pictures.pipelines import adapted

_SAVE_SECONDS = 30.0


@dataclass(frozen=True, slots=True)
class Effort:
    """What a calibration is about to take."""

    model: str
    device: str
    dtype: str
    layers: int
    runs: int  # pictures or texts
    passes: int  # forward and backward through the model
    forwards: int  # without a way back
    model_bytes: int
    statistics_bytes: int  # while they are gathered
    done: int  # runs that an interrupted calibration has done already


@dataclass(frozen=True, slots=True)
class Calibrated:
    """A written statistics file."""

    path: str
    kind: str  # "adapters" or "base"
    model: str
    adapters: tuple[str, ...]
    layers: int
    bytes: int
    runs: int
    passes: int
    seconds: float
    peak_bytes: int | None  # of the GPU's memory


def calibrate(
    adapters: str | Path | Sequence[str | Path] = (),
    *,
    model: str | Path,
    output: str | Path,
    prompts: str | Path | None = None,
    text: str | Path | None = None,
    seeds: Sequence[int] = (0,),
    steps_used: int = 10,
    rank: int = 16,
    loaded: bool = False,
    device: str = "auto",
    dtype: str = "auto",
    force: bool = False,
    announce: Callable[[Effort], None] | None = None,
    progress: Progress | None = None,
) -> Calibrated:
    """Gather statistics of a model for recipes with `calib`, and write them to `output`, a .safetensors file.

    With adapters, those of their layers, exactly; without, a calibration table, which serves every adapter for this
    model: a diagonal and `rank` columns for each side of every weight.

    model: a text-to-image model as for `sweep`, or a folder of a language model as transformers saves it.
    prompts: as in `sweep`; default are general ones. text: for language models, a file whose lines are read.
    seeds: each prompt is drawn with each of them. steps_used: how many of a picture's steps count, and for a text how
    many projections. loaded: with the adapter, of which there is one then, on the model.
    dtype: auto (fp32 on a CPU, else bf16), fp32, bf16 or fp16.
    An interrupted calibration goes on where it was, if it is started again with the same arguments.

    Raises:
        UsageError: options that contradict each other, a package that is missing, not enough memory.
        InputError: a file cannot be read, or an adapter is not for this model, or is no LoRA.
        NonFinite: a gradient is NaN; the message names the layer.
        OutputError: `output` exists and `force` is not set, or cannot be written.
    """
    started = time.perf_counter()
    place = Path(output)
    sources = find_adapters([adapters] if isinstance(adapters, (str, Path)) else adapters) if adapters else []
    _check(sources, place, prompts, text, steps_used, rank, loaded)
    check_output(place, force=force, inputs=[Path(model), *sources])
    device = pick_device(device)
    kind = model_dtype(dtype, device)
    with ExitStack() as stack:
        base = stack.enter_context(open_base(model))
        opened = {path: stack.enter_context(open_adapter(path)) for path in sources}
        subject = open_subject(Path(model), base, prompts, text, seeds, steps_used, device, kind)
        plan = _plan(subject, base, opened, rank, device)
        settings = _settings(subject, base, opened, plan, loaded)
        partial_file = place.with_name(f".{place.stem}.part.safetensors")
        done = _resume(partial_file, plan, settings)
        runs = len(subject.runs)
        if announce:
            announce(_effort(model, subject, plan, done, device, kind))
        if device.startswith("cuda"):
            torch.cuda.reset_peak_memory_stats(device)
        if loaded:
            stack.enter_context(adapted(subject.model, sources[0], base))
        stack.enter_context(plan.recorder.hooked())
        report = _Report(progress, runs * subject.passes, done * subject.passes)
        saved = time.monotonic()
        for number in range(done, runs):
            subject.watch(number, plan.recorder, report)
            if time.monotonic() - saved > _SAVE_SECONDS and number + 1 < runs:
                _save(partial_file, plan, settings, number + 1)
                saved = time.monotonic()
        written = plan.write(place, runs * subject.passes, base, settings)
        partial_file.unlink(missing_ok=True)
    return Calibrated(
        path=str(place),
        kind="adapters" if sources else "base",
        model=str(model),
        adapters=tuple(map(str, sources)),
        layers=plan.layers,
        bytes=written,
        runs=runs,
        passes=runs * subject.passes,
        seconds=time.perf_counter() - started,
        peak_bytes=torch.cuda.max_memory_allocated(device) if device.startswith("cuda") else None,
    )


def _check(
    sources: Sequence[Path],
    place: Path,
    prompts: str | Path | None,
    text: str | Path | None,
    steps_used: int,
    rank: int,
    loaded: bool,
) -> None:
    if place.suffix != ".safetensors":
        raise UsageError(f"{place}: statistics are a safetensors file; give a name that ends in .safetensors.")
    if prompts is not None and text is not None:
        raise UsageError("prompts are for models of pictures, text for language models; give one of them.")
    if steps_used < 1 or rank < 1:
        raise UsageError("steps used, and the rank of a table, are at least 1.")
    if loaded and len(sources) != 1:
        raise UsageError(f"one adapter can be on the model while it is watched, and {len(sources)} are given.")


class _Report:
    def __init__(self, progress: Progress | None, total: int, done: int) -> None:
        self.progress, self.total, self.done = progress, total, done

    def __call__(self) -> None:
        self.done += 1
        if self.progress:
            self.progress("calibrating", self.done, self.total)


# --- what is added up ---------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Plan:
    watchers: Mapping[str, Watcher]
    recorder: Recorder
    layers: int
    write: Callable[[Path, int, Base, Mapping[str, Any]], int]


def _plan(subject: Subject, base: Base, adapters: Mapping[Path, Adapter], rank: int, device: str) -> _Plan:
    found = watched(subject.modules, subject.layout, base)
    return _of_adapters(found, base, adapters, device) if adapters else _of_base(found, rank, device)


def _of_base(found: Sequence[Watched], rank: int, device: str) -> _Plan:
    watchers = {each.view: Sketched(each.view.shape, rank, device) for each in found}
    sites = [(_site(each, each.view), watchers[each.view]) for each in found]

    def write(place: Path, passes: int, base: Base, settings: Mapping[str, Any]) -> int:
        return write_table(place, {view: one.result(passes) for view, one in watchers.items()}, base, settings)

    return _Plan({str(view): one for view, one in watchers.items()}, _recorder(sites), len(watchers), write)


def _of_adapters(modules: Sequence[Watched], base: Base, adapters: Mapping[Path, Adapter], device: str) -> _Plan:
    by_key = by_weight(modules)
    watchers: dict[str, dict[str, Projected]] = defaultdict(dict)  # layer -> its pieces
    sites = []
    for adapter in adapters.values():
        for layer, views in zip(adapter.layers, match(adapter, base), strict=True):
            delta = layer.delta if views else None
            if delta is not None and not isinstance(delta, Delta):
                raise InputError(
                    f"{adapter.path}: layer {layer.name} is {layer.algo}, which has no two factors to watch. Make a "
                    "table of the model with --base-table instead; it serves every adapter."
                )
            for part, rows in pieces(views, by_key):
                assert delta is not None
                site = _site(part, part.view)
                one = Projected(delta.up[slice(*rows)], delta.down, device)
                key = f"{adapter_key(adapter)}/{layer.name}"
                watchers[key][f"{rows[0]}"] = one
                sites.append((site, one))

    def write(place: Path, passes: int, base: Base, settings: Mapping[str, Any]) -> int:
        found = {key: _together([one.result(passes) for one in each.values()]) for key, each in watchers.items()}
        names = {adapter_key(adapter): path.name for path, adapter in adapters.items()}
        return write_adapters(place, found, names, base, settings)

    flat = {f"{key}|{rows}": one for key, each in watchers.items() for rows, one in each.items()}
    return _Plan(flat, _recorder(sites), len(watchers), write)


def _together(pieces: Sequence[Grams]) -> Grams:
    """One layer's, whose rows are in several modules with the same inputs."""
    return Grams(torch.stack([each.down for each in pieces]).mean(0), torch.stack([each.up for each in pieces]).sum(0))


def _site(each: Watched, view: View) -> Site:
    return Site(str(view), each.module, (each.start, each.start + view.shape[0]))


def _recorder(sites: Sequence[tuple[Site, Watcher]]) -> Recorder:
    by_module: dict[nn.Module, list[tuple[Site, Watcher]]] = defaultdict(list)
    for site, watcher in sites:
        by_module[site.module].append((site, watcher))
    return Recorder(by_module)


def _effort(model: str | Path, subject: Subject, plan: _Plan, done: int, device: str, dtype: str) -> Effort:
    parts = subject.model.components.values() if hasattr(subject.model, "components") else [subject.model]
    tensors = [tensor for part in parts if isinstance(part, nn.Module) for tensor in part.parameters()]
    gathered = [tensor for one in plan.watchers.values() for tensor in one.state().values()]
    left = len(subject.runs) - done
    return Effort(
        model=str(model),
        device=device,
        dtype=dtype,
        layers=plan.layers,
        runs=len(subject.runs),
        passes=left * subject.passes,
        forwards=left * subject.forwards,
        model_bytes=sum(tensor.nbytes for tensor in tensors),
        statistics_bytes=sum(tensor.nbytes for tensor in gathered),
        done=done,
    )


# --- going on -----------------------------------------------------------------------------------


def _settings(
    subject: Subject, base: Base, adapters: Mapping[Path, Adapter], plan: _Plan, loaded: bool
) -> dict[str, Any]:
    """Everything that decides the statistics."""
    runs = json.dumps(subject.runs, sort_keys=True)
    return {
        "runs": len(subject.runs),
        "runs_sha256": hashlib.sha256(runs.encode()).hexdigest(),
        "passes": subject.passes,
        "loaded": loaded,
        "model": base.fingerprint,
        "adapters": sorted(map(adapter_key, adapters.values())),
        "sums": hashlib.sha256(str(sorted(_shapes(plan).items())).encode()).hexdigest()[:16],
        "versions": [__version__, torch.__version__],
    }


def _shapes(plan: _Plan) -> dict[str, tuple[int, ...]]:
    return {
        f"{name}|{key}": tuple(tensor.shape)
        for name, one in plan.watchers.items()
        for key, tensor in one.state().items()
    }


def _sums(plan: _Plan) -> dict[str, Tensor]:
    return {f"{name}|{key}": tensor for name, one in plan.watchers.items() for key, tensor in one.state().items()}


def _save(path: Path, plan: _Plan, settings: Mapping[str, Any], done: int) -> None:
    save_tensors(path, _sums(plan), {"settings": json.dumps(dict(settings)), "done": str(done)})


def _resume(path: Path, plan: _Plan, settings: Mapping[str, Any]) -> int:
    """How many runs an equal calibration has done before, whose sums are taken over."""
    if not path.is_file():
        return 0
    with open_tensors(path) as store:
        if store.metadata.get("settings") != json.dumps(dict(settings)):
            return 0
        for key, tensor in _sums(plan).items():
            tensor.copy_(store.read(key))
        return int(store.metadata["done"])
