"""Pictures drawn while training."""

from __future__ import annotations

import contextlib
import glob
import io
import logging
import math
import re
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from diffusers.image_processor import VaeImageProcessor
from PIL import Image
from torch import Tensor
from transformers import CLIPTokenizer

from lorashrink.files.disk import write_bytes
from lorashrink.pictures.prompts import Prompt
from lorashrink.pictures.samplers import scheduler
from lorashrink.plots.sheet import Cell, contact_sheet
from lorashrink.train.flags.options import Options
from lorashrink.train.model.loading import LATENT_SCALE, Model, vae_stride, weight_dtype
from lorashrink.train.model.text import CHUNK, Encoded, encode, token_count, tokenize

_log = logging.getLogger(__name__)


# (a cat:1.2) is a weight in other programs.
_WEIGHT = re.compile(r"\([^()]+:\s*\d*\.?\d+\s*\)")


def check_prompts(prompts: Sequence[Prompt], tokenizer: CLIPTokenizer, world: int, options: Options) -> list[str]:
    """Warnings: prompts longer than what the encoders read, token weights, a number that leaves GPUs waiting.

    world: the number of processes that draw.
    """
    limit = options.max_token_length or CHUNK
    warnings = []
    for number, prompt in enumerate(prompts):
        for name, text in (("prompt", prompt.prompt), ("negative prompt", prompt.negative)):
            count = token_count(tokenizer, text)
            if count > limit:
                warnings.append(
                    f"sample {number:02d}: the {name} has {count} tokens, {count + 2} with its start and end; what is "
                    f"beyond {limit} ({limit + 2}) is cut off. Shorten it, or raise --max_token_length (up to 225)."
                )
            if weight := _WEIGHT.search(text):
                warnings.append(
                    f"sample {number:02d}: the {name} has a weight, {weight[0]}, which is read as plain text."
                )
    if len(prompts) % world:
        warnings.append(
            f"{len(prompts)} sample prompts do not divide evenly among {world} processes, so some wait for others; "
            f"{math.ceil(len(prompts) / world) * world} would."
        )
    return warnings


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


# --- pictures ---


@torch.no_grad()
def draw(
    model: Model,
    prompts: Sequence[Prompt],
    options: Options,
    folder: Path,
    *,
    step: int,
    epoch: int | None = None,
    rank: int,
    world: int,
    device: torch.device,
) -> list[Path]:
    """Draw this process's share of the prompts and write it below folder/sample; the paths of the pictures.

    The UNet is on `device` and the network in eval mode. Encoders and VAE may be elsewhere and go back there; the VAE
    works in float32, because SDXL's overflows in half precision. The state of the global random numbers stays.

    Raises OutputError if a picture cannot be written.
    """
    share = list(enumerate(prompts))[rank::world]
    pipeline = _pipeline(model.unet)
    autocast = torch.autocast(device.type, weight_dtype(options), enabled=options.mixed_precision != "no")
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        with autocast, _moved(model.encoders, device):
            texts = [_encoded(model, prompt, options, device) for _, prompt in share]
        with autocast:
            stride = vae_stride(model.vae)
            latents = [
                _latents(pipeline, prompt, text, options, stride)
                for (_, prompt), text in zip(share, texts, strict=True)
            ]
        with _moved([model.vae], device, torch.float32):
            pictures = [_decoded(model.vae, latent, number) for (number, _), latent in zip(share, latents, strict=True)]
    paths = []
    for (number, prompt), picture in zip(share, pictures, strict=True):
        seed = "" if prompt.seed is None else f"_{prompt.seed}"
        name = f"{_moment(options, step, epoch)}_{number:02d}_{time.strftime('%Y%m%d%H%M%S')}{seed}.png"
        paths.append(_write_png(folder / "sample" / name, picture))
    return paths


@contextlib.contextmanager
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


def _encoded(model: Model, prompt: Prompt, options: Options, device: torch.device) -> Encoded:
    """The negative prompt and the prompt, b = 2. As in sd-scripts an empty one is encoded, not replaced by zeros."""
    tokens1, tokens2 = (
        tokenize(tokenizer, [prompt.negative, prompt.prompt], options.max_token_length)
        for tokenizer in model.tokenizers
    )
    return encode(model.encoders, tokens1, tokens2).to(device, weight_dtype(options))


def _latents(pipeline: Any, prompt: Prompt, text: Encoded, options: Options, stride: int) -> Tensor:
    """[1, 4, height / stride, width / stride] float32; scaled."""
    generator = torch.Generator()
    if prompt.seed is None:
        generator.seed()
    else:
        generator.manual_seed(prompt.seed)
    # Float32 on the CPU gives the same noise on every machine and in every precision.
    noise = torch.randn(1, 4, prompt.height // stride, prompt.width // stride, generator=generator)
    pipeline.scheduler = scheduler(prompt.sampler, v_parameterization=options.v_parameterization)
    (latents,) = pipeline(
        negative_prompt_embeds=text.context[:1],
        prompt_embeds=text.context[1:],
        negative_pooled_prompt_embeds=text.pooled[:1],
        pooled_prompt_embeds=text.pooled[1:],
        latents=noise,
        generator=generator,
        width=prompt.width,
        height=prompt.height,
        num_inference_steps=prompt.steps,
        guidance_scale=prompt.scale,
        output_type="latent",
        return_dict=False,
    )
    return cast(Tensor, latents).float()


def _pipeline(unet: Any) -> Any:
    """diffusers' loop around this UNet itself; text comes encoded, and latents leave as they are."""
    # Its import says things that `quiet_libraries` must come before.
    from diffusers import StableDiffusionXLPipeline

    pipeline: Any = StableDiffusionXLPipeline(
        unet=unet,
        scheduler=None,
        vae=None,
        text_encoder=None,
        text_encoder_2=None,
        tokenizer=None,
        tokenizer_2=None,
        add_watermarker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def _decoded(vae: Any, latents: Tensor, number: int) -> Image.Image:
    (pixels,) = vae.decode(latents / LATENT_SCALE, return_dict=False)
    if not pixels.isfinite().all():
        _log.warning(
            "sample %02d is not a picture: it has NaN. Training has diverged, or --mixed_precision fp16 overflows",
            number,
        )
    return cast(Image.Image, VaeImageProcessor().postprocess(pixels.nan_to_num(), output_type="pil")[0])


def _write_png(path: Path, picture: Image.Image) -> Path:
    data = io.BytesIO()
    picture.save(data, "png")
    write_bytes(path, data.getvalue())
    return path


def _moment(options: Options, step: int, epoch: int | None) -> str:
    """What the names of all pictures of one moment begin with; sd-scripts' form."""
    name = f"{options.output_name}_" if options.output_name else ""
    return f"{name}{step:06d}" if epoch is None else f"{name}e{epoch:06d}"


def write_sheet(
    prompts: Sequence[Prompt], options: Options, folder: Path, *, step: int, epoch: int | None = None
) -> Path:
    """One page with the pictures that all processes have drawn at this moment; called by one of them, after all drew.

    Raises OutputError if it cannot be written.
    """
    start = _moment(options, step, epoch)
    cells = []
    for number, prompt in enumerate(prompts):
        drawn = (folder / "sample").glob(f"{glob.escape(f'{start}_{number:02d}')}_*.png")
        # An earlier run may have left others; names begin with the time, so they sort.
        if path := max(drawn, key=lambda path: path.name, default=None):
            seed = "random seed" if prompt.seed is None else f"seed {prompt.seed}"
            size = f"{prompt.width} × {prompt.height}"
            settings = f"{size}, {seed}, {prompt.sampler}, {prompt.steps} steps, scale {prompt.scale:g}"
            cells.append(Cell(Image.open(path), f"{number:02d}  {prompt.prompt}", settings))
    moment = f"step {step}" if epoch is None else f"epoch {epoch}, step {step}"
    title = f"{options.output_name}, {moment}" if options.output_name else moment
    return _write_png(folder / "sample" / f"{start}_sheet.png", contact_sheet(title, cells))
