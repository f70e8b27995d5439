"""The training loop: steps are taken and logged, and files saved and samples drawn between them."""

from __future__ import annotations

import io
import logging
import math
import time
from collections import defaultdict, deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from datetime import datetime
from enum import StrEnum
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from tqdm.auto import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from lorashrink.errors import InputError, LorashrinkError, NonFinite
from lorashrink.files.disk import write_bytes
from lorashrink.pictures.prompts import Prompt
from lorashrink.plots.loss import loss_curve
from lorashrink.train.data.batches import Loader
from lorashrink.train.flags.options import Options
from lorashrink.train.model.loading import Model
from lorashrink.train.model.network import Network, NormReport
from lorashrink.train.output import samples, saving
from lorashrink.train.output.metadata import Facts, training_metadata
from lorashrink.train.output.saving import Length, Names, Position
from lorashrink.train.run.ending import Ending, Interrupted
from lorashrink.train.run.optimizers import eval_mode, learning_rates, train_mode

_log = logging.getLogger(__name__)

TRACKER = "network_train"  # the folder below the run's, if --log_tracker_name gives none


class Tag(StrEnum):
    """What is logged, under sd-scripts' names; the step is the optimizer step, for EPOCH_LOSS the epoch."""

    LOSS = "loss/current"
    AVERAGE_LOSS = "loss/average"
    EPOCH_LOSS = "loss/epoch_average"
    TEXT_ENCODER_RATE = "lr/textencoder"  # for optimizers that adapt it, what they make of it
    UNET_RATE = "lr/unet"
    SCALED_LAYERS = "max_norm/keys_scaled"
    AVERAGE_NORM = "norm/avg_key_norm"
    LARGEST_NORM = "max_norm/max_key_norm"


@dataclass(slots=True)
class Session:
    """A run that is ready: everything is loaded, checked and cached, and no step has been taken since `position`."""

    options: Options
    accelerator: Accelerator
    model: Model
    network: Network
    batch_loss: nn.Module  # `BatchLoss` as accelerate wraps it: in several processes gradients are their means
    optimizer: Optimizer
    scheduler: LRScheduler
    loader: Loader
    rates: list[str]  # names of the parameter groups
    length: Length
    position: Position
    fingerprint: Mapping[str, str]
    facts: Facts
    names: Names
    prompts: tuple[Prompt, ...]
    log_folder: Path | None
    _ending: Ending = field(default_factory=Ending)
    _recent: deque[float] = field(default_factory=deque)  # losses of the last steps, as many as an epoch has
    _shrunk: dict[Path, list[Path]] = field(default_factory=dict)

    def run(self) -> Path:
        """Train to the end; the path of the final file. When it raises, files saved before are complete.

        The first SIGINT or SIGTERM ends the run after its step: the adapter and a state are saved, and Interrupted is
        raised.
        """
        self._recent = deque(maxlen=self.length.steps_per_epoch)
        total, done = self.length.steps, self.position.step
        bar = tqdm(total=total, initial=done, desc="steps", disable=not self._is_main, unit="step")
        with logging_redirect_tqdm([logging.getLogger("lorashrink")]), bar, self._ending:
            if self.position.step == 0:
                self._sample()
            while self.position.step < self.length.steps:
                self._train_epoch(bar)
        return self._finish()

    def _train_epoch(self, bar: Any) -> None:
        """Take the remaining steps of the epoch, or of the run."""
        epoch, start = self.position.epoch, self.position.batch
        losses: list[float] = []
        accumulated: list[Tensor] = []
        for number, batch in enumerate(self.loader.epoch(epoch, start), start + 1):
            ends_step = number % self.length.accumulation == 0 or number == self.length.batches_per_epoch
            with nullcontext() if ends_step else self.accelerator.no_sync(self.batch_loss):
                loss = self.batch_loss(batch)
                self.accelerator.backward(loss)
            accumulated.append(loss.detach())
            if not ends_step:
                continue
            losses.append(self._mean(accumulated))
            accumulated.clear()
            norms = self._update()
            self.position = replace(self.position, batch=number, step=self.position.step + 1)
            self._record(bar, losses[-1], norms)
            self._after_step()
            if self.position.step == self.length.steps:
                break
        self._log({Tag.EPOCH_LOSS: sum(losses) / len(losses)}, epoch)
        if self._next.epoch > epoch:
            self.position = self._next
            self._after_epoch(epoch)

    def _mean(self, losses: list[Tensor]) -> float:
        """The mean loss of a step, over its batches and all processes."""
        mean = self.accelerator.reduce(torch.stack(losses).mean(), "mean").item()
        if not math.isfinite(mean):
            hint = "use a lower --learning_rate, or --mixed_precision bf16"
            raise NonFinite(f"step {self.position.step + 1}: the loss is NaN. Files saved before are good; {hint}")
        return float(mean)

    def _update(self) -> NormReport | None:
        """Change the parameters by their gradients. Returns what --scale_weight_norms did."""
        if self.options.max_grad_norm > 0:
            trained = [parameter for parameter in self.network.parameters() if parameter.requires_grad]
            self.accelerator.clip_grad_norm_(trained, self.options.max_grad_norm)
        self.optimizer.step()
        self.scheduler.step()
        self.optimizer.zero_grad(set_to_none=True)
        limit = self.options.scale_weight_norms
        return self.network.limit_norms(limit) if limit else None

    @property
    def _next(self) -> Position:
        """The position, where the end of an epoch is the beginning of the next."""
        if self.position.batch < self.length.batches_per_epoch:
            return self.position
        return replace(self.position, epoch=self.position.epoch + 1, batch=0)

    # --- between steps ---

    def _after_step(self) -> None:
        options, step = self.options, self.position.step
        due = step in saving.steps_due(options.save_every_n_steps, self.length.steps)
        interrupted = self._interrupted() and step < self.length.steps
        if due or interrupted:
            self._save(options.save_state or interrupted, step=step)
        if due:
            self._remove(saving.expired(options, self.names, options.save_every_n_steps or 1, step=step))
        if interrupted:
            raise Interrupted(f"after step {step}; go on with --resume {self.names.state(step=step)}")
        self._sample()

    def _interrupted(self) -> bool:
        """Whether any process was asked to end."""
        if self.accelerator.num_processes == 1:
            return self._ending.requested
        if self._ending.requested:
            self.accelerator.set_trigger()
        return bool(self.accelerator.check_trigger())

    def _after_epoch(self, epoch: int) -> None:
        options = self.options
        every = saving.epochs_between_saves(options, self.length.epochs)
        if epoch in saving.epochs_due(every, self.length.epochs):
            self._save(options.save_state, epoch=epoch)
            self._remove(saving.expired(options, self.names, every or 1, epoch=epoch))
        self._sample(epoch)

    def _finish(self) -> Path:
        options = self.options
        path = self._save(options.save_state or options.save_state_on_train_end)
        self.accelerator.end_training()
        if self.log_folder and self._is_main and options.log_with != "wandb":
            try:
                _log.info("loss curve: %s", save_loss_curve(self.log_folder))
            except LorashrinkError as error:
                _log.warning("no loss curve: %s", error)
        return path

    def _save(self, with_state: bool, *, epoch: int | None = None, step: int | None = None) -> Path:
        """Write the adapter of this epoch or step, or the final one; shrunk too where that was asked for."""
        options, path = self.options, self.names.file(epoch=epoch, step=step)
        if self._is_main:
            # Within an epoch the metadata say how many are done.
            epochs = self.position.epoch - 1 if step else epoch or self.length.epochs
            facts = replace(self.facts, steps=self.position.step, epoch=epochs, finished_at=time.time())
            with self._at_rest():
                tensors = self.network.state()
            saving.save_adapter(path, tensors, training_metadata(options, facts), precision=options.save_precision)
            _log.info("saved %s", path)
            self._shrunk[path] = saving.shrink(path, options)
        if with_state:
            folder, network = self.names.state(epoch=epoch, step=step), self.network.raw_state()
            saving.save_state(folder, self.accelerator, network, self._next, self.fingerprint)
        self.accelerator.wait_for_everyone()
        return path

    def _remove(self, expired: list[Path]) -> None:
        if self._is_main:
            saving.remove([*expired, *(small for path in expired for small in self._shrunk.pop(path, []))])

    def _sample(self, epoch: int | None = None) -> None:
        options, step = self.options, self.position.step
        if not samples.due(options, step=step, epoch=epoch):
            return
        accelerator, folder = self.accelerator, self.names.folder
        with self._at_rest():
            samples.draw(
                self.model,
                self.prompts,
                options,
                folder,
                step=step,
                epoch=epoch,
                rank=accelerator.process_index,
                world=accelerator.num_processes,
                device=accelerator.device,
            )
        accelerator.wait_for_everyone()
        if self._is_main:
            _log.info("samples: %s", samples.write_sheet(self.prompts, options, folder, step=step, epoch=epoch))

    @contextmanager
    def _at_rest(self) -> Iterator[None]:
        """The adapter as it will be used, without dropout; afterwards it is bit by bit as it was."""
        # Schedule-free optimizers move the weights for use, and not back to the same bits.
        before = self.network.raw_state()
        eval_mode(self.optimizer)
        self.network.eval()
        yield
        self.network.train()
        train_mode(self.optimizer)
        self.network.load_raw(before)

    # --- what can be watched ---

    @property
    def _is_main(self) -> bool:
        return bool(self.accelerator.is_main_process)

    def _record(self, bar: Any, loss: float, norms: NormReport | None) -> None:
        self._recent.append(loss)
        average = sum(self._recent) / len(self._recent)
        values: dict[str, float] = {Tag.LOSS: loss, Tag.AVERAGE_LOSS: average}
        values |= learning_rates(self.optimizer, self.rates)
        if norms:
            values |= {Tag.SCALED_LAYERS: norms.scaled, Tag.AVERAGE_NORM: norms.average}
            values[Tag.LARGEST_NORM] = norms.largest
        self._log(values, self.position.step)
        bar.set_postfix(loss=f"{loss:.4f}", average=f"{average:.4f}", refresh=False)
        bar.update()

    def _log(self, values: dict[str, float], step: int) -> None:
        if self.accelerator.trackers:
            self.accelerator.log({str(tag): value for tag, value in values.items()}, step=step)


# --- logs ---------------------------------------------------------------------------------------


def log_folder_of(options: Options, now: datetime) -> Path | None:
    """The folder of a run that starts now; None if nothing is logged to a folder."""
    if options.logging_dir is None:
        return None
    return Path(options.logging_dir) / f"{options.log_prefix or ''}{now:%Y%m%d%H%M%S}"


def tracker_of(options: Options) -> str | None:
    """What accelerate logs with: --log_with, or tensorboard if there is a folder for it."""
    return options.log_with or ("tensorboard" if options.logging_dir else None)


def read_scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """What tensorboard logged below a run's folder: tag -> (step, value), in the order of steps."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    scalars: defaultdict[str, list[tuple[int, float]]] = defaultdict(list)
    for file in folder.rglob("*.tfevents.*"):
        log = EventAccumulator(str(file), size_guidance={"scalars": 0})  # 0: all of them, not a sample
        log.Reload()
        for tag in log.Tags()["scalars"]:
            scalars[tag] += [(event.step, event.value) for event in log.Scalars(tag)]
    if not scalars:
        raise InputError(f"{folder}: no log in it; --logging_dir makes one")
    return {tag: sorted(points, key=lambda point: point[0]) for tag, points in scalars.items()}


def save_loss_curve(folder: Path) -> Path:
    """Draw the losses and learning rates that were logged below a run's folder, as loss.png in it."""
    data = io.BytesIO()
    loss_curve(read_scalars(folder)).savefig(data, format="png")
    path = folder / "loss.png"
    write_bytes(path, data.getvalue())
    return path
