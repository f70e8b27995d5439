"""Gathering statistics of a model for calibrated recipes: of given adapters, or of the model for all adapters."""

from __future__ import annotations

import hashlib
import json
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lorashrink._version import __version__
from lorashrink.adapters import Adapter, open_adapter
from lorashrink.bases import Base, View, Views, open_base
from lorashrink.calibration import adapter_key, write_adapters, write_table
from lorashrink.delta import Delta
from lorashrink.drawing import Shot, shots_of
from lorashrink.errors import InputError, UsageError
from lorashrink.files import SafetensorsWriter, check_output, open_tensors, tensor_info
from lorashrink.gathering import Projected, Recorder, Site, Sketched, Watcher, watch_picture, watch_text
from lorashrink.inputs import find_adapters
from lorashrink.machine import pick_device
from lorashrink.matching import match
from lorashrink.pipelines import KINDS, Kind, adapted, check_packages, open_pipeline, pipeline_kind
from lorashrink.prompts import Prompt, read_prompts
from lorashrink.spectrum import Grams

Progress = Callable[[str, int, int], None]

DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
_SAVE_SECONDS = 30.0
# What most pictures are made of. Statistics belong to the model: what is drawn matters little.
PROMPTS = (
    "a photo of a cat on a wooden chair",
    "a portrait of an old woman, soft light",
    "a mountain lake at sunrise",
    "a busy street in a city at night, rain",
    "a bowl of fruit, oil painting",
    "a red sports car, studio photo",
    "a castle on a hill, pencil drawing",
    "a girl with an umbrella, anime style",
)


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
        subject = _subject(Path(model), base, prompts, text, seeds, steps_used, device, kind)
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


def model_dtype(dtype: str, device: str) -> str:
    """torch's name of what `auto` or one of `DTYPES` means here. Raises UsageError."""
    if dtype not in ("auto", *DTYPES):
        raise UsageError(f"dtype: '{dtype}' is not one of auto, {', '.join(DTYPES)}.")
    return DTYPES["fp32" if device == "cpu" else "bf16"] if dtype == "auto" else DTYPES[dtype]


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


# --- what is watched ----------------------------------------------------------------------------


Modules = Callable[[str, str], nn.Module | None]  # (part, name) -> module


class _Subject(NamedTuple):
    """A loaded model, and what it is made to do."""

    model: Any
    modules: Modules
    layout: str  # of the names
    runs: Sequence[Any]  # JSON, one per picture or text
    passes: int  # per run
    forwards: int  # per run
    watch: Callable[[int, Recorder, Callable[[], None]], None]


def _subject(
    model: Path,
    base: Base,
    prompts: str | Path | None,
    text: str | Path | None,
    seeds: Sequence[int],
    steps_used: int,
    device: str,
    dtype: str,
) -> _Subject:
    if model.is_dir() and not (model / "model_index.json").is_file():
        if text is None:
            raise UsageError(f"{model}: is a language model; give a file of texts with --text.")
        return _language_model(model, Path(text), seeds, steps_used, device, dtype)
    if text is not None:
        raise UsageError(f"{model}: draws pictures; give --prompts instead of --text.")
    check_packages()
    kind = KINDS[pipeline_kind(model)]
    pipeline, shots = open_frozen(model, kind, prompts, seeds, device, dtype)
    steps = min(shot.prompt.steps for shot in shots)
    used = min(steps_used, steps)

    def watch(number: int, recorder: Recorder, progress: Callable[[], None]) -> None:
        watch_picture(pipeline, kind.denoiser, recorder, request([shots[number]], kind), used, progress)

    runs = [[asdict(shot.prompt), shot.start] for shot in shots]
    return _Subject(pipeline, modules_of(pipeline, base), "diffusers", runs, used, steps - used, watch)


def open_frozen(
    model: Path, kind: Kind, prompts: str | Path | None, seeds: Sequence[int], device: str, dtype: str
) -> tuple[Any, tuple[Shot, ...]]:
    """A pipeline of which gradients are wanted, but not those of its weights, and what it draws.

    prompts: a file; None stands for `PROMPTS`. Raises as `open_pipeline` and `read_prompts`.
    """
    asked = None if prompts is None else read_prompts(Path(prompts))
    pipeline = open_pipeline(model, device=device, dtype=dtype)
    for part in pipeline.components.values():
        if isinstance(part, nn.Module):
            part.requires_grad_(False)
    if device != "cpu":
        getattr(pipeline, kind.denoiser).enable_gradient_checkpointing()
    return pipeline, shots_of(asked or _usual_prompts(pipeline, kind.scale), seeds)


def modules_of(pipeline: Any, base: Base) -> Modules:
    """Where the base's weights are in the pipeline."""

    def find(part: str, name: str) -> nn.Module | None:
        component = getattr(pipeline, base.family.folder(part) or "-", None)
        return component and _module(component, name)

    return find


def _usual_prompts(pipeline: Any, scale: float) -> tuple[Prompt, ...]:
    side = int(pipeline.default_sample_size) * pipeline.vae_scale_factor
    return tuple(Prompt(text, width=side, height=side, steps=20, scale=scale) for text in PROMPTS)


def request(shots: Sequence[Shot], kind: Kind) -> dict[str, Any]:
    """The arguments of the pipeline for shots of equal size and guidance; the noise is that of the first."""
    prompt = shots[0].prompt
    return {
        "prompt": [shot.prompt.prompt for shot in shots],
        "width": prompt.width,
        "height": prompt.height,
        "num_inference_steps": prompt.steps,
        "guidance_scale": prompt.scale,
        "generator": torch.Generator().manual_seed(shots[0].start),
        **({"negative_prompt": [shot.prompt.negative for shot in shots]} if kind.negative else {}),
    }


def _language_model(model: Path, text: Path, seeds: Sequence[int], probes: int, device: str, dtype: str) -> _Subject:
    try:
        import transformers
    except ImportError:
        raise UsageError("language models need transformers: pip install 'lorashrink[pictures]'") from None
    try:
        lines = [line.strip() for line in text.read_text(encoding="utf-8").splitlines() if line.strip()]
        config = json.loads((model / "config.json").read_text(encoding="utf-8"))
        named = " ".join(config.get("architectures") or [])
        causal = "CausalLM" in named or "LMHead" in named
        loader = transformers.AutoModelForCausalLM if causal else transformers.AutoModel
        network = loader.from_pretrained(model, dtype=getattr(torch, dtype), local_files_only=True).to(device).eval()
        tokenizer = transformers.AutoTokenizer.from_pretrained(model, local_files_only=True)
    except (OSError, ValueError) as error:
        raise InputError(f"{model}, {text}: cannot be read ({str(error).splitlines()[0]}).") from error
    if not lines:
        raise UsageError(f"{text}: no text in it.")
    network.requires_grad_(False)
    runs = [(line, seed) for line in lines for seed in seeds]

    def watch(number: int, recorder: Recorder, progress: Callable[[], None]) -> None:
        line, seed = runs[number]
        tokens = tokenizer(line, return_tensors="pt", truncation=True, max_length=_WINDOW).to(device)
        watch_text(network, tokens, recorder, probes, seed * len(lines) + number, progress)

    return _Subject(network, lambda _, name: _module(network, name), "native", runs, probes, 0, watch)


_WINDOW = 512  # tokens of a text


def _module(component: nn.Module, name: str) -> nn.Module | None:
    """The linear layer or convolution of this name, whatever level above it the library left out or put in."""
    tails = (name, name.removeprefix("text_model."), name.removeprefix("model."), name.removeprefix("transformer."))
    for tail in dict.fromkeys((*tails, *(f"{head}.{name}" for head, _ in component.named_children()))):
        try:
            module = component.get_submodule(tail)
        except AttributeError:
            continue
        if isinstance(module, (nn.Linear, nn.Conv2d)) or type(module).__name__ == "Conv1D":
            return module
    return None


class Watched(NamedTuple):
    """A part of the base's weights, and the module that has it."""

    view: View
    module: nn.Module
    start: int  # first row in the module


def watched(modules: Modules, layout: str, base: Base) -> list[Watched]:
    """Each part of the base's weights that has a module, in a layout of names. Raises InputError if none has."""
    found = []
    for (part, name), views in base.modules(layout).items():
        module = modules(part, name)
        if module is None:
            continue
        start = 0
        for view in views:
            found.append(Watched(view, module, start))
            start += view.shape[0]
    if not found:
        raise InputError(f"{base.path}: none of its {len(base.all_views)} weights is a layer of the loaded model.")
    return found


# --- what is added up ---------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Plan:
    watchers: Mapping[str, Watcher]
    recorder: Recorder
    layers: int
    write: Callable[[Path, int, Base, Mapping[str, Any]], int]


def _plan(subject: _Subject, base: Base, adapters: Mapping[Path, Adapter], rank: int, device: str) -> _Plan:
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


def by_weight(modules: Sequence[Watched]) -> dict[str, list[Watched]]:
    """Key of the base -> the modules that have parts of this weight."""
    found: dict[str, list[Watched]] = defaultdict(list)
    for each in modules:
        found[each.view.key].append(each)
    return found


def pieces(views: Views, by_key: Mapping[str, Sequence[Watched]]) -> Iterator[tuple[Watched, tuple[int, int]]]:
    """What of the watched modules a layer changes, and which of its rows that is."""
    start = 0
    for view in views:
        first, last = view.rows or (0, view.shape[0])
        for each in by_key.get(view.key, ()):
            low, high = each.view.rows or (0, each.view.shape[0])
            begin, end = max(first, low), min(last, high)
            if begin < end:
                part = replace(each.view, shape=(end - begin, *each.view.shape[1:]), rows=(begin, end))
                yield (
                    Watched(part, each.module, each.start + begin - low),
                    (start + begin - first, start + end - first),
                )
        start += last - first


def _site(each: Watched, view: View) -> Site:
    return Site(str(view), each.module, (each.start, each.start + view.shape[0]))


def _recorder(sites: Sequence[tuple[Site, Watcher]]) -> Recorder:
    by_module: dict[nn.Module, list[tuple[Site, Watcher]]] = defaultdict(list)
    for site, watcher in sites:
        by_module[site.module].append((site, watcher))
    return Recorder(by_module)


def _effort(model: str | Path, subject: _Subject, plan: _Plan, done: int, device: str, dtype: str) -> Effort:
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
    subject: _Subject, base: Base, adapters: Mapping[Path, Adapter], plan: _Plan, loaded: bool
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
    sums = _sums(plan)
    kinds = {torch.float32: "F32", torch.float64: "F64"}
    infos = {key: tensor_info(kinds[tensor.dtype], tuple(tensor.shape)) for key, tensor in sums.items()}
    with SafetensorsWriter(path, infos, {"settings": json.dumps(dict(settings)), "done": str(done)}) as writer:
        for key, tensor in sums.items():
            writer.write(key, tensor.cpu())
        writer.commit()


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
