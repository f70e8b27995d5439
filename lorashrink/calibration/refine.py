"""`refine`: train the factors of a shrunk adapter until the model predicts with it what it does with the original.

This is distillation on the sampling steps of pictures that the original adapter draws. The error is that of the guided
prediction, each step weighted with what it does to the picture, as in `calibrate`.
"""

from __future__ import annotations

import json
import math
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from lorashrink.adapters import Adapter, Layer, open_adapter
from lorashrink.bases import Base, open_base
from lorashrink.calibration.denoising import denoiser_inputs, draw_latents, guided, step_width, with_inputs
from lorashrink.calibration.models import model_dtype, open_frozen_pipeline, pipeline_arguments
from lorashrink.calibration.scaling import DAMPINGS, effects, ridge
from lorashrink.calibration.sites import Watched, by_weight, forward_hooks, modules_of, pieces, watched
from lorashrink.engine.delta import Delta
from lorashrink.engine.devices import pick_device
from lorashrink.errors import InputError, NonFinite, Progress, UsageError
from lorashrink.files.disk import check_output, sha256_file
from lorashrink.files.metadata_keys import REFINED
from lorashrink.files.store import cast
from lorashrink.files.writing import save_tensors
from lorashrink.linking.matching import match
from lorashrink.pictures.adapting import adapted, check_adapter
from lorashrink.pictures.drawing import Shot
from lorashrink.pictures.pipelines import KINDS, Kind, check_packages, enough_memory, pipeline_kind

# Adam's rate at the start, relative to the size of each factor's numbers; it is halved where it is too high.
_RATE, _SLOWEST = 0.01, 1e-4

_BETAS = (0.9, 0.99)

_WARMUP = 5  # steps: in its first steps Adam knows only the signs of gradients

_MEAN = 0.9  # decay of the running mean of the factors, which is the result: it has less of the batches' noise

_ROUND = 10  # steps of Adam between two errors on what is held out

_TINY = 1e-6

_SMALLER = "Give the prompts a smaller --w and --h."

_HELD = 4  # one picture in so many is held out

_MOST_HELD = 48  # sampling steps of the held-out error

_MOST_SCALED = 128  # sampling steps of the closed form; more gain nothing

_PIXELS = 1 << 20  # that go through the model at once; at least one picture does

# A smaller error is rounding, as a share of the prediction; a smaller gain is chance, as a share of the error.
_ROUNDING, _GAIN = 1e-8, 1e-3


@dataclass(frozen=True, slots=True)
class Refined:
    """A written adapter, and how far its predictions are from those of the original."""

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
    loss_scaled: float | None = None  # after the closed form, None without it


def refine(
    shrunk: str | Path,
    *,
    like: str | Path,
    model: str | Path,
    output: str | Path,
    prompts: str | Path | None = None,
    settings: str | Path | None = None,
    seeds: Sequence[int] = (0,),
    steps: int = 120,
    batch: int = 8,
    closed_form: bool = False,
    device: str = "auto",
    dtype: str = "auto",
    force: bool = False,
    progress: Progress | None = None,
) -> Refined:
    """Train the factors of a shrunk LoRA until the model does with it what it does with the original.

    Ranks, names, alphas and dtypes stay. One picture in four is held out; where training does not make the prediction
    on these better, the output has exactly the numbers of the input.

    like: the adapter that `shrunk` was made of. model, settings: as for `calibrate`. prompts: as for `sweep`, best with
    the words that call what the adapter was taught; default are general ones. seeds: each prompt is drawn with each.
    steps: of Adam, fewer if nothing is gained any more. batch: sampling steps of pictures per step of Adam.
    closed_form: before that, each dimension gets a factor by regression, where held-out predictions gain by it; this is
    quick, and steps may be 0 then.
    dtype: of the model; auto is fp32 on a CPU, else bf16. Factors are always trained in fp32.

    Raises:
        UsageError: options that contradict each other, a package that is missing, not enough memory.
        InputError: a file cannot be read, an adapter is not for this model, or is not plain LoRA.
        NonFinite: the model predicts NaN with one of them.
        OutputError: `output` exists and `force` is not set, or cannot be written.
    """
    started = time.perf_counter()
    source, reference, target = Path(shrunk), Path(like), Path(output)
    if steps < 0 or batch < 1 or not (steps or closed_form):
        raise UsageError("steps, and the batch of each, are at least 1; no steps are enough with the closed form only.")
    if target.suffix != ".safetensors":
        raise UsageError(f"{target}: is written as a safetensors file; give a name that ends in .safetensors.")
    check_output(target, force=force, inputs=[source, reference, Path(model)])
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
        for path in (source, reference):
            check_adapter(path, base)
        companion = None if settings is None else Path(settings)
        weights_dtype = model_dtype(dtype, device)
        pipeline, shots = open_frozen_pipeline(Path(model), kind, prompts, seeds, device, weights_dtype, companion)
        layers = _trained_layers(adapter, pipeline, base, device)
        with adapted(pipeline, reference, base):
            timesteps: list[_Timestep] = []
            for number, shot in enumerate(shots, start=1):
                timesteps += _record(pipeline, kind, shot)
                if progress:
                    progress("drawing", number, len(shots))
        if not all(math.isfinite(timestep.size) for timestep in timesteps):
            raise NonFinite(
                "the model predicts NaN or infinity with the original adapter. Use another --dtype, such as fp32."
            )
        stack.enter_context(_added(layers))
        search = _Search(layers, pipeline, kind, timesteps, batch)
        with enough_memory(f"{model}: training does not fit into memory", device, _SMALLER):
            if closed_form:
                search.scale(progress)
            search.run(steps, progress)
        improved = search.settle()
        _write(target, adapter, layers if improved else (), reference, search.steps)
    return Refined(
        path=str(target),
        source=str(source),
        like=str(reference),
        model=str(model),
        layers=len(layers),
        steps=search.steps,
        rates=tuple(search.rates),
        loss_before=search.before,
        loss_after=search.after,
        improved=improved,
        seconds=time.perf_counter() - started,
        loss_scaled=search.scaled,
    )


# --- the factors --------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _TrainedLayer:
    """One layer of the shrunk adapter, and where it adds to the model."""

    layer: Layer
    up: Tensor  # [out, r] float32
    down: Tensor  # [r, in·kh·kw] float32
    scale: float
    sites: tuple[tuple[Watched, tuple[int, int]], ...]  # a module's rows, and those of `up` that belong there

    def rounded(self) -> tuple[Tensor, Tensor]:
        """Both factors in the dtype of the file."""
        up, down = (
            cast(tensor.detach().cpu(), self.layer.infos[role].dtype)
            for role, tensor in (("up", self.up), ("down", self.down))
        )
        return up, down

    def change(self, module: nn.Module, inputs: Tensor, rows: tuple[int, int]) -> Tensor:
        """scale · up · down · x for some rows of `up`, in the dtype of x."""
        up, down = self.up[slice(*rows)].to(inputs.dtype), self.down.to(inputs.dtype)
        if isinstance(module, nn.Conv2d):
            weight = down.reshape(len(down), -1, *module.kernel_size)
            inner = functional.conv2d(inputs, weight, None, module.stride, module.padding, module.dilation)
            return functional.conv2d(inner, up[:, :, None, None]) * self.scale
        return functional.linear(functional.linear(inputs, down), up) * self.scale


def _trained_layers(adapter: Adapter, pipeline: Any, base: Base, device: str) -> list[_TrainedLayer]:
    by_key = by_weight(watched(modules_of(pipeline, base), "diffusers", base))
    layers = []
    for layer, views in zip(adapter.layers, match(adapter, base), strict=True):
        two_factors = layer.own.keys() == {"up", "down"} and layer.keys.keys() <= {"up", "down", "alpha"}
        if layer.family.name != "lora" or not two_factors:
            raise InputError(
                f"{adapter.path}: layer {layer.name} is {layer.algo}, and only LoRA of two factors is refined. "
                "Make one of it with `lorashrink resize --as lora -r energy=1`."
            )
        sites = tuple(pieces(views, by_key))
        if sites and not layer.off:
            delta = layer.delta
            assert isinstance(delta, Delta)
            up, down = (tensor.to(device, torch.float32).clone().requires_grad_() for tensor in (delta.up, delta.down))
            layers.append(_TrainedLayer(layer, up, down, delta.scale, sites))
    if not layers:
        raise InputError(f"{adapter.path}: changes no layer of the loaded model.")
    return layers


@contextmanager
def _added(layers: Sequence[_TrainedLayer]) -> Iterator[None]:
    """The layers add to the outputs of the model's modules for as long as this lasts."""
    by_module: dict[nn.Module, list[tuple[_TrainedLayer, int, tuple[int, int]]]] = defaultdict(list)
    for layer in layers:
        for site, rows in layer.sites:
            by_module[site.module].append((layer, site.start, rows))

    def add(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        for layer, start, rows in by_module[module]:
            change = layer.change(module, inputs[0], rows)
            channel = 1 if isinstance(module, nn.Conv2d) else -1
            behind = output.shape[channel] - start - change.shape[channel]
            if start or behind:
                around = (0, 0) * (output.dim() - 2) if channel == 1 else ()
                change = functional.pad(change, (*around, start, behind))
            output = output + change
        return output

    with forward_hooks(by_module, add):
        yield


# --- sampling steps -----------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Timestep:
    """One sampling step of a picture that is drawn with the original adapter."""

    shot: Shot
    sample: Tensor  # [1, ...], the denoiser's input
    time: Tensor  # [], its other input
    target: Tensor  # [1, ...] float32, the guided prediction
    width: float  # by how much the step changes the picture, for a prediction of length 1

    @property
    def size(self) -> float:
        """The error of predicting nothing, which other errors are a share of."""
        return float(self.target.square().sum()) * self.width


def _record(pipeline: Any, kind: Kind, shot: Shot) -> list[_Timestep]:
    """The sampling steps of a shot that is drawn with the adapter on the model."""
    timesteps: list[_Timestep] = []

    def recorded_step(forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        output = forward(*args, **kwargs)
        sample, time = denoiser_inputs(args, kwargs)
        target = guided(pipeline, output[0].float()).cpu()
        width = step_width(pipeline.scheduler, len(timesteps))
        timesteps.append(_Timestep(shot, sample[:1].cpu(), time.flatten()[0].cpu(), target, width))
        return output

    with torch.no_grad():
        draw_latents(pipeline, kind.denoiser, pipeline_arguments([shot], kind), recorded_step)
    return timesteps


class _Enough(Exception):
    """The denoiser has been called, and the pipeline need not go on."""


def _predict(pipeline: Any, kind: Kind, timesteps: Sequence[_Timestep]) -> Tensor:
    """The guided predictions [n, ...] float32 at time steps of equal size and guidance; with gradients, if enabled.

    The pipeline prepares all other inputs of the denoiser, text included: the adapter may change the text encoders.
    """
    predictions: list[Tensor] = []

    def predicted_step(forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        sample, _ = denoiser_inputs(args, kwargs)
        branches = len(sample) // len(timesteps)  # 2 with guidance
        samples = torch.cat([timestep.sample for timestep in timesteps] * branches).to(sample)
        times = torch.stack([timestep.time for timestep in timesteps] * branches).to(sample.device)
        args, kwargs = with_inputs(args, kwargs, samples, times)
        predictions.append(guided(pipeline, forward(*args, **kwargs)[0].float()))
        raise _Enough

    arguments = pipeline_arguments([timestep.shot for timestep in timesteps], kind)
    with suppress(_Enough):
        draw_latents(pipeline, kind.denoiser, arguments, predicted_step)
    return predictions[0]


def _split(timesteps: Sequence[_Timestep]) -> tuple[list[_Timestep], list[_Timestep]]:
    """Time steps to train on, and time steps held out: whole pictures if there are enough. Raises UsageError."""
    numbers = {shot: number for number, shot in enumerate(dict.fromkeys(timestep.shot for timestep in timesteps))}
    trained: list[_Timestep] = []
    held: list[_Timestep] = []
    for index, timestep in enumerate(timesteps):
        number = numbers[timestep.shot] if len(numbers) >= _HELD else index
        (held if number % _HELD == _HELD - 1 else trained).append(timestep)
    if not trained or not held:
        raise UsageError(
            "too few steps to train on some and hold out others. Give more prompts, or more steps in each."
        )
    return trained, held[:: math.ceil(len(held) / _MOST_HELD)]


def _batches(timesteps: Sequence[_Timestep]) -> Iterator[list[_Timestep]]:
    """Groups that can go through the model at once."""
    groups: dict[tuple[int, int, float], list[_Timestep]] = defaultdict(list)
    for timestep in timesteps:
        prompt = timestep.shot.prompt
        groups[prompt.width, prompt.height, prompt.scale].append(timestep)
    for (width, height, _), group in groups.items():
        most = max(1, _PIXELS // (width * height))
        yield from (group[start : start + most] for start in range(0, len(group), most))


# --- training -----------------------------------------------------------------------------------


class _Search:
    """Adam on the factors, with the error on the time steps held out taken after each round.

    The error is that of a running mean of the factors. Where it is no better than the best so far, training goes on
    from the best at half the rate.
    """

    def __init__(
        self,
        layers: Sequence[_TrainedLayer],
        pipeline: Any,
        kind: Kind,
        timesteps: Sequence[_Timestep],
        batch: int,
    ) -> None:
        """Raises UsageError if there are too few time steps, NonFinite if the model predicts NaN."""
        self.layers, self.pipeline, self.kind = layers, pipeline, kind
        self.trained, self.held = _split(timesteps)
        self.batch = min(batch, len(self.trained))
        self.factors = [factor for layer in layers for factor in (layer.up, layer.down)]
        self.start = self.best = _copies(self.factors)
        self.sizes = [max(float(factor.square().mean().sqrt()), _TINY) for factor in self.start]
        self.unit = sum(timestep.size for timestep in self.trained) / len(self.trained) * self.batch
        self.steps, self.rates = 0, list[float]()
        self.before = self.after = self._held_out_error(self.start)
        self.scaled: float | None = None
        if not math.isfinite(self.before):
            raise NonFinite(
                "the model predicts NaN or infinity with the shrunk adapter. Use another --dtype, e.g. fp32."
            )

    def scale(self, progress: Progress | None) -> None:
        """Give each dimension the factor of the ridge regression that is best on the time steps held out, if any is."""
        self.scaled = self.before
        if self.before <= _ROUNDING:
            return
        ups = [layer.up for layer in self.layers]
        chosen = self.trained[:: math.ceil(len(self.trained) / _MOST_SCALED)]
        generator = torch.Generator().manual_seed(0)
        rows, missing = [], []
        for number, timestep in enumerate(chosen, 1):
            with torch.enable_grad():
                prediction = _predict(self.pipeline, self.kind, [timestep])
                noise = torch.randn(prediction.shape, generator=generator) * math.sqrt(timestep.width)
                rows.append(effects((prediction * noise.to(prediction.device)).sum(), ups))
            missing.append(((timestep.target - prediction.detach().cpu()) * noise).sum().double())
            if progress:
                progress("scaling", number, len(chosen))
        for damping in DAMPINGS:
            deltas = ridge(torch.stack(rows), torch.stack(missing), damping)
            values = _copies(self.start)
            for up, delta in zip(values[::2], torch.split(deltas, [up.shape[1] for up in ups]), strict=True):
                up *= (1 + delta).to(up)
            loss = self._held_out_error(values)
            if loss < self.after:  # NaN is not
                self.best, self.after = values, loss
        self.scaled = self.after
        self._set_factors(self.best)

    def run(self, steps: int, progress: Progress | None) -> None:
        """Train for so many steps, or until nothing is gained any more."""
        rate, optimizer, mean, age = _RATE, self._optimizer(), _copies(self.best), 0
        generator = torch.Generator().manual_seed(0)
        while self.before > _ROUNDING and self.steps < steps and rate > _SLOWEST:
            self.rates += [] if self.rates[-1:] == [rate] else [rate]
            for _ in range(min(_ROUND, steps - self.steps)):
                age += 1
                self._step(optimizer, rate * (1 - self.steps / steps) * min(1, age / _WARMUP), generator)
                torch._foreach_lerp_(mean, _copies(self.factors), max(1 / age, 1 - _MEAN))
                self.steps += 1
                if progress:
                    progress("refining", self.steps, steps)
            loss = self._held_out_error(mean)
            if loss < self.after:  # NaN is not
                self.best, self.after = _copies(mean), loss
            else:
                self._set_factors(self.best)
                rate, optimizer, mean, age = rate / 2, self._optimizer(), _copies(self.best), 0

    def settle(self) -> bool:
        """Round the best factors as in the file. Returns False, with the factors of the start, if they gain nothing."""
        self._set_factors(self.best)
        rounded = [factor.float() for layer in self.layers for factor in layer.rounded()]
        self.after = self._held_out_error([factor.to(self.factors[0].device) for factor in rounded])
        improved = self.after < self.before * (1 - _GAIN)
        if not improved:
            self._set_factors(self.start)
            self.after = self.before
        return improved

    def _optimizer(self) -> torch.optim.Adam:
        return torch.optim.Adam(self.factors, betas=_BETAS)

    def _step(self, optimizer: torch.optim.Adam, rate: float, generator: torch.Generator) -> None:
        optimizer.param_groups[0]["lr"] = rate
        optimizer.zero_grad()
        chosen = torch.randperm(len(self.trained), generator=generator)[: self.batch].tolist()
        for timesteps in _batches([self.trained[index] for index in chosen]):
            with torch.enable_grad():
                torch.autograd.backward([self._error(timesteps) / self.unit])
        before = _copies(self.factors)
        optimizer.step()
        with torch.no_grad():  # Adam's steps do not know the size of a factor's numbers
            changes = torch._foreach_sub(self.factors, before)
            torch._foreach_mul_(changes, self.sizes)
            torch._foreach_copy_(self.factors, torch._foreach_add(before, changes))

    def _held_out_error(self, values: Sequence[Tensor]) -> float:
        """The error on the time steps held out with these factors, as a share; the factors in training stay."""
        current = _copies(self.factors)
        self._set_factors(values)
        with torch.no_grad():
            error = sum(float(self._error(timesteps)) for timesteps in _batches(self.held))
        self._set_factors(current)
        return error / sum(timestep.size for timestep in self.held)

    def _error(self, timesteps: Sequence[_Timestep]) -> Tensor:
        predictions = _predict(self.pipeline, self.kind, timesteps)
        differences = predictions - torch.cat([timestep.target for timestep in timesteps]).to(predictions.device)
        widths = torch.tensor([timestep.width for timestep in timesteps], device=predictions.device)
        return (differences.square().flatten(1).sum(1) * widths).sum()

    def _set_factors(self, values: Sequence[Tensor]) -> None:
        with torch.no_grad():
            torch._foreach_copy_(self.factors, list(values))


def _copies(tensors: Sequence[Tensor]) -> list[Tensor]:
    return [tensor.detach().clone() for tensor in tensors]


# --- the file -----------------------------------------------------------------------------------


def _write(path: Path, adapter: Adapter, trained: Sequence[_TrainedLayer], reference: Path, steps: int) -> None:
    """Write the adapter with the trained factors and all other tensors as they are. Raises OutputError."""
    store = adapter.store
    with open_adapter(reference) as opened:
        origin = {"steps": steps, "like_sha256": sha256_file(opened.store.files[0])}
    new = {
        layer.layer.keys[role]: tensor
        for layer in trained
        for role, tensor in zip(("up", "down"), layer.rounded(), strict=True)
    }
    save_tensors(path, new, {**store.metadata, REFINED: json.dumps(origin)}, source=store)
