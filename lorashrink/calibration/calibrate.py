"""`calibrate`: gather statistics of a model for calibrated recipes, for some adapters or for all."""

from __future__ import annotations

import hashlib
import itertools
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
from lorashrink.bases import Base, open_base
from lorashrink.calibration.models import ObservedModel, model_dtype, open_model
from lorashrink.calibration.sites import Watched, by_weight, pieces, watched
from lorashrink.calibration.statistics import adapter_key, stacked_grams, write_adapters, write_table
from lorashrink.calibration.watching import Projected, Recorder, Sketched, Watcher
from lorashrink.engine.delta import Delta
from lorashrink.engine.devices import pick_device
from lorashrink.errors import InputError, Progress, UsageError
from lorashrink.files.disk import check_output
from lorashrink.files.reading import open_tensors
from lorashrink.files.writing import save_tensors
from lorashrink.linking.inputs import find_adapters
from lorashrink.linking.matching import match
from lorashrink.pictures.adapting import adapted

_SAVE_SECONDS = 30.0  # between two savings of the sums, from which an interrupted calibration goes on


@dataclass(frozen=True, slots=True)
class Effort:
    """The work that a calibration is about to do."""

    model: str
    device: str
    dtype: str
    layers: int
    runs: int  # pictures or texts
    passes: int  # forward and backward through the model
    forwards: int  # through the model without a backward pass
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
    settings: str | Path | None = None,
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

    With adapters these are exact statistics of their layers. Without adapters they are a calibration table, which
    serves every adapter for this model: a diagonal and `rank` columns for each side of every weight.

    model: a text-to-image model as for `sweep`, or a folder of a language model as transformers saves it.
    prompts, settings: as in `sweep`; default prompts are general ones. text: for language models, a file of lines.
    seeds: each prompt is drawn with each of them. steps_used: how many of a picture's steps are watched, and for a text
    how many projections. loaded: the adapter, which must be the only one, is on the model meanwhile.
    dtype: auto (fp32 on a CPU, else bf16), fp32, bf16 or fp16.
    An interrupted calibration goes on where it was, if it is started again with the same arguments.

    Raises:
        UsageError: options that contradict each other, a package that is missing, not enough memory.
        InputError: a file cannot be read, or an adapter is not for this model, or is no LoRA.
        NonFinite: a gradient is NaN; the message names the layer.
        OutputError: `output` exists and `force` is not set, or cannot be written.
    """
    started = time.perf_counter()
    target = Path(output)
    sources = find_adapters(adapters) if adapters else []
    if target.suffix != ".safetensors":
        raise UsageError(f"{target}: statistics are a safetensors file; give a name that ends in .safetensors.")
    if prompts is not None and text is not None:
        raise UsageError("prompts are for models of pictures, text for language models; give one of them.")
    if steps_used < 1 or rank < 1:
        raise UsageError("steps used, and the rank of a table, are at least 1.")
    if loaded and len(sources) != 1:
        raise UsageError(f"one adapter can be on the model while it is watched, and {len(sources)} are given.")
    check_output(target, force=force, inputs=[Path(model), *sources])
    device = pick_device(device)
    weights_dtype = model_dtype(dtype, device)
    with ExitStack() as stack:
        base = stack.enter_context(open_base(model))
        opened = {path: stack.enter_context(open_adapter(path)) for path in sources}
        companion = None if settings is None else Path(settings)
        observed = open_model(Path(model), base, prompts, text, seeds, steps_used, device, weights_dtype, companion)
        parts = watched(observed.modules, observed.layout, base)
        plan = _Plan.of_adapters(parts, base, opened, device) if opened else _Plan.of_table(parts, rank, device)
        origin = _settings(observed, base, opened, plan, loaded)
        partial_file = target.with_name(f".{target.stem}.part.safetensors")
        done = plan.resume(partial_file, origin)
        if announce:
            announce(_effort(model, observed, plan, done, device, weights_dtype))
        if device.startswith("cuda"):
            torch.cuda.reset_peak_memory_stats(device)
        if loaded:
            stack.enter_context(adapted(observed.model, sources[0], base))
        plan.watch(observed, done, partial_file, origin, progress)
        runs, passes = len(observed.runs), len(observed.runs) * observed.passes
        size = plan.write(target, passes, base, origin)
        partial_file.unlink(missing_ok=True)
    return Calibrated(
        path=str(target),
        kind="adapters" if sources else "base",
        model=str(model),
        adapters=tuple(map(str, sources)),
        layers=plan.layers,
        bytes=size,
        runs=runs,
        passes=passes,
        seconds=time.perf_counter() - started,
        peak_bytes=torch.cuda.max_memory_allocated(device) if device.startswith("cuda") else None,
    )


# --- which sums, and how they become a file -----------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Plan:
    watchers: Mapping[str, Watcher]
    recorder: Recorder
    layers: int
    write: Callable[[Path, int, Base, Mapping[str, Any]], int]  # (file, passes, base, settings) -> bytes

    @property
    def sums(self) -> dict[str, Tensor]:
        """The tensors that are added to, not copies of them."""
        return {
            f"{name}|{key}": tensor
            for name, watcher in self.watchers.items()
            for key, tensor in watcher.state().items()
        }

    def resume(self, partial_file: Path, settings: Mapping[str, Any]) -> int:
        """Take over the sums of an equal calibration that was interrupted; returns how many runs it has done."""
        if not partial_file.is_file():
            return 0
        with open_tensors(partial_file) as store:
            if store.metadata.get("settings") != json.dumps(settings):
                return 0
            for key, tensor in self.sums.items():
                tensor.copy_(store.read(key))
            return int(store.metadata["done"])

    def watch(
        self,
        model: ObservedModel,
        done: int,
        partial_file: Path,
        settings: Mapping[str, Any],
        progress: Progress | None,
    ) -> None:
        """Watch all runs but those that are done, and save the sums now and then, for `resume`."""
        runs, pass_numbers = len(model.runs), itertools.count(done * model.passes + 1)

        def report() -> None:
            if progress:
                progress("calibrating", next(pass_numbers), runs * model.passes)

        saved = time.monotonic()
        with self.recorder.hooked():
            for number in range(done, runs):
                model.watch(number, self.recorder, report)
                if time.monotonic() - saved > _SAVE_SECONDS and number + 1 < runs:
                    save_tensors(partial_file, self.sums, {"settings": json.dumps(settings), "done": str(number + 1)})
                    saved = time.monotonic()

    @classmethod
    def of_table(cls, parts: Sequence[Watched], rank: int, device: str) -> _Plan:
        """A diagonal and `rank` columns for each side of every weight."""
        watchers = {part.view: Sketched(part.view.shape, rank, device) for part in parts}

        def write(path: Path, passes: int, base: Base, settings: Mapping[str, Any]) -> int:
            results = {view: watcher.result(passes) for view, watcher in watchers.items()}
            return write_table(path, results, base, settings)

        recorder = Recorder([(part, watchers[part.view]) for part in parts])
        return cls({str(view): watcher for view, watcher in watchers.items()}, recorder, len(watchers), write)

    @classmethod
    def of_adapters(cls, parts: Sequence[Watched], base: Base, adapters: Mapping[Path, Adapter], device: str) -> _Plan:
        """The Gram matrices of every layer of the adapters."""
        by_key = by_weight(parts)
        watchers: dict[str, dict[str, Projected]] = defaultdict(dict)  # layer -> first row -> its sums
        sites = []
        for adapter in adapters.values():
            for layer, views in zip(adapter.layers, match(adapter, base), strict=True):
                delta = layer.delta if views else None
                if delta is not None and not isinstance(delta, Delta):
                    raise InputError(
                        f"{adapter.path}: layer {layer.name} is {layer.algo}, which has no two factors to watch. Make "
                        "a table of the model instead, for every adapter: lorashrink calibrate MODEL -o "
                        "table.safetensors"
                    )
                for site, rows in pieces(views, by_key):
                    assert delta is not None
                    watcher = Projected(delta.up[slice(*rows)], delta.down, device)
                    watchers[f"{adapter_key(adapter)}/{layer.name}"][f"{rows[0]}"] = watcher
                    sites.append((site, watcher))

        def write(path: Path, passes: int, base: Base, settings: Mapping[str, Any]) -> int:
            grams = {
                layer: stacked_grams([watcher.result(passes) for watcher in by_rows.values()])
                for layer, by_rows in watchers.items()
            }
            names = {adapter_key(adapter): path.name for path, adapter in adapters.items()}
            return write_adapters(path, grams, names, base, settings)

        flat = {f"{layer}|{row}": watcher for layer, by_rows in watchers.items() for row, watcher in by_rows.items()}
        return cls(flat, Recorder(sites), len(watchers), write)


def _effort(path: str | Path, model: ObservedModel, plan: _Plan, done: int, device: str, dtype: str) -> Effort:
    parts = model.model.components.values() if hasattr(model.model, "components") else [model.model]
    weights = [tensor for part in parts if isinstance(part, nn.Module) for tensor in part.parameters()]
    remaining = len(model.runs) - done
    return Effort(
        model=str(path),
        device=device,
        dtype=dtype,
        layers=plan.layers,
        runs=len(model.runs),
        passes=remaining * model.passes,
        forwards=remaining * model.forwards,
        model_bytes=sum(tensor.nbytes for tensor in weights),
        statistics_bytes=sum(tensor.nbytes for tensor in plan.sums.values()),
        done=done,
    )


def _settings(
    model: ObservedModel, base: Base, adapters: Mapping[Path, Adapter], plan: _Plan, loaded: bool
) -> dict[str, Any]:
    """Everything that decides the statistics."""
    runs = json.dumps(model.runs, sort_keys=True)
    shapes = {key: tuple(tensor.shape) for key, tensor in plan.sums.items()}
    return {
        "runs": len(model.runs),
        "runs_sha256": hashlib.sha256(runs.encode()).hexdigest(),
        "passes": model.passes,
        "pixels": model.pixels,
        "loaded": loaded,
        "model": base.fingerprint,
        "adapters": sorted(map(adapter_key, adapters.values())),
        "sums": hashlib.sha256(str(sorted(shapes.items())).encode()).hexdigest()[:16],
        "versions": [__version__, torch.__version__],
    }
