"""Pictures drawn while training."""

from __future__ import annotations

import logging
import math
import random
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import CLIPTokenizer

from lorashrink.errors import NonFinite
from lorashrink.pictures.drawing import Shot, draw_picture, write_picture
from lorashrink.pictures.pipelines import KINDS
from lorashrink.pictures.prompts import Prompt
from lorashrink.pictures.samplers import scheduler
from lorashrink.plots.sheet import Cell, contact_sheet
from lorashrink.train.flags.options import Options
from lorashrink.train.model.loading import CHUNK, Model, encode_captions, token_count, weight_dtype

_log = logging.getLogger(__name__)

_KIND = KINDS["StableDiffusionXLPipeline"]
# (a cat:1.2) is a weight in other programs.
_WEIGHT = re.compile(r"\([^()]+:\s*\d*\.?\d+\s*\)")


def check_prompts(prompts: Sequence[Prompt], tokenizer: CLIPTokenizer, world: int, options: Options) -> Iterator[str]:
    """Warnings: prompts longer than what the encoders read, token weights, a number that leaves processes waiting."""
    limit = options.max_token_length or CHUNK
    for number, prompt in enumerate(prompts):
        for name, text in (("prompt", prompt.prompt), ("negative prompt", prompt.negative)):
            start = f"sample {number:02d}: the {name} has"
            if (count := token_count(tokenizer, text)) > limit:
                tokens = f"{count} tokens, {count + 2} with its start and end"
                advice = "is cut off. Shorten it, or raise --max_token_length (up to 225)."
                yield f"{start} {tokens}; what is beyond {limit} ({limit + 2}) {advice}"
            if weight := _WEIGHT.search(text):
                yield f"{start} a weight, {weight[0]}, which is read as plain text."
    if len(prompts) % world:
        uneven = f"{len(prompts)} sample prompts do not divide evenly among {world} processes, so some wait for others"
        yield f"{uneven}; {math.ceil(len(prompts) / world) * world} would."


def due(options: Options, *, step: int, epoch: int | None = None) -> bool:
    """Whether pictures are drawn after this step, or at the end of this epoch if one is given; as in sd-scripts.

    Step 0 is before training. With --sample_every_n_epochs the steps do not count. Zero and negative numbers are off.
    """
    if not options.sample_prompts:
        return False
    if step == 0:
        return options.sample_at_first
    by_epoch = (options.sample_every_n_epochs or 0) > 0
    every = (options.sample_every_n_epochs if by_epoch else options.sample_every_n_steps) or 0
    number = epoch if by_epoch else step if epoch is None else None
    return every > 0 and number is not None and number % every == 0


@torch.no_grad()
def draw(
    model: Model,
    prompts: Sequence[Prompt],
    options: Options,
    *,
    step: int,
    epoch: int | None = None,
    rank: int,
    world: int,
    device: torch.device,
) -> dict[int, Path]:
    """Draw this process's share of the prompts and write it below output_dir/sample: number of a prompt -> picture.

    The UNet is on `device` and the network in eval mode. Encoders and VAE may be elsewhere and go back there. The state
    of the global random numbers stays. Raises OutputError if a picture cannot be written.
    """
    # Its import says things that `quiet_libraries` must come before.
    from diffusers import StableDiffusionXLPipeline

    share = list(enumerate(prompts))[rank::world]
    dtype = weight_dtype(options)
    autocast = torch.autocast(device.type, dtype, enabled=options.mixed_precision != "no")
    with autocast, _moved(model.encoders, device):
        # As in sd-scripts an empty text is encoded, not replaced by zeros.
        pairs = ([prompt.negative, prompt.prompt] for _, prompt in share)
        encoded = [encode_captions(model, pair, options.max_token_length).to(device, dtype) for pair in pairs]
    paths: dict[int, Path] = {}
    with autocast, _moved([model.vae], device, torch.float32):
        pipeline: Any = StableDiffusionXLPipeline(
            unet=model.unet,
            vae=model.vae,
            scheduler=scheduler("ddim", v_parameterization=options.v_parameterization),
            add_watermarker=False,
            **dict.fromkeys(("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")),
        )
        pipeline.set_progress_bar_config(disable=True)
        for (number, prompt), text in zip(share, encoded, strict=True):
            embeddings = {
                "negative_prompt_embeds": text.context[:1],
                "prompt_embeds": text.context[1:],
                "negative_pooled_prompt_embeds": text.pooled[:1],
                "pooled_prompt_embeds": text.pooled[1:],
            }
            seed = random.SystemRandom().getrandbits(63) if prompt.seed is None else prompt.seed
            shot = Shot(number, replace(prompt, seed=seed), 0)
            try:
                picture = draw_picture(pipeline, _KIND, shot, str(device), "float32", embeddings)
            except NonFinite:
                note = "sample %02d is not a picture, but NaN: training diverged, or --mixed_precision fp16 overflows"
                _log.warning(note, number)
                continue
            ending = "" if prompt.seed is None else f"_{prompt.seed}"
            start = _start(options, step, epoch)
            path = Path(f"{start}_{number:02d}_{time.strftime('%Y%m%d%H%M%S')}{ending}.png")
            paths[number] = write_picture(path, picture)
    return paths


@contextmanager
def _moved(modules: Sequence[Any], device: torch.device, dtype: torch.dtype | None = None) -> Iterator[None]:
    """Modules on another device, and in another dtype, for as long as this lasts."""
    before = [(module.device, module.dtype) for module in modules]
    try:
        for module in modules:
            module.to(device, dtype or module.dtype)
        yield
    finally:
        for module, (old_device, old_dtype) in zip(modules, before, strict=True):
            module.to(old_device, old_dtype)


def _start(options: Options, step: int, epoch: int | None) -> Path:
    """What the paths of all pictures of one moment begin with; sd-scripts' form."""
    moment = f"{step:06d}" if epoch is None else f"e{epoch:06d}"
    name = f"{options.output_name}_" if options.output_name else ""
    return Path(options.output_dir or "", "sample", name + moment)


def write_sheet(
    prompts: Sequence[Prompt], drawn: Mapping[int, Path], options: Options, *, step: int, epoch: int | None = None
) -> Path:
    """One page with the pictures that all processes have drawn at this moment; called by one of them."""
    cells = []
    for number, path in sorted(drawn.items()):
        prompt = prompts[number]
        seed = "random seed" if prompt.seed is None else f"seed {prompt.seed}"
        size = f"{prompt.width} × {prompt.height}"
        settings = f"{size}, {seed}, {prompt.sampler}, {prompt.steps} steps, scale {prompt.scale:g}"
        cells.append(Cell(Image.open(path), f"{number:02d}  {prompt.prompt}", settings))
    moment = f"step {step}" if epoch is None else f"epoch {epoch}, step {step}"
    title = f"{options.output_name}, {moment}" if options.output_name else moment
    return write_picture(Path(f"{_start(options, step, epoch)}_sheet.png"), contact_sheet(title, cells))
