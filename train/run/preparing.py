"""Everything before the first step: pictures found, the model loaded, caches filled, the network built."""

from __future__ import annotations

import dataclasses
import gc
import logging
import os
import random
import time
from collections.abc import Callable, Iterator, Sequence
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
    gather_object,
    set_seed,
)
from tqdm.auto import tqdm

from lorashrink.errors import LorashrinkError, UsageError
from lorashrink.pictures.pipelines import quiet_libraries
from lorashrink.pictures.prompts import Prompt, read_prompts
from lorashrink.pictures.samplers import check_samplers
from lorashrink.train.data.batches import Loader, batch_count
from lorashrink.train.data.caches import LatentCache, TextCache, cache_latents, cache_texts
from lorashrink.train.data.scanning import Data, scan
from lorashrink.train.flags.network_args import given_network_args
from lorashrink.train.flags.options import Options
from lorashrink.train.model.loading import CHUNK, Model, load_model, set_attention, set_checkpointing, token_count
from lorashrink.train.model.network import build_network
from lorashrink.train.output import logs, samples, saving
from lorashrink.train.output.metadata import Facts, picture_entries, source, training_metadata
from lorashrink.train.output.saving import Length, Position
from lorashrink.train.run.batch_loss import BatchLoss
from lorashrink.train.run.loop import Session
from lorashrink.train.run.optimizers import make_optimizer, make_scheduler
from lorashrink.train.run.plan import describe

_log = logging.getLogger(__name__)


def prepare(options: Options) -> Session:
    """Load, check and cache everything that the run needs.

    Raises:
        UsageError, InputError, NonFinite, OutputError: see `scan`, `load_model`, `cache_latents`, `build_network`, ...
    """
    quiet_libraries()
    names = saving.run_names(options)
    prompts: tuple[Prompt, ...] = ()
    if options.sample_prompts:
        prompts = read_prompts(Path(options.sample_prompts), sampler=options.sample_sampler)
        check_samplers(prompts)
    log_folder = logs.log_folder(options, datetime.now())
    accelerator = _accelerator(options, log_folder)
    processes = accelerator.num_processes
    log_folder = _agreed(log_folder)
    chosen_seed = options.seed
    seed = _seed(options)
    options = replace(options, seed=seed)

    data = scan(options)
    model = load_model(options, accelerator.device)
    for warning in samples.check_prompts(prompts, model.tokenizers[0], processes, options):
        _log.warning(warning)
    _warn_of_long_captions(data, model, options)
    network = build_network(model, options).to(accelerator.device)
    if options.full_bf16:
        network.to(torch.bfloat16)
    groups, rates = network.groups(options)
    length = saving.run_length(options, -(-batch_count(data) // processes))
    optimizer, description = make_optimizer(options, groups)
    scheduler = make_scheduler(options, optimizer, length.steps * processes)
    trains_text = any("textencoder" in rate for rate in rates)
    batch_loss = BatchLoss(options, data, model, network, seed=seed, trains_text=trains_text)
    batch_loss, optimizer, scheduler = accelerator.prepare(batch_loss, optimizer, scheduler)
    # What takes long comes when nothing is left that could be wrong with the options.
    latents, texts = _caches(data, model, options, accelerator)
    model.unet.to(accelerator.device)
    if latents is None:
        model.vae.to(accelerator.device)
    if texts is None:
        for encoder in model.encoders:
            encoder.to(accelerator.device)
    set_attention(model, options)
    set_checkpointing(model, options)
    batch_loss.train()
    loader = Loader(data, options, seed, accelerator.process_index, processes, latents, texts)
    fingerprint = saving.fingerprint(options, data, processes)
    position = Position(epoch=1, batch=0, step=0, seed=seed)
    if options.resume:
        folder = Path(options.resume)
        position = saving.load_state(folder, accelerator, network.load_raw, fingerprint, chosen_seed)
        _check_remaining(position, length, folder)
    else:
        # From here on only what LyCORIS drops is drawn from global random numbers, and each process drops its own.
        set_seed(seed, device_specific=True)

    facts = Facts(
        session_id=random.SystemRandom().getrandbits(32),
        started_at=time.time(),
        seed=seed,
        length=length,
        optimizer=description,
        network_args=given_network_args(options),
        pictures=picture_entries(data, options, processes),
        base=source(options.pretrained_model_name_or_path or ""),
        vae=source(options.vae) if options.vae else None,
    )
    training_metadata(options, facts)  # what is wrong with it is found now, not when hours of training are saved
    _log.info("%s", describe(options, data, network, length, processes))
    if log_folder or options.log_with:
        _start_logging(options, accelerator)
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
        facts=facts,
        names=names,
        prompts=prompts,
        log_folder=log_folder,
    )


def _warn_of_long_captions(data: Data, model: Model, options: Options) -> None:
    limit = options.max_token_length or CHUNK
    captions = [picture.caption for picture in data.pictures]
    long = sum(token_count(model.tokenizers[0], caption) > limit for caption in captions)
    if long:
        _log.warning(
            "%d of %d captions have more than %d tokens, the rest is not read (--max_token_length)",
            long,
            len(captions),
            limit,
        )


def _accelerator(options: Options, log_folder: Path | None) -> Accelerator:
    folder = str(log_folder) if log_folder else None
    accelerator = Accelerator(
        mixed_precision=options.mixed_precision,
        gradient_accumulation_steps=options.gradient_accumulation_steps,
        log_with=logs.tracker(options),
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
        raise UsageError(
            f"{started} processes were started for GPUs that torch does not find; leave out --multi_gpu and --gpu_ids, "
            "or install the torch that fits your GPUs"
        )
    return accelerator


def _agreed(value: Any) -> Any:
    """What the main process says, in every process."""
    shared = [value]
    broadcast_object_list(shared)
    return shared[0]


def _seed(options: Options) -> int:
    if options.resume:
        return int(saving.peek_state(Path(options.resume))["seed"])
    return int(_agreed(random.SystemRandom().getrandbits(32) if options.seed is None else options.seed))


def _check_remaining(position: Position, length: Length, folder: Path) -> None:
    if position.step >= length.steps:
        raise UsageError(
            f"--resume {folder}: it stands at step {position.step}, and training ends at step {length.steps}; "
            "raise --max_train_steps or --max_train_epochs"
        )
    _log.info("resumed at step %d", position.step)


def _caches(
    data: Data, model: Model, options: Options, accelerator: Accelerator
) -> tuple[LatentCache | None, TextCache | None]:
    """What is encoded once."""
    share = {"rank": accelerator.process_index, "world": accelerator.num_processes}
    latents: LatentCache | None = None
    texts: TextCache | None = None
    if options.cache_latents:
        with _encoding("latents", [model.vae], accelerator) as progress:
            latents = cache_latents(data, model.vae, options, seed=options.seed or 0, progress=progress, **share)
    if options.cache_text_encoder_outputs:
        with _encoding("captions", model.encoders, accelerator) as progress:
            texts = cache_texts(data, model, options, progress=progress, **share)
    return latents, texts


@contextmanager
def _encoding(
    what: str, modules: Sequence[torch.nn.Module], accelerator: Accelerator
) -> Iterator[Callable[[int, int], None]]:
    """Modules on the device while each process encodes its share; what stops one process is raised in all of them."""
    for module in modules:
        module.to(accelerator.device)
    stopped: LorashrinkError | None = None
    with tqdm(desc=what, disable=not accelerator.is_main_process, leave=False) as bar:

        def show(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        try:
            yield show
        except LorashrinkError as error:
            stopped = error
    for reason in gather_object([stopped]):
        if reason is not None:
            raise reason
    for module in modules:
        module.to("cpu")
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _start_logging(options: Options, accelerator: Accelerator) -> None:
    extra: dict[str, Any] = {"wandb": {"name": options.wandb_run_name}} if options.wandb_run_name else {}
    settings = None
    if options.log_config:  # as numbers and text, which is what loggers take
        settings = {
            name: value if isinstance(value, (bool, int, float)) else str(value)
            for name, value in dataclasses.asdict(options).items()
        }
    accelerator.init_trackers(options.log_tracker_name or logs.TRACKER, settings, extra)
