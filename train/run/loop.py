"""The training loop: steps are taken and logged, and files saved and samples drawn between them."""

from __future__ import annotations

import logging
import math
import signal
import time
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.utils import gather_object
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler
from tqdm.auto import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from lorashrink.errors import LorashrinkError, NonFinite
from lorashrink.pictures.prompts import Prompt
from lorashrink.plots.loss import loss_curve, read_scalars
from lorashrink.plots.style import save
from lorashrink.signals import handled
from lorashrink.train.data.batches import Loader
from lorashrink.train.flags.options import Options
from lorashrink.train.model.loading import Model
from lorashrink.train.model.network import Network
from lorashrink.train.output import samples, saving
from lorashrink.train.output.metadata import file_metadata
from lorashrink.train.output.saving import Length, Position
from lorashrink.train.run.optimizers import learning_rates

_log = logging.getLogger(__name__)


@dataclass(slots=True)
class Session:
    """A run that is ready: everything is loaded, checked and cached, and no step has been taken since `position`."""

    options: Options
    accelerator: Accelerator
    model: Model
    network: Network
    batch_loss: nn.Module  # `BatchLoss` as accelerate wraps it: in several processes gradients are their means
    optimizer: AcceleratedOptimizer
    scheduler: LRScheduler
    loader: Loader
    rates: list[str]  # names of the parameter groups
    length: Length
    position: Position
    fingerprint: Mapping[str, str]
    metadata: Mapping[str, object]  # `run_entries` in the main process, empty in others
    prompts: tuple[Prompt, ...]
    _ending: bool = False  # whether this process was asked to end
    _recent: deque[float] = field(default_factory=deque)  # losses of the last steps, as many as an epoch has
    _shrunk: dict[Path, list[Path]] = field(default_factory=dict)

    def run(self) -> Path:
        """Train to the end; the path of the final file. When it raises, files saved before are complete.

        The first SIGINT or SIGTERM ends the run after its step: the adapter and a state are saved, and
        KeyboardInterrupt says where. The second ends it at once.
        """
        options, length = self.options, self.length
        self._recent = deque(maxlen=length.steps_per_epoch)
        is_main = self.accelerator.is_main_process
        bar = tqdm(total=length.steps, initial=self.position.step, desc="steps", disable=not is_main, unit="step")
        signals = handled(self._heed_signal, (signal.SIGINT, signal.SIGTERM))
        with logging_redirect_tqdm([logging.getLogger("lorashrink")]), bar, signals:
            if self.position.step == 0:
                self._sample()
            while self.position.step < length.steps:
                self._train_epoch(bar)
        path = self._save(options.save_state or options.save_state_on_train_end)
        self.accelerator.end_training()
        folder = self.accelerator.logging_dir
        if folder and is_main and options.log_with != "wandb":
            try:
                save(loss_curve(read_scalars(Path(folder))), Path(folder, "loss.png"))
                _log.info("loss curve: %s", Path(folder, "loss.png"))
            except LorashrinkError as error:
                _log.warning("no loss curve: %s", error)
        return path

    def _train_epoch(self, bar: Any) -> None:
        """Take the remaining steps of the epoch, or of the run."""
        epoch, start = self.position.epoch, self.position.batch
        losses: list[float] = []
        accumulated: list[Tensor] = []
        for number, batch in enumerate(self.loader.epoch(epoch, start), start + 1):
            ends_step = (
                number % self.options.gradient_accumulation_steps == 0 or number == self.length.batches_per_epoch
            )
            with nullcontext() if ends_step else self.accelerator.no_sync(self.batch_loss):
                loss = self.batch_loss(batch)
                self.accelerator.backward(loss)
            accumulated.append(loss.detach())
            if not ends_step:
                continue
            # The mean over the step's batches and all processes.
            losses.append(self.accelerator.reduce(torch.stack(accumulated).mean(), "mean").item())
            accumulated.clear()
            if not math.isfinite(losses[-1]):
                hint = "use a lower --learning_rate, or --mixed_precision bf16"
                raise NonFinite(f"step {self.position.step + 1}: the loss is NaN. Files saved before are good; {hint}")
            if self.options.max_grad_norm > 0:
                trained = [parameter for parameter in self.network.parameters() if parameter.requires_grad]
                self.accelerator.clip_grad_norm_(trained, self.options.max_grad_norm)
            self.optimizer.step()
            self.scheduler.step()
            self.optimizer.zero_grad(set_to_none=True)
            limit = self.options.scale_weight_norms
            norms = self.network.limit_norms(limit) if limit else None
            ended, next_batch = divmod(number, self.length.batches_per_epoch)
            step = self.position.step + 1
            self.position = replace(self.position, epoch=epoch + ended, batch=next_batch, step=step)
            self._recent.append(losses[-1])
            average = sum(self._recent) / len(self._recent)
            values = {"loss/current": losses[-1], "loss/average": average}  # sd-scripts' names
            values |= learning_rates(self.optimizer, self.rates)
            if norms:
                values |= {"max_norm/keys_scaled": norms.scaled, "max_norm/max_key_norm": norms.largest}
                values["norm/avg_key_norm"] = norms.average
            self.accelerator.log(values, step=step)
            bar.set_postfix(loss=f"{losses[-1]:.4f}", average=f"{average:.4f}", refresh=False)
            bar.update()
            self._after_step()
            if self.position.step == self.length.steps:
                break
        self.accelerator.log({"loss/epoch_average": sum(losses) / len(losses)}, step=epoch)
        if self.position.epoch > epoch:
            due = saving.epochs_due(self.options, self.length.epochs)
            if epoch in due:
                self._save(self.options.save_state, epoch=epoch)
                self._remove(saving.expired(self.options, due.step, epoch=epoch))
            self._sample(epoch)

    def _heed_signal(self, number: int, frame: FrameType | None) -> None:
        """The first signal is a request to end, and the second a KeyboardInterrupt."""
        if self._ending:
            raise KeyboardInterrupt
        self._ending = True
        _log.warning("the run ends after this step and saves its state; a second signal ends it at once")

    def _after_step(self) -> None:
        options, step = self.options, self.position.step
        if self._ending:
            self.accelerator.set_trigger()
        due = saving.steps_due(options, self.length.steps)
        interrupted = self.accelerator.check_trigger() and step < self.length.steps  # any process was asked to end
        if step in due or interrupted:
            self._save(options.save_state or interrupted, step=step)
        if step in due:
            self._remove(saving.expired(options, due.step, step=step))
        if interrupted:
            raise KeyboardInterrupt(f"after step {step}; go on with --resume {saving.state_path(options, step=step)}")
        self._sample()

    def _save(self, with_state: bool, *, epoch: int | None = None, step: int | None = None) -> Path:
        """Write the adapter of this epoch or step, or the final one; shrunk too where that was asked for."""
        options, path = self.options, saving.adapter_path(self.options, epoch=epoch, step=step)
        if self.accelerator.is_main_process:
            # Within an epoch the metadata say how many were done before it.
            epochs = (step - 1) // self.length.steps_per_epoch if step else epoch or self.length.epochs
            steps, now = self.position.step, time.time()
            metadata = file_metadata(options, self.metadata, steps=steps, epoch=epochs, finished_at=now)
            with self._at_rest():
                tensors = self.network.state()
            saving.save_adapter(path, tensors, metadata, precision=options.save_precision)
            _log.info("saved %s", path)
            self._shrunk[path] = saving.shrink(path, options)
        if with_state:
            folder, network = saving.state_path(options, epoch=epoch, step=step), self.network.raw_state()
            saving.save_state(folder, self.accelerator, network, self.position, self.fingerprint)
        self.accelerator.wait_for_everyone()
        return path

    def _remove(self, expired: list[Path]) -> None:
        if self.accelerator.is_main_process:
            saving.remove([*expired, *(small for path in expired for small in self._shrunk.pop(path, []))])

    def _sample(self, epoch: int | None = None) -> None:
        options, step, accelerator = self.options, self.position.step, self.accelerator
        if not samples.due(options, step=step, epoch=epoch):
            return
        model, prompts, device = self.model, self.prompts, accelerator.device
        share = {"rank": accelerator.process_index, "world": accelerator.num_processes}
        with self._at_rest():
            own = samples.draw(model, prompts, options, step=step, epoch=epoch, device=device, **share)
        drawn = {number: path for paths in gather_object([own]) for number, path in paths.items()}
        if accelerator.is_main_process:
            _log.info("samples: %s", samples.write_sheet(prompts, drawn, options, step=step, epoch=epoch))

    @contextmanager
    def _at_rest(self) -> Iterator[None]:
        """The adapter as it will be used, without dropout; afterwards it is bit by bit as it was."""
        # Schedule-free optimizers move the weights for use, and not back to the same bits.
        before = self.network.raw_state()
        self.optimizer.eval()
        self.network.eval()
        yield
        self.network.train()
        self.optimizer.train()
        self.network.load_raw(before)
