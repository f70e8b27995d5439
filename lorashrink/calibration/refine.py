"""`refine`: train the factors of a shrunk adapter until the model predicts with it what it does with the original.

This is distillation on the sampling steps of pictures that the original adapter draws. The error is that of the guided
prediction, each step weighted with what it does to the picture, as in `calibrate`.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lorashrink.adapters import open_adapter
from lorashrink.bases import open_base
from lorashrink.calibration.models import model_dtype, open_frozen_pipeline
from lorashrink.calibration.scaling import DAMPINGS, effects, ridge
from lorashrink.calibration.timesteps import Timestep, batches, hold_out, predict, record
from lorashrink.calibration.trained_layers import TrainedLayer, layers_added, trained_layers
from lorashrink.engine.devices import pick_device
from lorashrink.errors import NonFinite, Progress, UsageError
from lorashrink.files.disk import check_output, sha256_file
from lorashrink.files.metadata_keys import REFINED
from lorashrink.files.writing import save_tensors
from lorashrink.pictures.adapting import adapted, check_adapter
from lorashrink.pictures.pipelines import KINDS, Kind, check_packages, enough_memory, pipeline_kind

# Adam's rate at the start, relative to the size of each factor's numbers; it is halved where it is too high.
_RATE, _SLOWEST = 0.01, 1e-4
_BETAS = (0.9, 0.99)
_WARMUP = 5  # steps: in its first steps Adam knows only the signs of gradients
_MEAN = 0.9  # decay of the running mean of the factors, which is the result: it has less of the batches' noise
_ROUND = 10  # steps of Adam between two errors on what is held out
_TINY = 1e-6
_SMALLER = "Give the prompts a smaller --w and --h."
_MOST_SCALED = 128  # sampling steps of the closed form; more gain nothing

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
    closed_form: bool = True,
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
    closed_form: before that, each dimension gets a factor by regression, where held-out predictions gain by it. This is
    quick. Steps may be 0 with it. Default True.
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
        layers = trained_layers(adapter, pipeline, base, device)
        with adapted(pipeline, reference, base):
            timesteps: list[Timestep] = []
            for number, shot in enumerate(shots, start=1):
                timesteps += record(pipeline, kind, shot)
                if progress:
                    progress("drawing", number, len(shots))
        if not all(math.isfinite(timestep.size) for timestep in timesteps):
            raise NonFinite(
                "the model predicts NaN or infinity with the original adapter. Use another --dtype, such as fp32."
            )
        stack.enter_context(layers_added(layers))
        search = _Search(layers, pipeline, kind, timesteps, batch)
        with enough_memory(f"{model}: training does not fit into memory", device, _SMALLER):
            if closed_form:
                search.scale(progress)
            search.run(steps, progress)
        improved = search.settle()
        factors = {key: factor for layer in layers for key, factor in layer.rounded().items()} if improved else {}
        with open_adapter(reference) as original:
            origin = {"steps": search.steps, "like_sha256": sha256_file(original.store.files[0])}
        metadata = {**adapter.store.metadata, REFINED: json.dumps(origin)}
        save_tensors(target, factors, metadata, source=adapter.store)
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


# --- training -----------------------------------------------------------------------------------


class _Search:
    """Adam on the factors, with the error on the time steps held out taken after each round.

    The error is that of a running mean of the factors. Where it is no better than the best so far, training goes on
    from the best at half the rate.
    """

    def __init__(
        self,
        layers: Sequence[TrainedLayer],
        pipeline: Any,
        kind: Kind,
        timesteps: Sequence[Timestep],
        batch: int,
    ) -> None:
        """Raises UsageError if there are too few time steps, NonFinite if the model predicts NaN."""
        self.layers, self.pipeline, self.kind = layers, pipeline, kind
        self.trained, self.held = hold_out(timesteps)
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
                prediction = predict(self.pipeline, self.kind, [timestep])
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
                optimizer.param_groups[0]["lr"] = rate * (1 - self.steps / steps) * min(1, age / _WARMUP)
                optimizer.zero_grad()
                chosen = torch.randperm(len(self.trained), generator=generator)[: self.batch].tolist()
                for timesteps in batches([self.trained[index] for index in chosen]):
                    with torch.enable_grad():
                        torch.autograd.backward([self._error(timesteps) / self.unit])
                before = _copies(self.factors)
                optimizer.step()
                with torch.no_grad():  # Adam's steps do not know the size of a factor's numbers
                    changes = torch._foreach_sub(self.factors, before)
                    torch._foreach_mul_(changes, self.sizes)
                    torch._foreach_copy_(self.factors, torch._foreach_add(before, changes))
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
        rounded = [factor.float() for layer in self.layers for factor in layer.rounded().values()]
        self.after = self._held_out_error([factor.to(self.factors[0].device) for factor in rounded])
        improved = self.after < self.before * (1 - _GAIN)
        if not improved:
            self._set_factors(self.start)
            self.after = self.before
        return improved

    def _optimizer(self) -> torch.optim.Adam:
        return torch.optim.Adam(self.factors, betas=_BETAS)

    def _held_out_error(self, values: Sequence[Tensor]) -> float:
        """The error on the time steps held out with these factors, as a share; the factors in training stay."""
        current = _copies(self.factors)
        self._set_factors(values)
        with torch.no_grad():
            error = sum(float(self._error(timesteps)) for timesteps in batches(self.held))
        self._set_factors(current)
        return error / sum(timestep.size for timestep in self.held)

    def _error(self, timesteps: Sequence[Timestep]) -> Tensor:
        predictions = predict(self.pipeline, self.kind, timesteps)
        differences = predictions - torch.cat([timestep.target for timestep in timesteps]).to(predictions.device)
        widths = torch.tensor([timestep.width for timestep in timesteps], device=predictions.device)
        return (differences.square().flatten(1).sum(1) * widths).sum()

    def _set_factors(self, values: Sequence[Tensor]) -> None:
        with torch.no_grad():
            torch._foreach_copy_(self.factors, list(values))


def _copies(tensors: Sequence[Tensor]) -> list[Tensor]:
    return [tensor.detach().clone() for tensor in tensors]
