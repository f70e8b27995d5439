"""Everything before the first step: pictures found, the model loaded, caches filled, the network built."""

from __future__ import annotations

import dataclasses
import gc
import logging
import os
import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import ProjectConfiguration, broadcast_object_list, gather_object, set_seed
from tqdm.auto import tqdm

from lorashrink.errors import LorashrinkError, UsageError
from lorashrink.pictures.prompts import Prompt, read_prompts
from lorashrink.pictures.samplers import check_samplers
from lorashrink.train.data.batches import Loader
from lorashrink.train.data.caches import LatentCache, TextCache, cache_latents, cache_texts
from lorashrink.train.data.scanning import Data, batch_count, scan
from lorashrink.train.flags.network_args import given_network_args
from lorashrink.train.flags.options import Options
from lorashrink.train.model.loading import Model, load_model, quiet_libraries, set_attention, set_checkpointing
from lorashrink.train.model.network import Network, build_network
from lorashrink.train.output import logs, samples, saving
from lorashrink.train.output.metadata import Facts, picture_entries, source, training_metadata
from lorashrink.train.output.saving import Length, Position
from lorashrink.train.plan import describe
from lorashrink.train.run.loop import Session
from lorashrink.train.run.objective import Objective
from lorashrink.train.run.optimizers import make_optimizer, make_scheduler
from lorashrink.train.run.stepping import Stepper
from lorashrink.train.text import CHUNK, token_count

_log = logging.getLogger(__name__)

_T = TypeVar("_T")


def prepare(options: Options) -> Session:
    """Load, check and cache everything that the run needs.

    Raises:
        UsageError, InputError, NonFinite, OutputError: see `scan`, `load_model`, `cache_latents`, `build_network`, ...
    """
    quiet_libraries()
    names = saving.names(options)
    prompts = _prompts(options)
    log_folder = logs.log_folder(options, datetime.now())
    accelerator = _accelerator(options, log_folder)
    log_folder = _agreed(accelerator, log_folder)
    asked_seed = options.seed
    options = replace(options, seed=_seed(options, accelerator))

    data = scan(options)
    model = load_model(options, accelerator.device)
    for warning in samples.check_prompts(prompts, model.tokenizers[0], accelerator.num_processes, options):
        _log.warning(warning)
    _warn_of_long_captions(data, model, options)
    network = build_network(model, options)
    network.to(accelerator.device)
    if options.full_bf16:
        network.module.to(torch.bfloat16)
    groups, rates = network.groups(options)
    length = saving.run_length(options, -(-batch_count(data) // accelerator.num_processes))
    optimizer, description = make_optimizer(options, groups)
    scheduler = make_scheduler(options, optimizer, length.steps * accelerator.num_processes)
    optimizer, scheduler = accelerator.prepare(optimizer, scheduler)
    # What takes long comes when nothing is left that could be wrong with the options.
    latents, texts = _caches(data, model, options, accelerator)
    _place(model, options, accelerator, latents, texts)
    network.train(True)
    loader = _loader(data, options, accelerator, latents, texts, length)
    position = _position(options, accelerator, network, data, length, asked_seed)
    # From here on only what LyCORIS drops is drawn from global random numbers, and each process drops its own.
    if not options.resume:
        set_seed(position.seed, device_specific=True)

    facts = Facts(
        session_id=random.SystemRandom().getrandbits(32),
        started_at=time.time(),
        seed=position.seed,
        length=length,
        optimizer=description,
        network_args=given_network_args(options),
        pictures=picture_entries(data, options, accelerator.num_processes),
        base=source(options.pretrained_model_name_or_path or ""),
        vae=source(options.vae) if options.vae else None,
    )
    training_metadata(options, facts)  # what is wrong with it is found now, not when hours of training are saved
    _log.info("%s", describe(options, data, network, length, accelerator.num_processes))
    if log_folder or options.log_with:
        _start_logging(options, accelerator)
    stepper = Stepper(
        options=options,
        accelerator=accelerator,
        seed=position.seed,
        data=data,
        model=model,
        network=network,
        objective=Objective(options),
        optimizer=optimizer,
        scheduler=scheduler,
        parameters=[each for each in network.parameters() if each.requires_grad],
        trains_text=any("textencoder" in rate for rate in rates),
    )
    return Session(stepper, data, loader, rates, length, position, facts, names, prompts, log_folder)


def _prompts(options: Options) -> tuple[Prompt, ...]:
    if not options.sample_prompts:
        return ()
    prompts = read_prompts(Path(options.sample_prompts), sampler=options.sample_sampler)
    check_samplers(prompts)
    return prompts


def _warn_of_long_captions(data: Data, model: Model, options: Options) -> None:
    limit = options.max_token_length or CHUNK
    captions = [line for dataset in data.datasets for picture in dataset.pictures for line in picture.lines]
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
    )
    started = int(os.environ.get("WORLD_SIZE", "1"))
    if started != accelerator.num_processes:
        # Each would train alone, and all would write the same files.
        raise UsageError(
            f"{started} processes were started for GPUs that torch does not find; leave out --multi_gpu and --gpu_ids, "
            "or install the torch that fits your GPUs"
        )
    return accelerator


def _agreed(accelerator: Accelerator, value: Any) -> Any:
    """What the main process says, in every process."""
    shared = [value]
    broadcast_object_list(shared)
    return shared[0]


def _seed(options: Options, accelerator: Accelerator) -> int:
    if options.resume:
        return int(saving.peek_state(Path(options.resume))["seed"])
    chosen = random.SystemRandom().getrandbits(32) if options.seed is None else options.seed
    return int(_agreed(accelerator, chosen))


def _caches(
    data: Data, model: Model, options: Options, accelerator: Accelerator
) -> tuple[LatentCache | None, TextCache | None]:
    """What is encoded once; the parts that encode it are on the device for as long as it takes."""
    where = {"seed": options.seed or 0, "rank": accelerator.process_index, "world": accelerator.num_processes}
    latents: LatentCache | None = None
    texts: TextCache | None = None
    if options.cache_latents:
        with _on(accelerator, [model.vae]), _progress("latents", accelerator) as progress:
            latents = _in_all(partial(cache_latents, data, model.vae, options, progress=progress, **where))
    if options.cache_text_encoder_outputs:
        with _on(accelerator, list(model.encoders)), _progress("captions", accelerator) as progress:
            texts = _in_all(partial(cache_texts, data, model, options, progress=progress, **where))
    return latents, texts


def _in_all(work: Callable[[], _T]) -> _T:
    """Do the work of this process and wait for the others; what stops one of them is raised in all."""
    stopped: LorashrinkError | None = None
    try:
        result = work()
    except LorashrinkError as error:
        stopped = error
    for each in gather_object([stopped]):
        if each is not None:
            raise each
    return result


@contextmanager
def _on(accelerator: Accelerator, modules: list[torch.nn.Module]) -> Iterator[None]:
    """On the device for the time being, and on the CPU afterwards."""
    for module in modules:
        module.to(accelerator.device)
    yield
    for module in modules:
        module.to("cpu")
    _free()


def _free() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


@contextmanager
def _progress(what: str, accelerator: Accelerator) -> Iterator[Callable[[int, int], None]]:
    with tqdm(desc=what, disable=not accelerator.is_main_process, leave=False) as bar:

        def show(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        yield show


def _place(
    model: Model,
    options: Options,
    accelerator: Accelerator,
    latents: LatentCache | None,
    texts: TextCache | None,
) -> None:
    """Put on the device what every step needs, and nothing else."""
    model.unet.to(accelerator.device)
    if latents is None:
        model.vae.to(accelerator.device)
    if texts is None:
        for encoder in model.encoders:
            encoder.to(accelerator.device)
    set_attention(model, options)
    set_checkpointing(model, options)


def _loader(
    data: Data,
    options: Options,
    accelerator: Accelerator,
    latents: LatentCache | None,
    texts: TextCache | None,
    length: Length,
) -> Loader:
    rank, world = accelerator.process_index, accelerator.num_processes
    return Loader(data, options, options.seed or 0, rank, world, latents, texts, length.steps)


def _position(
    options: Options, accelerator: Accelerator, network: Network, data: Data, length: Length, seed: int | None
) -> Position:
    assert options.seed is not None
    if not options.resume:
        return Position(epoch=1, batch=0, step=0, seed=options.seed)
    asked = saving.fingerprint(options, data, accelerator.num_processes)
    position = saving.load_state(Path(options.resume), accelerator, network.load_raw, asked, seed)
    if position.step >= length.steps:
        raise UsageError(
            f"--resume {options.resume}: it stands at step {position.step}, and training ends at step {length.steps}; "
            "raise --max_train_steps or --max_train_epochs"
        )
    _log.info("resumed at step %d", position.step)
    return position


def _start_logging(options: Options, accelerator: Accelerator) -> None:
    extra: dict[str, Any] = {"wandb": {"name": options.wandb_run_name}} if options.wandb_run_name else {}
    accelerator.init_trackers(
        options.log_tracker_name or logs.TRACKER, _plain(options) if options.log_config else None, extra
    )


def _plain(options: Options) -> dict[str, Any]:
    """The options as numbers and text, which is what loggers take."""
    return {
        name: value if isinstance(value, (bool, int, float)) else str(value)
        for name, value in dataclasses.asdict(options).items()
    }
