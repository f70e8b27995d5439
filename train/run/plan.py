"""What a run trains, how long it is and what it takes. `plan` tells it before anything is loaded."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from lorashrink.errors import InputError
from lorashrink.pictures.pipelines import quiet_libraries
from lorashrink.train.data.batches import batch_count
from lorashrink.train.data.buckets import Size
from lorashrink.train.data.scanning import Data, scan
from lorashrink.train.flags.checks import optimizer_name, parse_resolution
from lorashrink.train.flags.network_args import DEFAULT_DIM, read_network_args
from lorashrink.train.flags.options import Options
from lorashrink.train.model.loading import SETTINGS, Model, weight_dtype
from lorashrink.train.model.network import CONVOLUTIONS, Network, Part, build_network
from lorashrink.train.output.saving import Length, run_length

GIB = 2**30
_CARDS = (8, 12, 16, 24, 32, 40, 48, 80)  # GPU memory that is sold, in GiB
_USABLE = 0.95  # of it; the rest goes to the screen, and to gaps between allocations
_CUDA = GIB  # PyTorch's kernels and the working memory of single operations, about
_RECIPE = "fro_ckpt=1,thr=-3.55"


def describe(options: Options, data: Data, network: Network, length: Length, processes: int) -> str:
    """A few lines for the start of a run: pictures, network, batches and length."""
    parts = [f"  {part.name}: {part.modules} modules, {part.parameters:,} parameters" for part in network.summary]
    return "\n".join(
        [_pictures(data), _size(network.summary, options), *parts, _batch(options, data, processes), _length(length)]
    )


def plan(options: Options) -> str:
    """The same before a run, with a table of the file, and an estimate of GPU memory.

    Weights are not loaded, and neither they nor pictures need to exist: what is missing is taken to be SDXL 1.0, and
    pictures of --resolution.

    Raises:
        UsageError, InputError: see `scan` and `build_network`; settings of the base that cannot be read.
    """
    quiet_libraries()
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    if options.dataset_config or (options.train_data_dir and Path(options.train_data_dir).is_dir()):
        data = scan(options)
        pictures = _pictures(data)
        batch, size = _largest_batch(data)
        length = _length(run_length(options, -(-batch_count(data) // processes)))
    else:
        data = None
        pictures = f"pictures: none in {options.train_data_dir or '--train_data_dir'}"
        batch, size = options.train_batch_size, parse_resolution(options.resolution or "1024")
        duration = (
            _several(options.max_train_steps, "step")
            if options.max_train_epochs is None
            else _several(options.max_train_epochs, "epoch")
        )
        length = f"length: {duration}; without pictures it is not known how many steps an epoch has"
    settings, base = _settings(options)
    model = empty_model(settings, options)
    network = build_network(model, _without_numbers(options))
    memory = step_memory(model, network, options, batch, size)
    total = sum(memory.values())
    return "\n".join(
        [
            base,
            pictures,
            _size(network.summary, options),
            _batch(options, data, processes),
            length,
            "",
            *_file_table(network.summary, options),
            *_advice(options, settings, network.summary),
            "",
            f"GPU memory in GiB for {_several(batch, 'picture')} of {size[0]}×{size[1]}, about:",
            *_table([(name, f"{taken / GIB:.2f}") for name, taken in [*memory.items(), ("in all", total)]]),
            *_fit(total, batch, size, options),
        ]
    )


# --- pictures and length ------------------------------------------------------------------------


def _pictures(data: Data) -> str:
    buckets = len({picture.fit.bucket for picture in data.pictures})
    showings = sum(picture.repeats for picture in data.pictures)
    return (
        f"pictures: {len(data.pictures)} in {_several(len(data.subsets), 'folder')} and {_several(buckets, 'bucket')}, "
        f"{_several(showings, 'showing')} per epoch"
    )


def _largest_batch(data: Data) -> tuple[int, Size]:
    """Pictures and size of the batch with the most pixels."""
    batches = []
    for dataset in data.datasets:
        for bucket in {picture.fit.bucket for picture in dataset.pictures}:
            shown = sum(picture.repeats for picture in dataset.pictures if picture.fit.bucket == bucket)
            batches.append((min(shown, dataset.batch_size), bucket))
    return max(batches, key=lambda batch: batch[0] * math.prod(batch[1]))


def _batch(options: Options, data: Data | None, processes: int) -> str:
    batch = max(dataset.batch_size for dataset in data.datasets) if data else options.train_batch_size
    accumulation = options.gradient_accumulation_steps
    return (
        f"batch: {batch} × {accumulation} accumulated × {_several(processes, 'process', 'processes')}"
        f" = {_several(batch * accumulation * processes, 'picture')} per step"
    )


def _length(length: Length) -> str:
    return (
        f"length: {_several(length.batches_per_epoch, 'batch', 'batches')} or "
        f"{_several(length.steps_per_epoch, 'step')} per epoch, "
        f"{_several(length.epochs, 'epoch')}, {_several(length.steps, 'step')}"
    )


def _several(count: int, singular: str, plural: str = "") -> str:
    return f"{count} {singular if count == 1 else plural or singular + 's'}"


# --- the file -----------------------------------------------------------------------------------


def _megabytes(parameters: int, options: Options) -> str:
    return f"{parameters * (2 if options.save_precision in ('fp16', 'bf16') else 4) / 1e6:.1f}"


def _total(parts: Sequence[Part]) -> Part:
    return Part("in all", sum(part.modules for part in parts), sum(part.parameters for part in parts))


def _size(parts: Sequence[Part], options: Options) -> str:
    total = _total(parts)
    precision = options.save_precision if options.save_precision in ("fp16", "bf16") else "float32"
    return (
        f"network: {total.modules} modules, {total.parameters / 1e6:.1f} million parameters; "
        f"a file has {_megabytes(total.parameters, options)} MB in {precision}"
    )


def _file_table(parts: Sequence[Part], options: Options) -> list[str]:
    total = _total(parts)
    rows = [("what is trained", "modules", "parameters", "MB", "share")]
    for part in (*parts, total):
        size, share = _megabytes(part.parameters, options), f"{part.parameters / total.parameters:.0%}"
        rows.append((part.name, str(part.modules), f"{part.parameters:,}", size, share))
    return _table(rows)


def _advice(options: Options, settings: Path, parts: Sequence[Part]) -> Iterator[str]:
    """A word about convolutions of a higher rank than all else, if they are most of the file."""
    rank, conv_dim = options.network_dim or DEFAULT_DIM, read_network_args(options).values.get("conv_dim")
    convolutions = next((part for part in parts if part.name == CONVOLUTIONS), Part(CONVOLUTIONS, 0, 0))
    share = convolutions.parameters / _total(parts).parameters
    if options.dim_from_weights or conv_dim is None or int(conv_dim) <= rank or share <= 0.5:
        return
    even = replace(_without_numbers(options), network_args=(*options.network_args, f"conv_dim={rank}"))
    smaller = _total(build_network(empty_model(settings, options), even).summary).parameters
    yield (
        f"{share:.0%} of the file are {convolutions.modules} convolutions of rank {conv_dim} (conv_dim), "
        f"while all else has rank {rank} (--network_dim)."
    )
    yield (
        f"With conv_dim={rank} it would have {_megabytes(smaller, options)} MB; "
        f"--shrink {_RECIPE} writes a smaller one after training."
    )


def _table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines with the first column on the left and the others on the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join([first.ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(rest, widths[1:], strict=True))])
        for first, *rest in rows
    ]


# --- the model ----------------------------------------------------------------------------------


def _settings(options: Options) -> tuple[Path, str]:
    """The folder with the settings of the base, and a line about it."""
    name = options.pretrained_model_name_or_path or ""
    if options.model_config:
        return Path(options.model_config), f"base: {name}, with the settings in {options.model_config}"
    if name and Path(name).is_dir():
        return Path(name), f"base: {name}"
    why = "" if name and Path(name).exists() else ", which is not there"
    return SETTINGS, f"base: {name or 'none given'}{why}; planned for SDXL 1.0"


def empty_model(settings: Path, options: Options) -> Model:
    """The model of a folder's settings on the meta device, frozen, in the dtypes of training; without tokenizers.

    Raises:
        InputError: settings are missing or cannot be read.
    """
    # Bases without a VAE go with --vae, and the VAEs of all SDXL models have one size.
    vae_settings = settings if (settings / "vae" / "config.json").is_file() else SETTINGS
    no_tokenizers: Any = (None, None)
    try:
        with torch.device("meta"):
            unet, vae = (
                kind.from_config(kind.load_config(folder, local_files_only=True))
                for kind, folder in ((UNet2DConditionModel, settings / "unet"), (AutoencoderKL, vae_settings / "vae"))
            )
            encoders = (
                CLIPTextModel(CLIPTextConfig.from_pretrained(settings / "text_encoder", local_files_only=True)),
                CLIPTextModelWithProjection(
                    CLIPTextConfig.from_pretrained(settings / "text_encoder_2", local_files_only=True)
                ),
            )
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise InputError(f"{settings}: the settings of the base cannot be read: {error}") from error
    model = Model(unet, vae, encoders, no_tokenizers)
    for module in model.modules:
        module.requires_grad_(False).to(weight_dtype(options))
    if options.no_half_vae:
        vae.float()
    return model


def _without_numbers(options: Options) -> Options:
    """The options without the files that change no sizes: adapters to merge, and numbers to start from."""
    weights = options.network_weights if options.dim_from_weights else None
    return replace(options, base_weights=(), base_weights_multiplier=(), network_weights=weights)


# --- GPU memory ---------------------------------------------------------------------------------

# What a step of SDXL keeps from the forward to the backward pass: GiB per picture of 1024×1024, counted once from the
# tensors that autograd keeps of the guide's command. (half precision, checkpointing) -> GiB.
_ACTIVATIONS = {(True, True): 0.9, (True, False): 8.6, (False, True): 1.4, (False, False): 13.3}
# Bytes per trained parameter that optimizers keep from step to step; Adafactor keeps at most so many.
STATES = {"adamw": 8, "adamw8bit": 2, "lion": 4, "prodigy": 16, "adafactor": 4}
_TWO_FLOATS = 8  # of an optimizer that is not among them


def step_memory(model: Model, network: Network, options: Options, batch: int, size: Size) -> Mapping[str, float]:
    """Bytes that a training step takes on a GPU, by what takes them: counted, but for activations and CUDA's own.

    Samples, and pictures that are encoded before training, take turns with a step and are not in it.

    Args:
        model: on any device.
        batch: pictures.
        size: width and height of the pictures in pixels.
    """
    network.groups(options)  # freezes what has a learning rate of 0
    if options.full_bf16:
        network.to(torch.bfloat16)
    parts: dict[str, float] = {f"UNet, {_dtype(model.unet)}": _bytes([model.unet])}
    if not options.cache_text_encoder_outputs:
        parts[f"text encoders, {_dtype(model.encoders[0])}"] = _bytes(model.encoders)
    if not options.cache_latents:
        parts[f"VAE, {_dtype(model.vae)}"] = _bytes([model.vae])
    trained = [parameter for parameter in network.parameters() if parameter.requires_grad]
    count = sum(parameter.numel() for parameter in trained)
    name = optimizer_name(options)
    return parts | {
        f"adapter, {_dtype(network)}": _bytes([network]),
        "its gradients": sum(parameter.numel() * parameter.element_size() for parameter in trained),
        f"states of {name}": STATES.get(name.lower().rpartition(".")[2], _TWO_FLOATS) * count,
        f"activations, {'with' if options.gradient_checkpointing else 'without'} checkpointing": batch
        * _activations(options, size),
        "CUDA and working memory": _CUDA,
    }


def _activations(options: Options, size: Size) -> float:
    """Bytes of activations per picture."""
    gib = _ACTIVATIONS[options.mixed_precision != "no", options.gradient_checkpointing]
    return gib * GIB * math.prod(size) / 1024**2


def _bytes(modules: Iterable[nn.Module]) -> int:
    return sum(
        tensor.numel() * tensor.element_size()
        for module in modules
        for tensor in (*module.parameters(), *module.buffers())
    )


def _dtype(module: nn.Module) -> str:
    return str(next(module.parameters()).dtype).removeprefix("torch.")


def _fit(total: float, batch: int, size: Size, options: Options) -> Iterator[str]:
    """Which GPU that is enough for, with the chosen setting of checkpointing and with the opposite."""
    opposite = replace(options, gradient_checkpointing=not options.gradient_checkpointing)
    other_total = total + batch * (_activations(opposite, size) - _activations(options, size))
    if card := _card(total):
        yield f"As an estimate, a GPU with {card} GB is enough."
    else:
        yield (
            f"As an estimate, no GPU with up to {_CARDS[-1]} GB is enough; a lower --train_batch_size takes less, and "
            "--gradient_accumulation_steps can make up for it."
        )
    flag = "Without" if options.gradient_checkpointing else "With"
    enough = f"a GPU with {card} GB" if (card := _card(other_total)) else f"more than {_CARDS[-1]} GB"
    yield f"{flag} --gradient_checkpointing it would be about {other_total / GIB:.1f} GiB, for {enough}."
    yield "Not counted: drawing samples, and encoding pictures without --cache_latents, which take turns with a step."


def _card(size: float) -> int | None:
    """The smallest usual GPU for so many bytes, in GB as it is sold."""
    return next((card for card in _CARDS if size <= _USABLE * card * GIB), None)
