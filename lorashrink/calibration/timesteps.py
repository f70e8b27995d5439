"""The sampling steps of pictures that the original adapter draws: recorded, predicted again, and held out."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lorashrink.calibration.denoising import denoiser_inputs, draw_latents, guided, step_width, with_inputs
from lorashrink.calibration.models import pipeline_arguments
from lorashrink.errors import UsageError
from lorashrink.pictures.drawing import Shot
from lorashrink.pictures.pipelines import Kind

_HELD = 4  # one picture in so many is held out
_MOST_HELD = 48  # sampling steps of the held-out error
_PIXELS = 1 << 20  # that go through the model at once; at least one picture does


@dataclass(frozen=True, eq=False)
class Timestep:
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


def record(pipeline: Any, kind: Kind, shot: Shot) -> list[Timestep]:
    """The sampling steps of a shot that is drawn with the adapter on the model."""
    timesteps: list[Timestep] = []

    def recorded_step(forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        output = forward(*args, **kwargs)
        sample, time = denoiser_inputs(args, kwargs)
        target = guided(pipeline, output[0].float()).cpu()
        width = step_width(pipeline.scheduler, len(timesteps))
        timesteps.append(Timestep(shot, sample[:1].cpu(), time.flatten()[0].cpu(), target, width))
        return output

    with torch.no_grad():
        draw_latents(pipeline, kind.denoiser, pipeline_arguments([shot], kind), recorded_step)
    return timesteps


class _Enough(Exception):
    """The denoiser has been called, and the pipeline need not go on."""


def predict(pipeline: Any, kind: Kind, timesteps: Sequence[Timestep]) -> Tensor:
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


def hold_out(timesteps: Sequence[Timestep]) -> tuple[list[Timestep], list[Timestep]]:
    """Time steps to train on, and time steps held out: whole pictures if there are enough. Raises UsageError."""
    numbers = {shot: number for number, shot in enumerate(dict.fromkeys(timestep.shot for timestep in timesteps))}
    trained: list[Timestep] = []
    held: list[Timestep] = []
    for index, timestep in enumerate(timesteps):
        number = numbers[timestep.shot] if len(numbers) >= _HELD else index
        (held if number % _HELD == _HELD - 1 else trained).append(timestep)
    if not trained or not held:
        raise UsageError(
            "too few steps to train on some and hold out others. Give more prompts, or more steps in each."
        )
    return trained, held[:: math.ceil(len(held) / _MOST_HELD)]


def batches(timesteps: Sequence[Timestep]) -> Iterator[list[Timestep]]:
    """Groups that can go through the model at once."""
    groups: dict[tuple[int, int, float], list[Timestep]] = defaultdict(list)
    for timestep in timesteps:
        prompt = timestep.shot.prompt
        groups[prompt.width, prompt.height, prompt.scale].append(timestep)
    for (width, height, _), group in groups.items():
        most = max(1, _PIXELS // (width * height))
        yield from (group[start : start + most] for start in range(0, len(group), most))
