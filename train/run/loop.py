"""The training loop: steps are taken, and files saved and samples drawn between them."""

from __future__ import annotations

import logging
import math
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from lorashrink.errors import LorashrinkError, NonFinite
from lorashrink.pictures.prompts import Prompt
from lorashrink.train.data.batches import Loader
from lorashrink.train.data.scanning import Data
from lorashrink.train.model.network import NormReport
from lorashrink.train.output import samples, saving
from lorashrink.train.output.logs import Tag, save_loss_curve
from lorashrink.train.output.metadata import Facts, training_metadata
from lorashrink.train.output.saving import Length, Names, Position
from lorashrink.train.output.shrinking import shrink
from lorashrink.train.run.optimizers import eval_mode, learning_rates, train_mode
from lorashrink.train.run.stepping import Stepper

_log = logging.getLogger(__name__)


@dataclass(slots=True)
class Session:
    """A run that is ready: everything is loaded, checked and cached, and no step has been taken since `position`."""

    stepper: Stepper
    data: Data
    loader: Loader
    rates: list[str]  # names of the parameter groups
    length: Length
    position: Position
    facts: Facts
    names: Names
    prompts: tuple[Prompt, ...]
    log_folder: Path | None
    _recent: deque[float] = field(default_factory=deque)
    _shrunk: dict[Path, list[Path]] = field(default_factory=dict)

    def run(self) -> Path:
        """Train to the end; the path of the final file.

        Raises:
            NonFinite: the loss or the adapter became NaN. Files saved before are complete.
            InputError: a picture or a cache file cannot be read.
            OutputError: a file cannot be written.
        """
        self._recent = deque(maxlen=self.length.steps_per_epoch)
        with logging_redirect_tqdm([logging.getLogger("lorashrink")]), self._bar() as bar:
            if self.position.step == 0:
                self._sample()
            while self.position.step < self.length.steps:
                self._epoch(bar)
        return self._finish()

    def _epoch(self, bar: Any) -> None:
        epoch, losses = self.position.epoch, []
        for number, loss, norms in self._steps():
            self.position = replace(self.position, batch=number, step=self.position.step + 1)
            losses.append(loss)
            self._record(bar, loss, norms)
            self._after_step()
            if self.position.step == self.length.steps:
                break
        self._log({Tag.EPOCH_LOSS: sum(losses) / len(losses)}, epoch)
        if self._next.epoch > epoch:
            self.position = self._next
            self._after_epoch(epoch)

    @property
    def _next(self) -> Position:
        """The position, where the end of an epoch is the beginning of the next."""
        if self.position.batch < self.length.batches_per_epoch:
            return self.position
        return replace(self.position, epoch=self.position.epoch + 1, batch=0)

    def _steps(self) -> Iterator[tuple[int, float, NormReport | None]]:
        """Take the steps left in this epoch; for each the number of batches done, the mean loss, and norms."""
        accumulated: list[torch.Tensor] = []
        start = self.position.batch
        for number, batch in enumerate(self.loader.epoch(self.position.epoch, start), start + 1):
            accumulated.append(self.stepper.accumulate(batch))
            if number % self.length.accumulation == 0 or number == self.length.batches_per_epoch:
                loss = self._mean(accumulated)
                yield number, loss, self.stepper.apply()
                accumulated = []

    def _mean(self, losses: list[torch.Tensor]) -> float:
        mean = self.stepper.accelerator.reduce(torch.stack(losses).mean(), "mean").item()
        if not math.isfinite(mean):
            raise NonFinite(
                f"step {self.position.step + 1}: the loss is NaN. Files saved before are good; use a lower "
                "--learning_rate, or --mixed_precision bf16"
            )
        return float(mean)

    # --- between steps ---

    def _after_step(self) -> None:
        options, step = self.stepper.options, self.position.step
        if step in saving.steps_due(options.save_every_n_steps, self.length.steps):
            self._save(self.names.step_file(step), self.names.step_state(step), options.save_state)
            self._remove(saving.expired_after_step(options, self.names, step, options.save_every_n_steps or 1))
        self._sample()

    def _after_epoch(self, epoch: int) -> None:
        options = self.stepper.options
        every = saving.epochs_between_saves(options, self.length.epochs)
        if epoch in saving.epochs_due(every, self.length.epochs):
            self._save(self.names.epoch_file(epoch), self.names.epoch_state(epoch), options.save_state, epoch)
            self._remove(saving.expired_after_epoch(options, self.names, epoch, every or 1))
        self._sample(epoch)

    def _finish(self) -> Path:
        options, path = self.stepper.options, self.names.final_file()
        with_state = options.save_state or options.save_state_on_train_end
        self._save(path, self.names.final_state(), with_state, self.length.epochs)
        self.stepper.accelerator.end_training()
        if self.log_folder and self._is_main and options.log_with != "wandb":
            try:
                _log.info("loss curve: %s", save_loss_curve(self.log_folder))
            except LorashrinkError as error:
                _log.warning("no loss curve: %s", error)
        return path

    def _save(self, path: Path, state: Path, with_state: bool, epoch: int | None = None) -> None:
        """Write the adapter, shrunk too where that was asked for, and a state folder where `with_state`.

        `epoch` is what the metadata says; while an epoch is not done, how many are.
        """
        options = self.stepper.options
        if self._is_main:
            done = self.position.epoch - 1 if epoch is None else epoch
            facts = replace(self.facts, steps=self.position.step, epoch=done, finished_at=time.time())
            with self._at_rest():
                tensors = self.stepper.network.state()
            saving.save_adapter(path, tensors, training_metadata(options, facts), precision=options.save_precision)
            _log.info("saved %s", path)
            self._shrunk[path] = shrink(path, options)
        if with_state:
            asked = saving.fingerprint(options, self.data, self.stepper.accelerator.num_processes)
            saving.save_state(state, self.stepper.accelerator, self.stepper.network.raw_state(), self._next, asked)
        self.stepper.accelerator.wait_for_everyone()

    def _remove(self, expired: list[Path]) -> None:
        if self._is_main:
            saving.remove([*expired, *(small for path in expired for small in self._shrunk.pop(path, []))])

    def _sample(self, epoch: int | None = None) -> None:
        options, step = self.stepper.options, self.position.step
        if not samples.due(options, step=step, epoch=epoch):
            return
        accelerator, folder = self.stepper.accelerator, self.names.folder
        with self._at_rest():
            samples.draw(
                self.stepper.model,
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
        network, optimizer = self.stepper.network, self.stepper.optimizer
        # Schedule-free optimizers move the weights for use, and not back to the same bits.
        before = network.raw_state()
        eval_mode(optimizer)
        network.train(False)
        yield
        network.train(True)
        train_mode(optimizer)
        network.load_raw(before)

    # --- what can be watched ---

    @property
    def _is_main(self) -> bool:
        return bool(self.stepper.accelerator.is_main_process)

    def _bar(self) -> Any:
        return tqdm(
            total=self.length.steps, initial=self.position.step, desc="steps", disable=not self._is_main, unit="step"
        )

    def _record(self, bar: Any, loss: float, norms: NormReport | None) -> None:
        self._recent.append(loss)
        average = sum(self._recent) / len(self._recent)
        values: dict[str, float] = {Tag.LOSS: loss, Tag.AVERAGE_LOSS: average}
        values |= learning_rates(self.stepper.optimizer, self.rates)
        if norms:
            values |= {
                Tag.SCALED_LAYERS: norms.scaled,
                Tag.AVERAGE_NORM: norms.average,
                Tag.LARGEST_NORM: norms.largest,
            }
        self._log(values, self.position.step)
        bar.set_postfix(loss=f"{loss:.4f}", average=f"{average:.4f}", refresh=False)
        bar.update()

    def _log(self, values: dict[str, float], step: int) -> None:
        if self.stepper.accelerator.trackers:
            self.stepper.accelerator.log({str(tag): value for tag, value in values.items()}, step=step)
