"""A shrunk adapter refined: a short training of its factors, until the model predicts what it does with the whole one.

A distillation on the sampling steps of pictures that the whole adapter draws. The error is that of the guided
prediction, each step weighted with what it does to the picture, as in `gathering`.
"""

from __future__ import annotations

import json
import math
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from lorashrink.adapters import Adapter, Layer, open_adapter
from lorashrink.bases import Base, open_base
from lorashrink.calibration.sites import by_weight, modules_of, pieces, watched
from lorashrink.calibration.subjects import model_dtype, open_frozen, request
from lorashrink.calibration.watching import guided, step_width
from lorashrink.engine.delta import Delta
from lorashrink.engine.devices import pick_device
from lorashrink.errors import InputError, NonFinite, Progress, UsageError
from lorashrink.files.disk import check_output, sha256_file
from lorashrink.files.metadata_keys import REFINED
from lorashrink.files.store import cast
from lorashrink.files.writing import save_tensors
from lorashrink.linking.matching import match
from lorashrink.pictures.drawing import Shot
from lorashrink.pictures.pipelines import (
    KINDS,
    Kind,
    adapted,
    check_adapter,
    check_packages,
    enough_memory,
    pipeline_kind,
)

# Of Adam, relative to the size of each factor's numbers. Where that is too much it is halved.
_RATE, _SLOWEST = 0.01, 1e-4

_BETAS = (0.9, 0.99)

_WARMUP = 5  # steps: Adam's first ones know only the signs of gradients

_MEAN = 0.9  # of the running mean of the factors, which is what is kept: it has less of the batches' noise

_ROUND = 10  # steps between two looks at the steps held out

_TINY = 1e-6

_SMALLER = "Give the prompts a smaller --w and --h."

_HELD = 4  # one picture in so many is not trained on

_MOST_HELD = 48  # sampling steps that a look takes

_PIXELS = 1 << 20  # that go through the model at once; at least one picture does

# Shares of the whole: below it an error is rounding, and a smaller gain is chance.
_ROUNDING, _GAIN = 1e-8, 1e-3


@dataclass(frozen=True, slots=True)
class Refined:
    """A written adapter, and how far it is from the whole one now."""

    path: str
    source: str
    like: str
    model: str
    layers: int  # trained
    steps: int  # done
    rates: tuple[float, ...]  # tried, each as a share of the size of a factor's numbers
    loss_before: float  # squared error of the guided prediction on steps not trained on, as a share of the prediction's
    loss_after: float  # of the numbers as written
    improved: bool  # otherwise all tensors are those of the source
    seconds: float


def refine(
    shrunk: str | Path,
    *,
    like: str | Path,
    model: str | Path,
    output: str | Path,
    prompts: str | Path | None = None,
    seeds: Sequence[int] = (0,),
    steps: int = 120,
    batch: int = 8,
    device: str = "auto",
    dtype: str = "auto",
    force: bool = False,
    progress: Progress | None = None,
) -> Refined:
    """Train the factors of a shrunk LoRA until the model does with it what it does with the whole one.

    Ranks, names, alphas and dtypes stay. One picture in four is held out; where training does not make the prediction
    on these better, the output has the very numbers of the input.

    like: the adapter that `shrunk` was made of. model: as for `calibrate`. prompts: as for `sweep`, best such as call
    what the adapter was taught; default are general ones. seeds: each prompt is drawn with each of them.
    steps: of Adam, fewer if nothing is gained any more. batch: sampling steps of pictures in each.
    dtype: of the model; auto is fp32 on a CPU, else bf16. Factors are always trained in fp32.

    Raises:
        UsageError: options that contradict each other, a package that is missing, not enough memory.
        InputError: a file cannot be read, an adapter is not for this model, or is not plain LoRA.
        NonFinite: the model predicts NaN with one of them.
        OutputError: `output` exists and `force` is not set, or cannot be written.
    """
    started = time.perf_counter()
    source, whole, place = Path(shrunk), Path(like), Path(output)
    if steps < 1 or batch < 1:
        raise UsageError("steps, and the batch of each, are at least 1.")
    if place.suffix != ".safetensors":
        raise UsageError(f"{place}: is written as a safetensors file; give a name that ends in .safetensors.")
    check_output(place, force=force, inputs=[source, whole, Path(model)])
    check_packages()
    kind = KINDS[pipeline_kind(Path(model))]
    device = pick_device(device)
    with ExitStack() as stack:
        base = stack.enter_context(open_base(model))
        adapter = stack.enter_context(open_adapter(source))
        if adapter.as_folder:
            raise UsageError(
                f"{source}: is a PEFT folder. Make a file of it with `lorashrink convert --naming diffusers`."
            )
        for path in (source, whole):
            check_adapter(path, base)
        pipeline, shots = open_frozen(Path(model), kind, prompts, seeds, device, model_dtype(dtype, device))
        factors = _factors(adapter, pipeline, base, device)
        with adapted(pipeline, whole, base):
            moments = _recorded(pipeline, kind, shots, progress)
        stack.enter_context(_hooked(factors))
        search = _Search(factors, pipeline, kind, _split(moments), batch)
        with enough_memory(f"{model}: training does not fit into memory", device, _SMALLER):
            search.run(steps, progress)
        improved = search.settle()
        _write(place, adapter, factors if improved else (), whole, search.steps)
    return Refined(
        path=str(place),
        source=str(source),
        like=str(whole),
        model=str(model),
        layers=len(factors),
        steps=search.steps,
        rates=tuple(search.rates),
        loss_before=search.before,
        loss_after=search.after,
        improved=improved,
        seconds=time.perf_counter() - started,
    )


# --- the factors --------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Factors:
    """One layer that is trained."""

    layer: Layer
    up: Tensor  # [out, r] float32
    down: Tensor  # [r, in·kh·kw] float32
    scale: float
    places: tuple[tuple[nn.Module, int, tuple[int, int]], ...]  # module, its first row that is changed, rows of `up`

    @property
    def both(self) -> tuple[Tensor, Tensor]:
        return self.up, self.down

    def rounded(self) -> tuple[Tensor, Tensor]:
        """The factors in the dtype of the file."""
        up, down = (
            cast(tensor.detach().cpu(), self.layer.infos[role].dtype)
            for role, tensor in zip(("up", "down"), self.both, strict=True)
        )
        return up, down


def _factors(adapter: Adapter, pipeline: Any, base: Base, device: str) -> list[_Factors]:
    by_key = by_weight(watched(modules_of(pipeline, base), "diffusers", base))
    found = []
    for layer, views in zip(adapter.layers, match(adapter, base), strict=True):
        if (
            layer.family.name != "lora"
            or layer.own.keys() != {"up", "down"}
            or layer.keys.keys() - {"up", "down", "alpha"}
        ):
            raise InputError(
                f"{adapter.path}: layer {layer.name} is {layer.algo}, and only LoRA of two factors is refined. "
                "Make one of it with `lorashrink resize --as lora -r energy=1`."
            )
        places = tuple((part.module, part.start, rows) for part, rows in pieces(views, by_key))
        if places and not layer.off:
            delta = layer.delta
            assert isinstance(delta, Delta)
            up, down = (tensor.to(device, torch.float32).clone().requires_grad_() for tensor in (delta.up, delta.down))
            found.append(_Factors(layer, up, down, delta.scale, places))
    if not found:
        raise InputError(f"{adapter.path}: changes no layer of the loaded model.")
    return found


@contextmanager
def _hooked(factors: Sequence[_Factors]) -> Iterator[None]:
    """What the layers add, at the outputs of the model's modules, for as long as this lasts."""
    by_module: dict[nn.Module, list[tuple[_Factors, int, tuple[int, int]]]] = defaultdict(list)
    for each in factors:
        for module, start, rows in each.places:
            by_module[module].append((each, start, rows))

    def added(module: nn.Module, given: tuple[Tensor, ...], answer: Tensor) -> Tensor:
        for each, start, rows in by_module[module]:
            change = _change(module, given[0], each, rows)
            channel = 1 if isinstance(module, nn.Conv2d) else -1
            left = answer.shape[channel] - start - change.shape[channel]
            if start or left:
                around = (0, 0) * (answer.dim() - 2) if channel == 1 else ()
                change = functional.pad(change, (*around, start, left))
            answer = answer + change
        return answer

    with ExitStack() as stack:
        for module in by_module:
            stack.callback(module.register_forward_hook(added).remove)
        yield


def _change(module: nn.Module, given: Tensor, each: _Factors, rows: tuple[int, int]) -> Tensor:
    """scale · up · down · x, in the dtype of x."""
    up, down = each.up[slice(*rows)].to(given.dtype), each.down.to(given.dtype)
    if isinstance(module, nn.Conv2d):
        weight = down.reshape(len(down), -1, *module.kernel_size)
        inner = functional.conv2d(given, weight, None, module.stride, module.padding, module.dilation)
        return functional.conv2d(inner, up[:, :, None, None]) * each.scale
    return functional.linear(functional.linear(given, down), up) * each.scale


# --- sampling steps -----------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Moment:
    """One step of a picture that is drawn with the whole adapter."""

    shot: Shot
    sample: Tensor  # [1, ...], what the denoiser was given
    at: Tensor  # [], the time that it was told
    wanted: Tensor  # [1, ...] float32, the guided prediction
    width: float  # by how much the step changes the picture, for a prediction of length 1

    @property
    def size(self) -> float:
        """What errors are a share of."""
        return float(self.wanted.square().sum()) * self.width


def _recorded(pipeline: Any, kind: Kind, shots: Sequence[Shot], progress: Progress | None) -> list[_Moment]:
    moments: list[_Moment] = []
    module = getattr(pipeline, kind.denoiser)
    original = module.forward
    for number, shot in enumerate(shots):
        step = 0

        def forward(*args: Any, shot: Shot = shot, **kwargs: Any) -> Any:
            nonlocal step
            answer = original(*args, **kwargs)
            sample, at = _given(args, kwargs)
            wanted = guided(pipeline, answer[0].float()).cpu()
            width = step_width(pipeline.scheduler, step)
            moments.append(_Moment(shot, sample[:1].cpu(), at.flatten()[0].cpu(), wanted, width))
            step += 1
            return answer

        module.forward = forward
        try:
            pipeline(**request([shot], kind), output_type="latent")
        finally:
            del module.forward
        if progress:
            progress("drawing", number + 1, len(shots))
    if not all(math.isfinite(each.size) for each in moments):
        raise NonFinite("the model predicts NaN or infinity with the whole adapter. Use another --dtype, such as fp32.")
    return moments


# What diffusers' UNets call their input, and what its transformers do; UNets get both in place.
_INPUTS = ("sample", "hidden_states")


def _given(args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """The sample and the time that a denoiser is called with."""
    sample = args[0] if args else next(kwargs[name] for name in _INPUTS if name in kwargs)
    at = args[1] if len(args) > 1 else kwargs["timestep"]
    return sample, at


class _Enough(Exception):
    """A pipeline has done what was wanted of it."""


def _predicted(pipeline: Any, kind: Kind, moments: Sequence[_Moment]) -> Tensor:
    """The guided predictions [n, ...] float32 at moments of equal size and guidance; with gradients, if enabled.

    The pipeline prepares all else that the denoiser is told, text included: it may be what an adapter changes.
    """
    module = getattr(pipeline, kind.denoiser)
    original = module.forward
    found: list[Tensor] = []

    def forward(*args: Any, **kwargs: Any) -> Any:
        sample, _ = _given(args, kwargs)
        branches = len(sample) // len(moments)
        given = torch.cat([each.sample for each in moments] * branches).to(sample)
        at = torch.stack([each.at for each in moments] * branches).to(sample.device)
        if args:
            answer = original(given, at, *args[2:], **kwargs)
        else:
            name = next(name for name in _INPUTS if name in kwargs)
            answer = original(**kwargs | {name: given, "timestep": at})
        found.append(guided(pipeline, answer[0].float()))
        raise _Enough

    module.forward = forward
    try:
        draw: Any = type(pipeline).__call__
        with suppress(_Enough):
            draw.__wrapped__(pipeline, **request([each.shot for each in moments], kind), output_type="latent")
    finally:
        del module.forward
    return found[0]


def _split(moments: Sequence[_Moment]) -> tuple[list[_Moment], list[_Moment]]:
    """Those that are trained on, and those held out: whole pictures where there are enough."""
    shots = list(dict.fromkeys(each.shot for each in moments))
    numbers = {shot: number for number, shot in enumerate(shots)}
    parts: tuple[list[_Moment], list[_Moment]] = ([], [])
    for place, each in enumerate(moments):
        number = numbers[each.shot] if len(shots) >= _HELD else place
        parts[number % _HELD == _HELD - 1].append(each)
    trained, held = parts
    if not trained or not held:
        raise UsageError(
            "too few steps to train on some and hold out others. Give more prompts, or more steps in each."
        )
    return trained, held[:: math.ceil(len(held) / _MOST_HELD)]


def _together(moments: Sequence[_Moment]) -> Iterator[list[_Moment]]:
    """Groups that can go through the model at once."""
    groups: dict[tuple[Any, ...], list[_Moment]] = defaultdict(list)
    for each in moments:
        prompt = each.shot.prompt
        groups[(prompt.width, prompt.height, prompt.scale)].append(each)
    for (width, height, _), group in groups.items():
        most = max(1, _PIXELS // (width * height))
        yield from (group[start : start + most] for start in range(0, len(group), most))


# --- training -----------------------------------------------------------------------------------


class _Search:
    """Adam on the factors, with a look at the steps held out after each round.

    What is looked at is a running mean of the factors. Where it is no better than the best so far, training goes on
    from the best at half the rate.
    """

    def __init__(
        self,
        factors: Sequence[_Factors],
        pipeline: Any,
        kind: Kind,
        parts: tuple[Sequence[_Moment], Sequence[_Moment]],
        batch: int,
    ) -> None:
        """parts: what is trained on, and what is held out. Raises NonFinite."""
        self.factors, self.pipeline, self.kind = factors, pipeline, kind
        self.trained, self.held = parts
        self.batch = min(batch, len(self.trained))
        self.tensors = [tensor for each in factors for tensor in each.both]
        self.start = self.best = _copies(self.tensors)
        self.sizes = [max(float(tensor.square().mean().sqrt()), _TINY) for tensor in self.start]
        self.unit = sum(each.size for each in self.trained) / len(self.trained) * self.batch
        self.steps, self.rates = 0, list[float]()
        self.before = self.after = self._look(self.start)
        if not math.isfinite(self.before):
            raise NonFinite(
                "the model predicts NaN or infinity with the shrunk adapter. Use another --dtype, e.g. fp32."
            )

    def run(self, steps: int, progress: Progress | None) -> None:
        """Train for so many steps, or until nothing is gained any more."""
        rate, optimizer, mean, age = _RATE, self._optimizer(), _copies(self.start), 0
        generator = torch.Generator().manual_seed(0)
        while self.before > _ROUNDING and self.steps < steps and rate > _SLOWEST:
            self.rates += [] if self.rates[-1:] == [rate] else [rate]
            for _ in range(min(_ROUND, steps - self.steps)):
                age += 1
                self._step(optimizer, rate * (1 - self.steps / steps) * min(1, age / _WARMUP), generator)
                torch._foreach_lerp_(mean, _copies(self.tensors), max(1 / age, 1 - _MEAN))
                self.steps += 1
                if progress:
                    progress("refining", self.steps, steps)
            loss = self._look(mean)
            if loss < self.after:  # NaN is not
                self.best, self.after = _copies(mean), loss
            else:
                self._put(self.best)
                rate, optimizer, mean, age = rate / 2, self._optimizer(), _copies(self.best), 0

    def settle(self) -> bool:
        """Round the best factors as they will be written; False, and back to the start, if they gain nothing then."""
        self._put(self.best)
        rounded = [
            tensor.float().to(mine.device)
            for each in self.factors
            for tensor, mine in zip(each.rounded(), each.both, strict=True)
        ]
        self.after = self._look(rounded)
        improved = self.after < self.before * (1 - _GAIN)
        if not improved:
            self._put(self.start)
            self.after = self.before
        return improved

    def _optimizer(self) -> torch.optim.Adam:
        return torch.optim.Adam([{"params": [tensor]} for tensor in self.tensors], betas=_BETAS)

    def _step(self, optimizer: torch.optim.Adam, rate: float, generator: torch.Generator) -> None:
        for group, size in zip(optimizer.param_groups, self.sizes, strict=True):
            group["lr"] = rate * size
        optimizer.zero_grad()
        chosen = torch.randperm(len(self.trained), generator=generator)[: self.batch].tolist()
        for moments in _together([self.trained[place] for place in chosen]):
            with torch.enable_grad():
                torch.autograd.backward([self._error(moments) / self.unit])
        optimizer.step()

    def _look(self, values: Sequence[Tensor]) -> float:
        """The error on the steps held out with these factors; the ones in training stay."""
        current = _copies(self.tensors)
        self._put(values)
        with torch.no_grad():
            error = sum(float(self._error(group)) for group in _together(self.held))
        self._put(current)
        return error / sum(each.size for each in self.held)

    def _error(self, moments: Sequence[_Moment]) -> Tensor:
        found = _predicted(self.pipeline, self.kind, moments)
        off = found - torch.cat([each.wanted for each in moments]).to(found.device)
        widths = torch.tensor([each.width for each in moments], device=found.device)
        return (off.square().flatten(1).sum(1) * widths).sum()

    def _put(self, values: Sequence[Tensor]) -> None:
        with torch.no_grad():
            torch._foreach_copy_(self.tensors, list(values))


def _copies(tensors: Sequence[Tensor]) -> list[Tensor]:
    return [tensor.detach().clone() for tensor in tensors]


# --- the file -----------------------------------------------------------------------------------


def _write(path: Path, adapter: Adapter, trained: Sequence[_Factors], whole: Path, steps: int) -> None:
    """The adapter with the trained factors, all else as it was. Raises OutputError."""
    store = adapter.store
    with open_adapter(whole) as opened:
        origin = {"steps": steps, "like_sha256": sha256_file(opened.store.files[0])}
    new = {
        each.layer.keys[role]: tensor
        for each in trained
        for role, tensor in zip(("up", "down"), each.rounded(), strict=True)
    }
    save_tensors(path, new, {**store.metadata, REFINED: json.dumps(origin)}, source=store)
