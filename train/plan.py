"""What a run trains, how long it is and what it takes. `plan` says so before anything is loaded."""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from lorashrink.errors import InputError
from lorashrink.pictures.pipelines import quiet_libraries
from lorashrink.train.checks import parse_resolution
from lorashrink.train.data.batches import batch_count
from lorashrink.train.data.buckets import Size
from lorashrink.train.data.scanning import Data, Dataset, scan
from lorashrink.train.memory import GIB, Activations, count_activations, optimizer_bytes, tensor_bytes
from lorashrink.train.model.loading import SETTINGS, Model, weight_dtype
from lorashrink.train.model.network import CONVOLUTIONS, Network, Part, build_network
from lorashrink.train.network_args import DEFAULT_DIM, read_network_args
from lorashrink.train.options import Options
from lorashrink.train.output.saving import Length, run_length
from lorashrink.train.run.optimizers import optimizer_name

_CARDS = (8, 12, 16, 24, 32, 40, 48, 80)  # GPU memory that is sold, in GiB
_USABLE = 0.95  # of it; the rest goes to the screen, and to gaps between allocations
_CUDA = GIB  # PyTorch's kernels and the working memory of single operations, about
_RECIPE = "fro_ckpt=1,thr=-3.55"


def describe(options: Options, data: Data, network: Network, length: Length, processes: int) -> str:
    """A few lines for the start of a run: pictures, network, batches and length."""
    parts = [f"  {each.name}: {each.modules} modules, {each.parameters:,} parameters" for each in network.summary]
    return "\n".join(
        [_pictures(data), _size(network.summary, options), *parts, _batch(options, data, processes), _length(length)]
    )


def plan(options: Options) -> str:
    """The same before a run, with a table of the file, and an estimate of GPU memory.

    No weights are loaded, and neither they nor pictures need to be there. What is not there is taken to be SDXL 1.0,
    and pictures of --resolution.

    Raises:
        UsageError, InputError: see `scan` and `build_network`; settings of the base that cannot be read.
    """
    quiet_libraries()
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    has_pictures = options.dataset_config or (options.train_data_dir and Path(options.train_data_dir).is_dir())
    data = scan(options) if has_pictures else None
    if data:
        batch, size = _largest_batch(data)
        length = _length(run_length(options, -(-batch_count(data) // processes)))
    else:
        batch, size = options.train_batch_size, parse_resolution(options.resolution or "1024")
        length = f"length: {_steps(options)}; without pictures it is not known how many steps an epoch has"
    settings, base = _settings(options)
    network, memory = _take(options, settings, batch, size)
    return "\n".join(
        [
            base,
            _pictures(data) if data else f"pictures: none in {options.train_data_dir or '--train_data_dir'}",
            _size(network.summary, options),
            _batch(options, data, processes),
            length,
            "",
            *_file_table(network.summary, options),
            *_advice(options, settings, network.summary),
            "",
            f"GPU memory in GiB for {_several(batch, 'picture')} of {size[0]}×{size[1]}, estimated:",
            *_memory_table(memory, options),
            *_fit(memory, options),
        ]
    )


# --- pictures and length ------------------------------------------------------------------------


def _showings(dataset: Dataset) -> Counter[Size]:
    """How many pictures each bucket shows in an epoch."""
    counts: Counter[Size] = Counter()
    for picture in dataset.pictures:
        counts[picture.fit.bucket] += picture.repeats
    return counts


def _pictures(data: Data) -> str:
    pictures = [picture for dataset in data.datasets for picture in dataset.pictures]
    buckets = {picture.fit.bucket for picture in pictures}
    return (
        f"pictures: {len(pictures)} in {_several(len(data.subsets), 'folder')} and {_several(len(buckets), 'bucket')}, "
        f"{_several(sum(each.repeats for each in pictures), 'showing')} per epoch"
    )


def _largest_batch(data: Data) -> tuple[int, Size]:
    """Pictures and size of the batch with the most pixels."""
    batches = [
        (min(count, dataset.batch_size), size)
        for dataset in data.datasets
        for size, count in _showings(dataset).items()
    ]
    return max(batches, key=lambda each: each[0] * math.prod(each[1]))


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


def _steps(options: Options) -> str:
    if options.max_train_epochs is not None:
        return _several(options.max_train_epochs, "epoch")
    return _several(options.max_train_steps, "step")


def _several(count: int, one: str, more: str = "") -> str:
    return f"{count} {one if count == 1 else more or one + 's'}"


# --- the file -----------------------------------------------------------------------------------


def _precision(options: Options) -> tuple[str, int]:
    """The number format of the file and its bytes per number."""
    half = options.save_precision in ("fp16", "bf16")
    return (options.save_precision or "", 2) if half else ("float32", 4)


def _total(parts: Sequence[Part]) -> int:
    return sum(each.parameters for each in parts)


def _megabytes(parameters: int, options: Options) -> str:
    return f"{parameters * _precision(options)[1] / 1e6:.1f}"


def _size(parts: Sequence[Part], options: Options) -> str:
    return (
        f"network: {sum(each.modules for each in parts)} modules, {_total(parts) / 1e6:.1f} million parameters; "
        f"a file has {_megabytes(_total(parts), options)} MB in {_precision(options)[0]}"
    )


def _file_table(parts: Sequence[Part], options: Options) -> list[str]:
    everything = Part("in all", sum(each.modules for each in parts), _total(parts))
    rows = [
        (
            each.name,
            str(each.modules),
            f"{each.parameters:,}",
            _megabytes(each.parameters, options),
            f"{each.parameters / everything.parameters:.0%}",
        )
        for each in (*parts, everything)
    ]
    return _table([("what is trained", "modules", "parameters", "MB", "share"), *rows])


def _advice(options: Options, settings: Path, parts: Sequence[Part]) -> Iterator[str]:
    """A word about convolutions of a higher rank than all else, if they are most of the file."""
    rank, given = options.network_dim or DEFAULT_DIM, read_network_args(options).values.get("conv_dim")
    wide = sum(each.parameters for each in parts if each.name == CONVOLUTIONS)
    if options.dim_from_weights or given is None or int(given) <= rank or 2 * wide <= _total(parts):
        return
    count = sum(each.modules for each in parts if each.name == CONVOLUTIONS)
    even = replace(_without_numbers(options), network_args=(*options.network_args, f"conv_dim={rank}"))
    smaller = build_network(empty_model(settings, options), even).summary
    yield (
        f"{wide / _total(parts):.0%} of the file are {count} convolutions of rank {given} (conv_dim), "
        f"while all else has rank {rank} (--network_dim)."
    )
    yield (
        f"With conv_dim={rank} it would have {_megabytes(_total(smaller), options)} MB; "
        f"--shrink {_RECIPE} writes a smaller one after training."
    )


def _table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines with the first column on the left and the others on the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join([first.ljust(widths[0]), *(each.rjust(width) for each, width in zip(rest, widths[1:], strict=True))])
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
    try:
        with torch.device("meta"):
            model = Model(
                unet=_of_diffusers(UNet2DConditionModel, settings / "unet"),
                vae=_of_diffusers(AutoencoderKL, _first(settings / "vae", SETTINGS / "vae")),
                encoders=(
                    CLIPTextModel(CLIPTextConfig.from_pretrained(settings / "text_encoder", local_files_only=True)),
                    CLIPTextModelWithProjection(
                        CLIPTextConfig.from_pretrained(settings / "text_encoder_2", local_files_only=True)
                    ),
                ),
                tokenizers=_NO_TOKENIZERS,
            )
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise InputError(f"{settings}: the settings of the base cannot be read: {error}") from error
    for module in model.modules:
        module.requires_grad_(False).to(weight_dtype(options))
    if options.no_half_vae:
        model.vae.float()
    return model


_NO_TOKENIZERS: Any = (None, None)


def _of_diffusers(kind: Any, folder: Path) -> Any:
    return kind.from_config(kind.load_config(folder, local_files_only=True))


def _first(*folders: Path) -> Path:
    """The first that has settings: bases without a VAE go with --vae, and all of SDXL's have one size."""
    return next((each for each in folders if (each / "config.json").is_file()), folders[0])


# --- GPU memory ---------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Memory:
    """What a step takes on the GPU, in bytes by part, and the activations, of which it is one or the other number."""

    lasting: tuple[tuple[str, int], ...]
    activations: Activations

    def activation_bytes(self, checkpointing: bool) -> int:
        return self.activations.checkpointed if checkpointing else self.activations.full

    def total(self, checkpointing: bool) -> int:
        return sum(size for _, size in self.lasting) + self.activation_bytes(checkpointing)


def _take(options: Options, settings: Path, batch: int, size: Size) -> tuple[Network, _Memory]:
    """The network that would be trained, and the memory for it."""
    model = empty_model(settings, options)
    network = build_network(model, _without_numbers(options))
    network.groups(options)
    if options.full_bf16:
        network.module.to(torch.bfloat16)
    lasting = _lasting(model, network, options)
    return network, _Memory(tuple(lasting), count_activations(model, network, options, batch, size))


def _without_numbers(options: Options) -> Options:
    """The options without the files that change no sizes: adapters to merge, and numbers to start from."""
    weights = options.network_weights if options.dim_from_weights else None
    return replace(options, base_weights=(), base_weights_multiplier=(), network_weights=weights)


def _lasting(model: Model, network: Network, options: Options) -> Iterator[tuple[str, int]]:
    """What lies on the GPU all the time."""
    yield f"UNet, {_kind(model.unet)}", _bytes(model.unet)
    if not options.cache_text_encoder_outputs:
        yield f"text encoders, {_kind(model.encoders[0])}", sum(map(_bytes, model.encoders))
    if not options.cache_latents:
        yield f"VAE, {_kind(model.vae)}", _bytes(model.vae)
    trained = [each for each in network.parameters() if each.requires_grad]
    yield f"adapter, {_kind(network.module)}", _bytes(network.module)
    yield "its gradients", sum(each.numel() * each.element_size() for each in trained)
    known = optimizer_bytes(options)
    states = f"states of {optimizer_name(options)}" + (", taken for two float32" if known is None else "")
    yield states, (_TWO_FLOATS if known is None else known) * sum(each.numel() for each in trained)
    yield "CUDA and working memory, about", _CUDA


_TWO_FLOATS = 8


def _bytes(module: nn.Module) -> int:
    return tensor_bytes([*module.parameters(), *module.buffers()])


def _kind(module: nn.Module) -> str:
    return str(next(module.parameters()).dtype).removeprefix("torch.")


def _memory_table(memory: _Memory, options: Options) -> list[str]:
    with_it = options.gradient_checkpointing
    activations = f"activations, {'with' if with_it else 'without'} checkpointing"
    total = memory.total(with_it)
    rows = [*memory.lasting, (activations, memory.activation_bytes(with_it)), ("in all", total)]
    return _table([(name, f"{size / GIB:.2f}") for name, size in rows])


def _fit(memory: _Memory, options: Options) -> Iterator[str]:
    """Which GPUs that is enough for, with the chosen setting of checkpointing and with the other."""
    chosen, other = memory.total(options.gradient_checkpointing), memory.total(not options.gradient_checkpointing)
    card = _card(chosen)
    if card:
        yield f"As an estimate, a GPU with {card} GB is enough."
    else:
        yield (
            f"As an estimate, no GPU with up to {_CARDS[-1]} GB is enough; a lower --train_batch_size takes less, and "
            "--gradient_accumulation_steps can make up for it."
        )
    flag = "Without" if options.gradient_checkpointing else "With"
    enough = f"a GPU with {_card(other)} GB" if _card(other) else f"more than {_CARDS[-1]} GB"
    yield f"{flag} --gradient_checkpointing it would be {other / GIB:.1f} GiB, for {enough}."
    yield "Not counted: drawing samples, and encoding pictures without --cache_latents, which take turns with a step."


def _card(size: int) -> int | None:
    """The smallest usual GPU for so many bytes, in GB as it is sold."""
    return next((each for each in _CARDS if size <= _USABLE * each * GIB), None)
