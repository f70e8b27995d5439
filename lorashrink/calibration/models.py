"""The models that calibration observes, diffusion pipelines and language models, and what they run."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from lorashrink.bases import Base
from lorashrink.calibration.sites import Modules, module_at, modules_of
from lorashrink.calibration.watching import Recorder, watch_picture, watch_text
from lorashrink.errors import InputError, UsageError
from lorashrink.pictures.drawing import Shot, shots_of
from lorashrink.pictures.pipelines import KINDS, Kind, check_packages, open_pipeline, own_side, pipeline_kind
from lorashrink.pictures.prompts import Prompt, read_prompts

DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}

# Usual subjects of pictures. Statistics belong to the model: what is drawn matters little.
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


def model_dtype(dtype: str, device: str) -> str:
    """torch's name of what `auto` or one of `DTYPES` means here. Raises UsageError."""
    if dtype not in ("auto", *DTYPES):
        raise UsageError(f"dtype: '{dtype}' is not one of auto, {', '.join(DTYPES)}.")
    return DTYPES["fp32" if device == "cpu" else "bf16"] if dtype == "auto" else DTYPES[dtype]


_WINDOW = 512  # tokens of a text


class ObservedModel(NamedTuple):
    """A loaded model, and its runs: pictures that it draws or texts that it reads."""

    model: Any
    modules: Modules
    layout: str  # of the base's names: "native" or "diffusers"
    runs: Sequence[Any]  # as JSON, one per picture or text
    passes: int  # forward and backward, per run
    forwards: int  # without a backward pass, per run
    watch: Callable[[int, Recorder, Callable[[], None]], None]  # of a run's number; calls back after each pass
    pixels: float | None  # of a picture, on average; None for texts


def open_model(
    model: Path,
    base: Base,
    prompts: str | Path | None,
    text: str | Path | None,
    seeds: Sequence[int],
    steps_used: int,
    device: str,
    dtype: str,
    settings: Path | None = None,
) -> ObservedModel:
    """The model of a calibration, ready to be watched, with the runs that the options ask for.

    settings: as for `open_pipeline`. steps_used: per picture, and for a text its projections.
    Raises UsageError or InputError.
    """
    if model.is_dir() and not (model / "model_index.json").is_file():
        if text is None:
            raise UsageError(f"{model}: is a language model; give a file of texts with --text.")
        return _language_model(model, Path(text), seeds, steps_used, device, dtype)
    if text is not None:
        raise UsageError(f"{model}: draws pictures; give --prompts instead of --text.")
    check_packages()
    kind = KINDS[pipeline_kind(model)]
    pipeline, shots = open_frozen_pipeline(model, kind, prompts, seeds, device, dtype, settings)
    steps = min(shot.prompt.steps for shot in shots)
    used = min(steps_used, steps)

    def watch(number: int, recorder: Recorder, progress: Callable[[], None]) -> None:
        watch_picture(pipeline, kind.denoiser, recorder, pipeline_arguments([shots[number]], kind), used, progress)

    runs = [[asdict(shot.prompt), shot.start] for shot in shots]
    pixels = sum(shot.prompt.width * shot.prompt.height for shot in shots) / len(shots)
    return ObservedModel(pipeline, modules_of(pipeline, base), "diffusers", runs, used, steps - used, watch, pixels)


def open_frozen_pipeline(
    model: Path,
    kind: Kind,
    prompts: str | Path | None,
    seeds: Sequence[int],
    device: str,
    dtype: str,
    settings: Path | None = None,
) -> tuple[Any, tuple[Shot, ...]]:
    """A pipeline whose weights take no gradients, and what it draws.

    prompts: as in `read_prompts`; None stands for `PROMPTS`. settings: as for `open_pipeline`. Raises as these do.
    """
    side = own_side(model, settings)
    if prompts is None:
        drawn = tuple(Prompt(text, width=side, height=side, steps=20, scale=kind.scale) for text in PROMPTS)
    else:
        drawn = read_prompts(prompts, side=side)
    pipeline = open_pipeline(model, device=device, dtype=dtype, settings=settings)
    for part in pipeline.components.values():
        if isinstance(part, nn.Module):
            part.requires_grad_(False)
    if device != "cpu":
        getattr(pipeline, kind.denoiser).enable_gradient_checkpointing()
    return pipeline, shots_of(drawn, seeds)


def pipeline_arguments(shots: Sequence[Shot], kind: Kind) -> dict[str, Any]:
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


def _language_model(
    model: Path, text: Path, seeds: Sequence[int], probes: int, device: str, dtype: str
) -> ObservedModel:
    try:
        import transformers
    except ImportError:
        raise UsageError("language models need transformers: pip install 'lorashrink[pictures]'") from None
    try:
        lines = [line.strip() for line in text.read_text(encoding="utf-8").splitlines() if line.strip()]
        config = json.loads((model / "config.json").read_text(encoding="utf-8"))
        architectures = " ".join(config.get("architectures") or [])
        writes_words = "CausalLM" in architectures or "LMHead" in architectures
        loader = transformers.AutoModelForCausalLM if writes_words else transformers.AutoModel
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

    return ObservedModel(network, lambda _, name: module_at(network, name), "native", runs, probes, 0, watch, None)
