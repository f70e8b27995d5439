"""What a run would train, how long it would be and what memory it would take, said before anything is loaded."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from lorashrink.errors import InputError
from lorashrink.train import saving
from lorashrink.train.buckets import Size
from lorashrink.train.checks import parse_resolution
from lorashrink.train.data import Data, batch_count, scan
from lorashrink.train.memory import GIB, count_activations, optimizer_bytes, tensor_bytes
from lorashrink.train.model import SETTINGS, Model, quiet_libraries, weight_dtype
from lorashrink.train.network import CONVOLUTIONS, Network, Part, build_network
from lorashrink.train.network_args import read_network_args
from lorashrink.train.options import Options
from lorashrink.train.saving import Length

_GPUS = (8, 12, 16, 24, 32, 40, 48, 80)  # GB of memory that GPUs are sold with
# What CUDA, the libraries and the gaps between tensors take: a guess that users' reports bear out.
_OVERHEAD = 1.5 * GIB
_BYTES = {"float": 4, "fp16": 2, "bf16": 2, None: 4}


def describe(options: Options, data: Data, network: Network, length: Length, processes: int) -> str:
    """What a run is about to do, in a few lines."""
    return "\n".join((_pictures(data), _trained(network.summary, options), _duration(options, length, processes)))


def _pictures(data: Data) -> str:
    pictures = [picture for dataset in data.datasets for picture in dataset.pictures]
    buckets = {picture.fit.bucket for picture in pictures}
    showings = sum(picture.repeats for picture in pictures)
    return (
        f"pictures: {_count(len(pictures), 'picture')} in {_count(len(data.subsets), 'folder')}, "
        f"{_count(len(buckets), 'bucket')}, {_count(showings, 'showing')} per epoch"
    )


def _count(number: int, what: str) -> str:
    return f"{number} {what}" + ("" if number == 1 else "s")


def _trained(parts: Sequence[Part], options: Options) -> str:
    modules, parameters = sum(part.modules for part in parts), sum(part.parameters for part in parts)
    return (
        f"trained: {modules} modules, {parameters / 1e6:.1f} M parameters; "
        f"the file will have {_file_bytes(parts, options) / 1e6:.1f} MB"
    )


def _file_bytes(parts: Sequence[Part], options: Options) -> int:
    return sum(part.parameters for part in parts) * _BYTES[options.save_precision]


def _duration(options: Options, length: Length, processes: int) -> str:
    batch, accumulation = options.train_batch_size, length.accumulation
    return (
        f"steps: {length.steps}, in {_count(length.epochs, 'epoch')} of {_count(length.steps_per_epoch, 'step')}; "
        f"a step sees up to {batch * accumulation * processes} pictures "
        f"(batch {batch} × {accumulation} accumulated × {processes} {'process' if processes == 1 else 'processes'})"
    )


# --- before anything is loaded --------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Memory:
    """An estimate of what lies in a GPU's memory at the worst moment of a step, in bytes."""

    frozen: dict[str, int]  # part of the base -> its weights
    adapter: int
    gradients: int
    optimizer: int | None  # None: not known for this optimizer
    activations: int
    activations_kept: int  # without checkpointing
    activations_again: int  # with it

    @property
    def total(self) -> int:
        """All of it, with what CUDA takes for itself."""
        parts = (*self.frozen.values(), self.adapter, self.gradients, self.optimizer or 0, self.activations)
        return sum(parts) + int(_OVERHEAD)


def plan(options: Options) -> str:
    """What `--plan` prints. No weights are loaded; pictures are looked at where there are any.

    Raises:
        UsageError: options that cannot be carried out.
        InputError: settings or pictures that cannot be read.
    """
    quiet_libraries()
    settings, about = _settings(options)
    model = meta_model(settings, options)
    network = build_network(model, options)
    network.groups(options)
    data = scan(options) if _has_pictures(options) else None
    size = _largest(data, options)
    text = [
        about,
        *([_pictures(data)] if data else []),
        _trained(network.summary, options),
        "",
        _parts(network, options),
    ]
    if hint := _out_of_proportion(network.summary, options):
        text.append(hint)
    text.append("")
    if data:
        text.append(_duration(options, saving.run_length(options, batch_count(data)), 1))
    else:
        text.append("steps per epoch: not known without pictures (--train_data_dir)")
    return "\n".join([*text, "", _memory_table(estimate(model, network, options, size), options, size)])


def _settings(options: Options) -> tuple[Path, str]:
    """The folder whose settings describe the base, and a line about it."""
    for name in (options.pretrained_model_name_or_path, options.model_config):
        if name and (Path(name) / "unet" / "config.json").is_file():
            return Path(name), f"base: as {name} says"
    return SETTINGS, "base: SDXL 1.0"


def meta_model(settings: Path, options: Options) -> Model:
    """A model with these settings on the meta device: shapes and dtypes without numbers, and no tokenizers.

    Raises:
        InputError: the settings cannot be read.
    """
    try:
        with torch.device("meta"):
            unet = UNet2DConditionModel.from_config(UNet2DConditionModel.load_config(settings / "unet"))
            vae = AutoencoderKL.from_config(AutoencoderKL.load_config(settings / "vae"))
            encoders = tuple(
                kind(CLIPTextConfig.from_pretrained(settings / folder, local_files_only=True))
                for kind, folder in ((CLIPTextModel, "text_encoder"), (CLIPTextModelWithProjection, "text_encoder_2"))
            )
    except (OSError, ValueError, TypeError) as error:
        raise InputError(f"{settings}: its settings cannot be read ({str(error).splitlines()[0]})") from error
    model = Model(unet, vae, cast(Any, encoders), cast(Any, None))
    for module in model.modules:
        module.requires_grad_(False).to(weight_dtype(options))
    if options.no_half_vae:
        vae.float()
    return model


def _has_pictures(options: Options) -> bool:
    return bool(options.dataset_config) or bool(options.train_data_dir and Path(options.train_data_dir).is_dir())


def _largest(data: Data | None, options: Options) -> Size:
    """The bucket that takes the most memory; without pictures the resolution."""
    if data is None:
        return parse_resolution(options.resolution or "1024")
    buckets = {picture.fit.bucket for dataset in data.datasets for picture in dataset.pictures}
    return max(buckets, key=math.prod)


def _parts(network: Network, options: Options) -> str:
    parts, width = network.summary, _BYTES[options.save_precision]
    total = sum(part.parameters for part in parts)
    rows = [
        (part.name, str(part.modules), f"{part.parameters / 1e6:.2f}", f"{part.parameters * width / 1e6:.1f}",
         f"{100 * part.parameters / total:.0f} %")
        for part in parts
    ]  # fmt: skip
    return _table(("part", "modules", "M parameters", "MB in the file", "share"), rows)


def _out_of_proportion(parts: Sequence[Part], options: Options) -> str | None:
    """What to say when convolutions fill the file because their rank is far above that of the other layers."""
    total = sum(part.parameters for part in parts)
    wide = sum(part.parameters for part in parts if part.name == CONVOLUTIONS)
    values, dim = read_network_args(options).values, options.network_dim or 4
    conv_dim = int(values.get("conv_dim") or dim)
    if conv_dim <= dim or wide <= total / 2:
        return None
    smaller = (total - wide + wide * dim / conv_dim) * _BYTES[options.save_precision] / 1e6
    return (
        f"{100 * wide / total:.0f} % of the file are convolutions, because conv_dim is {conv_dim} and network_dim "
        f"{dim}.\nconv_dim={dim} would make it {smaller:.1f} MB; `lorashrink resize` finds out what each layer needs."
    )


def estimate(model: Model, network: Network, options: Options, size: Size) -> Memory:
    """Memory on the GPU for pictures of this size in pixels; `network` is applied to `model`, which may be on meta."""
    trained = sum(each.numel() for each in network.parameters() if each.requires_grad)
    per_number = 2 if options.full_bf16 else 4
    states = optimizer_bytes(options)
    counted = count_activations(model, network, options, 1, size)
    batch = options.train_batch_size
    own = {id(each) for each in network.parameters()}
    frozen = {"UNet": tensor_bytes(each for each in model.unet.parameters() if id(each) not in own)}
    if not options.cache_text_encoder_outputs:
        frozen["text encoders"] = sum(
            tensor_bytes(each for each in encoder.parameters() if id(each) not in own) for encoder in model.encoders
        )
    if not options.cache_latents:
        frozen["VAE"] = tensor_bytes(model.vae.parameters())
    return Memory(
        frozen=frozen,
        adapter=sum(each.numel() for each in network.parameters()) * per_number,
        gradients=trained * per_number,
        optimizer=None if states is None else trained * states,
        activations=(counted.checkpointed if options.gradient_checkpointing else counted.full) * batch,
        activations_kept=counted.full * batch,
        activations_again=counted.checkpointed * batch,
    )


def _memory_table(memory: Memory, options: Options, size: Size) -> str:
    states = "not known" if memory.optimizer is None else f"{memory.optimizer / GIB:.1f}"
    rows = [
        *((f"{name}, frozen", f"{each / GIB:.1f}") for name, each in memory.frozen.items()),
        ("adapter", f"{memory.adapter / GIB:.1f}"),
        ("gradients", f"{memory.gradients / GIB:.1f}"),
        ("optimizer", states),
        (f"activations, batch {options.train_batch_size}", f"{memory.activations / GIB:.1f}"),
        ("CUDA and gaps, a guess", f"{_OVERHEAD / GIB:.1f}"),
        ("together", f"{memory.total / GIB:.1f}"),
    ]
    fits = next((gpu for gpu in _GPUS if memory.total < gpu * 1e9), None)
    verdict = f"should fit a GPU with {fits} GB" if fits else f"does not fit a GPU with {_GPUS[-1]} GB"
    other = (
        f"without --gradient_checkpointing activations would take {memory.activations_kept / GIB:.1f} GiB"
        if options.gradient_checkpointing
        else f"with --gradient_checkpointing activations would take {memory.activations_again / GIB:.1f} GiB"
    )
    return "\n".join(
        (
            f"memory of the GPU for pictures of {size[0]}x{size[1]}, estimated from shapes:",
            _table(("part", "GiB"), rows),
            f"This {verdict}; {other}.",
        )
    )


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    widths = [max(len(row[column]) for row in (head, *rows)) for column in range(len(head))]
    return "\n".join(
        "  "
        + "  ".join(
            cell.ljust(width) if column == 0 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in (head, *rows)
    )
