"""A diffusion pipeline that draws while its denoiser is watched, and what a sampling step does to the picture."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

# A call of a module in place of its own: (the module's forward, arguments, keyword arguments) -> output.
Around = Callable[[Callable[..., Any], tuple[Any, ...], dict[str, Any]], Any]

# diffusers' UNets call their input `sample`, and its transformers `hidden_states`; UNets get both inputs in place.
_INPUTS = ("sample", "hidden_states")


def draw_latents(pipeline: Any, denoiser: str, settings: Mapping[str, Any], around: Around) -> None:
    """Draw a picture, but not its pixels, with every call of the denoiser going through `around`.

    settings: arguments of the pipeline. Gradients are recorded if the caller has them enabled.
    """
    # diffusers decorates `__call__` with torch.no_grad, which would end all gradients; unwrapped, it does the same.
    draw = inspect.unwrap(type(pipeline).__call__)
    with wrapped_forward(getattr(pipeline, denoiser), around):
        draw(pipeline, **settings, output_type="latent")


@contextmanager
def wrapped_forward(module: nn.Module, around: Around) -> Iterator[None]:
    """Calls of the module go through `around` for as long as this lasts; then the module is as before.

    A hook cannot do this: `around` may leave the call out, or run it without gradients.
    """
    forward = module.forward
    replaced_before = "forward" in vars(module)  # accelerate does so
    module.forward = lambda *args, **kwargs: around(forward, args, kwargs)
    try:
        yield
    finally:
        if replaced_before:
            module.forward = forward
        else:
            del module.forward


def denoiser_inputs(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """The sample and the time that a denoiser is called with."""
    sample = args[0] if args else next(kwargs[name] for name in _INPUTS if name in kwargs)
    time = args[1] if len(args) > 1 else kwargs["timestep"]
    return sample, time


def with_inputs(
    args: tuple[Any, ...], kwargs: dict[str, Any], sample: Tensor, time: Tensor
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of a denoiser's call with another sample and time."""
    if args:
        return (sample, time, *args[2:]), kwargs
    name = next(name for name in _INPUTS if name in kwargs)
    return (), {**kwargs, name: sample, "timestep": time}


def guided(pipeline: Any, predicted: Tensor) -> Tensor:
    """The prediction that the sampler uses [n, ...]; `predicted` is a denoiser's output, [2n, ...] with guidance."""
    if not getattr(pipeline, "do_classifier_free_guidance", False):
        return predicted
    without_prompt, with_prompt = predicted.chunk(2)
    return torch.lerp(without_prompt, with_prompt, float(pipeline.guidance_scale))


def step_width(scheduler: Any, step: int) -> float:
    """By how much a step changes the picture, for a prediction of length 1."""
    sigmas = getattr(scheduler, "sigmas", None)
    if sigmas is not None:
        high, low = float(sigmas[step]), float(sigmas[step + 1])
    else:
        signals = [float(scheduler.alphas_cumprod[int(time)]) for time in scheduler.timesteps[step : step + 2]]
        high, low = [*(math.sqrt((1 - signal) / signal) for signal in signals), 0.0][:2]
    velocity = scheduler.config.get("prediction_type") == "v_prediction"
    return (high - low) / (math.hypot(1, high) if velocity else 1.0)
