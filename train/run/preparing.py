"""Everything before the first step: a run is prepared, or only planned, which loads nothing."""

from __future__ import annotations

import dataclasses
import logging
import math
import os
import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import (
    DistributedDataParallelKwargs,
    ProjectConfiguration,
    broadcast_object_list,
    compute_module_sizes,
    gather_object,
    set_seed,
)
from accelerate.utils.memory import clear_device_cache
from diffusers import AutoencoderKL, ModelMixin
from torch import nn
from transformers import CLIPTokenizer

from lorashrink.errors import InputError, LorashrinkError, UsageError
from lorashrink.pictures.pipelines import quiet_libraries
from lorashrink.pictures.prompts import Prompt, read_prompts
from lorashrink.pictures.samplers import check_samplers
from lorashrink.text import count_text, size_text
from lorashrink.train.data.batches import Loader, batch_count
from lorashrink.train.data.buckets import Size
from lorashrink.train.data.caches import LatentCache, cache_latents, cache_texts
from lorashrink.train.data.scanning import Data, check_pixels, scan
from lorashrink.train.flags.checks import optimizer_name, parse_resolution
from lorashrink.train.flags.options import Options
from lorashrink.train.model import loading
from lorashrink.train.model.loading import CHUNK, SETTINGS, Encoded, Model, weight_dtype
from lorashrink.train.model.network import Network, build_network
from lorashrink.train.output import samples, saving
from lorashrink.train.output.metadata import run_entries
from lorashrink.train.output.saving import Length, Position, run_length
from lorashrink.train.run.loop import Session
from lorashrink.train.run.objective import BatchLoss
from lorashrink.train.run.optimizers import make_optimizer, make_scheduler

_log = logging.getLogger(__name__)


def prepare(options: Options) -> Session:
    """Load, check and cache everything that the run needs; each step raises its own errors."""
    quiet_libraries()
    prompt_file = options.sample_prompts
    prompts = read_prompts(Path(prompt_file), sampler=options.sample_sampler) if prompt_file else ()
    check_samplers(prompts)
    accelerator = _accelerator(options)
    processes, chosen_seed = accelerator.num_processes, options.seed
    resumed = saving.peek_state(Path(options.resume))[0] if options.resume else None
    drawn = random.SystemRandom().getrandbits(32) if chosen_seed is None else chosen_seed
    [seed] = broadcast_object_list([resumed.seed if resumed else drawn])  # that of the main process
    options = replace(options, seed=seed)
    data = scan(options)
    length = run_length(options, -(-batch_count(data) // processes))
    if resumed and resumed.step >= length.steps:
        end = f"it stands at step {resumed.step}, and training ends at step {length.steps}"
        raise UsageError(f"--resume {options.resume}: {end}; raise --max_train_steps or --max_train_epochs")
    model = loading.load_model(options, accelerator.device)
    for warning in _warnings(options, data, length, prompts, model.tokenizers[0], processes):
        _log.warning(warning)
    network = build_network(model, options).to(accelerator.device)
    if options.full_bf16:
        network.to(torch.bfloat16)
    groups, rates = network.groups(options)
    optimizer, description = make_optimizer(options, groups)
    scheduler = make_scheduler(options, optimizer, length.steps * processes)
    trains_text = any("textencoder" in rate for rate in rates)
    batch_loss = BatchLoss(options, data, model, network, seed=seed, trains_text=trains_text)
    batch_loss, optimizer, scheduler = accelerator.prepare(batch_loss, optimizer, scheduler)
    # What takes long comes when nothing is left that could be wrong with the options.
    loader = _load_data(options, data, model, accelerator, seed)
    loading.set_checkpointing(model, options)
    batch_loss.train()
    fingerprint = saving.fingerprint(options, data, processes)
    if options.resume:
        state = Path(options.resume)
        position = saving.load_state(state, accelerator, network.load_raw, fingerprint, chosen_seed)
    else:
        position = Position(epoch=1, batch=0, step=0, seed=seed)
        # From here on only what LyCORIS drops is drawn from global random numbers, and each process drops its own.
        set_seed(seed, device_specific=True)
    dims, writes = network.dims if options.dim_from_weights else None, accelerator.is_main_process
    # The process that writes the files also hashes the base for them, which takes long.
    metadata = run_entries(options, data, length, processes, optimizer=description, dims=dims) if writes else {}
    _log.info("%s", describe(options, data, network, length, processes))
    _start_log(accelerator, options)
    return Session(
        options=options,
        accelerator=accelerator,
        model=model,
        network=network,
        batch_loss=batch_loss,
        optimizer=optimizer,
        scheduler=scheduler,
        loader=loader,
        rates=rates,
        length=length,
        position=position,
        fingerprint=fingerprint,
        metadata=metadata,
        prompts=prompts,
    )


def _accelerator(options: Options) -> Accelerator:
    folder = None
    if options.logging_dir:
        folder = os.path.join(options.logging_dir, f"{options.log_prefix or ''}{datetime.now():%Y%m%d%H%M%S}")
    accelerator = Accelerator(
        mixed_precision=options.mixed_precision,
        gradient_accumulation_steps=options.gradient_accumulation_steps,
        log_with=options.log_with or ("tensorboard" if folder else None),
        project_config=ProjectConfiguration(folder, logging_dir=folder),
        # Not every layer has gradients in every step: some are never reached, some are dropped.
        kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True, broadcast_buffers=False)],
    )
    # LyCORIS' state is not what training goes on from: `Network.raw_state` is, which `saving` takes care of.
    accelerator.register_save_state_pre_hook(lambda _models, weights, _folder: weights.clear())
    accelerator.register_load_state_pre_hook(lambda models, _folder: models.clear())
    started = int(os.environ.get("WORLD_SIZE", "1"))
    if started != accelerator.num_processes:
        # Each would train alone, and all would write the same files.
        hint = "leave out --multi_gpu and --gpu_ids, or install the torch that fits your GPUs"
        raise UsageError(f"{started} processes were started for GPUs that torch does not find; {hint}")
    return accelerator


def _warnings(
    options: Options, data: Data, length: Length, prompts: Sequence[Prompt], tokenizer: CLIPTokenizer, processes: int
) -> Iterator[str]:
    """What the user should know before training starts: what cannot happen, and texts that are cut off."""
    yield from saving.never(options, length)
    yield from samples.check_prompts(prompts, tokenizer, processes, options)
    limit = options.max_token_length or CHUNK
    captions = [picture.caption for picture in data.pictures]
    if long := sum(loading.token_count(tokenizer, caption) > limit for caption in captions):
        counts = f"{long} of {len(captions)} captions have more than {limit} tokens"
        yield f"{counts}, the rest is not read (--max_token_length)"


def _load_data(options: Options, data: Data, model: Model, accelerator: Accelerator, seed: int) -> Loader:
    """Encode what is to be cached, and put what each step runs on the device."""
    rank, processes = accelerator.process_index, accelerator.num_processes
    latents: LatentCache | None = None
    texts: Mapping[str, Encoded] | None = None
    if options.cache_latents:
        with _encoding([model.vae], accelerator):
            latents = cache_latents(data, model.vae, options, seed=seed, rank=rank, world=processes)
    else:
        check_pixels(data.pictures)
    if options.cache_text_encoder_outputs:
        with _encoding(model.encoders, accelerator):
            texts = cache_texts(data, model, options, quiet=rank > 0)
    for module in (model.unet, *([] if latents else [model.vae]), *([] if texts else model.encoders)):
        module.to(accelerator.device)
    return Loader(data, options, seed, rank, processes, latents, texts)


@contextmanager
def _encoding(modules: Sequence[nn.Module], accelerator: Accelerator) -> Iterator[None]:
    """Modules on the device while each process encodes its share; what stops one process is raised in all of them."""
    stopped: LorashrinkError | None = None
    for module in modules:
        module.to(accelerator.device)
    try:
        yield
    except LorashrinkError as error:
        stopped = error
    for reason in gather_object([stopped]):
        if reason is not None:
            raise reason
    for module in modules:
        module.to("cpu")
    clear_device_cache(garbage_collection=True)


def _start_log(accelerator: Accelerator, options: Options) -> None:
    if accelerator.log_with:
        shown = {
            name: value if isinstance(value, (bool, int, float)) else str(value)  # what loggers take
            for name, value in dataclasses.asdict(options).items()
        }
        extra: dict[str, Any] = {"wandb": {"name": options.wandb_run_name}} if options.wandb_run_name else {}
        tracker = options.log_tracker_name or "network_train"
        accelerator.init_trackers(tracker, shown if options.log_config else None, extra)


# --- what a run will be -------------------------------------------------------------------------


def describe(options: Options, data: Data | None, network: Network, length: Length | None, processes: int) -> str:
    """A few lines about pictures, network, batches and length; `data` and `length` are None while there are none."""
    modules, parameters = (sum(map(count, network.sizes.values())) for count in (len, sum))
    precision = options.save_precision if options.save_precision in ("fp16", "bf16") else "float32"
    size = size_text(parameters * (4 if precision == "float32" else 2))
    batch, accumulation = options.train_batch_size, options.gradient_accumulation_steps
    if data and length:
        batch = max(dataset.options.train_batch_size for dataset in data.datasets)
        buckets = count_text(len({picture.fit.bucket for picture in data.pictures}), "bucket")
        showings = count_text(sum(picture.repeats for picture in data.pictures), "showing")
        folders = count_text(len(data.subsets), "folder")
        pictures = f"{len(data.pictures)} in {folders} and {buckets}, {showings} per epoch"
        batches = count_text(length.batches_per_epoch, "batch", "batches")
        per_epoch = f"{batches} or {count_text(length.steps_per_epoch, 'step')} per epoch"
        duration = f"{per_epoch}, {count_text(length.epochs, 'epoch')}, {count_text(length.steps, 'step')}"
    else:
        pictures, epochs = f"none in {options.train_data_dir or '--train_data_dir'}", options.max_train_epochs
        duration = count_text(epochs, "epoch") if epochs else count_text(options.max_train_steps, "step")
        duration += "; without pictures it is not known how many steps an epoch has"
    return "\n".join(
        [
            f"pictures: {pictures}",
            f"network: {modules} modules, {parameters / 1e6:.1f} million parameters; a file has {size} in {precision}",
            *(f"  {part}: {len(sizes)} modules, {sum(sizes):,} parameters" for part, sizes in network.sizes.items()),
            f"batch: {batch} × {accumulation} accumulated × {count_text(processes, 'process', 'processes')}"
            f" = {count_text(batch * accumulation * processes, 'picture')} per step",
            f"length: {duration}",
        ]
    )


def plan(options: Options) -> str:
    """The same before a run, with an estimate of GPU memory.

    Weights are not loaded, and neither they nor pictures need to exist: what is missing is taken to be SDXL 1.0, and
    pictures of --resolution.
    """
    quiet_libraries()
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    data, length = None, None
    batch, size = options.train_batch_size, parse_resolution(options.resolution or "1024")
    if options.dataset_config or (options.train_data_dir and Path(options.train_data_dir).is_dir()):
        data = scan(options)
        shapes = (
            (min(showings, dataset.options.train_batch_size), bucket)
            for dataset in data.datasets
            for bucket, showings in dataset.showings.items()
        )
        batch, size = max(shapes, key=lambda shape: shape[0] * math.prod(shape[1]))
        length = run_length(options, -(-batch_count(data) // processes))
        for warning in saving.never(options, length):
            _log.warning(warning)
    name = options.pretrained_model_name_or_path or ""
    settings, base = Path(options.model_config or name), name
    if options.model_config:
        base += f", with the settings in {settings}"
    elif not name or not settings.is_dir():
        why = ", which is not there" if name and not settings.exists() else ""
        settings, base = SETTINGS, f"{name or 'none'}{why}; planned for SDXL 1.0"
    model = _empty_model(settings, options)
    # Files that change no sizes need not be there: adapters to merge, and numbers to start from.
    weights = options.network_weights if options.dim_from_weights else None
    sizes = replace(options, base_weights=(), base_weights_multiplier=(), network_weights=weights)
    network = build_network(model, sizes)
    described = describe(options, data, network, length, processes)  # before rates of 0 freeze some of it
    memory = step_memory(model, network, options, batch, size)
    return "\n".join(
        [
            f"base: {base}",
            described,
            "",
            f"GPU memory in GiB for {count_text(batch, 'picture')} of {size[0]}×{size[1]}, about:",
            *(f"  {part:<32}{taken / GIB:6.2f}" for part, taken in memory.items()),
            f"  {'in all':<32}{sum(memory.values()) / GIB:6.2f}",
        ]
    )


def _empty_model(settings: Path, options: Options) -> Model:
    """The model of a folder's settings on the meta device, frozen, in the dtypes of training; without tokenizers."""

    def empty(kind: Any, folder: Path) -> Any:
        if issubclass(kind, ModelMixin):
            return kind.from_config(kind.load_config(folder, local_files_only=True))
        return kind(kind.config_class.from_pretrained(folder, local_files_only=True))

    # Bases without a VAE go with --vae, and the VAEs of all SDXL models have one size.
    vae_settings = settings if (settings / "vae" / "config.json").is_file() else SETTINGS
    no_tokenizers: Any = (None, None)
    try:
        with torch.device("meta"):
            unet, first, second = (empty(kind, settings / part) for part, kind in loading.CLASSES.items())
            model = Model(unet, empty(AutoencoderKL, vae_settings / "vae"), (first, second), no_tokenizers)
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise InputError(f"{settings}: the settings of the base cannot be read: {error}") from error
    for module in model.modules:
        module.requires_grad_(False).to(weight_dtype(options))
    if options.no_half_vae:
        model.vae.float()
    return model


# --- GPU memory ---------------------------------------------------------------------------------

GIB = 2**30
_CUDA = GIB  # PyTorch's kernels and the working memory of single operations, about
# What a step of SDXL keeps from the forward to the backward pass: GiB per picture of 1024×1024, counted once from the
# tensors that autograd keeps of the guide's command. (half precision, checkpointing) -> GiB.
_ACTIVATIONS = {(True, True): 0.9, (True, False): 8.6, (False, True): 1.4, (False, False): 13.3}
# Bytes per trained parameter that optimizers keep from step to step; Adafactor keeps at most so many.
STATES = {"adamw": 8, "adamw8bit": 2, "lion": 4, "prodigy": 16, "adafactor": 4}
_TWO_FLOATS = 8  # of an optimizer that is not among them


def step_memory(model: Model, network: Network, options: Options, batch: int, size: Size) -> Mapping[str, float]:
    """Bytes that a training step takes on a GPU, by what takes them: counted, but for activations and CUDA's own.

    Samples, and pictures that are encoded before training, take turns with a step and are not in it.
    """
    network.groups(options)  # freezes what has a learning rate of 0
    if options.full_bf16:
        network.to(torch.bfloat16)
    parts: dict[str, float] = {f"UNet, {_dtype(model.unet)}": _bytes(model.unet)}
    if not options.cache_text_encoder_outputs:
        parts[f"text encoders, {_dtype(model.encoders[0])}"] = _bytes(*model.encoders)
    if not options.cache_latents:
        parts[f"VAE, {_dtype(model.vae)}"] = _bytes(model.vae)
    trained = [parameter for parameter in network.parameters() if parameter.requires_grad]
    count = sum(parameter.numel() for parameter in trained)
    name = optimizer_name(options)
    activations = _ACTIVATIONS[options.mixed_precision != "no", options.gradient_checkpointing]
    return parts | {
        f"adapter, {_dtype(network)}": _bytes(network),
        "its gradients": sum(parameter.numel() * parameter.element_size() for parameter in trained),
        f"states of {name}": STATES.get(name.lower().rpartition(".")[2], _TWO_FLOATS) * count,
        "activations": batch * activations * GIB * math.prod(size) / 1024**2,
        "CUDA and working memory": _CUDA,
    }


def _bytes(*modules: nn.Module) -> int:
    return sum(compute_module_sizes(module)[""] for module in modules)


def _dtype(module: nn.Module) -> str:
    return str(next(module.parameters()).dtype).removeprefix("torch.")
