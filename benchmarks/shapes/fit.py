"""The training loop that the VAE, the judge and the base share: AdamW, a log line every 50 steps, resumable."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

_LOG_EVERY, _SAVE_EVERY = 50, 200


@dataclass(frozen=True, slots=True)
class Plan:
    """How long and how fast to train. `schedule` maps progress 0..1 to a factor of the rate."""

    steps: int
    rate: float
    schedule: Callable[[float], float]
    warmup: int = 0
    average: float = 0.0  # decay of the exponential average of the weights; 0: none
    average_from: float = 0.6  # progress at which it begins: random weights would stay in a longer one

    def factor(self, step: int) -> float:
        return min(1.0, (step + 1) / max(self.warmup, 1)) * self.schedule(step / self.steps)


@dataclass(frozen=True, slots=True)
class Run:
    """Where checkpoints and the log lie."""

    work: Path
    log: Path

    def note(self, text: str) -> None:
        line = f"{time.strftime('%H:%M:%S')} {text}"
        print(line, flush=True)
        with self.log.open("a", encoding="utf-8") as file:
            file.write(line + "\n")


def seeded(*numbers: int) -> torch.Generator:
    """A generator for this purpose and step."""
    seed = 0
    for number in numbers:
        seed = seed * 1_000_003 + number
    return torch.Generator().manual_seed(seed % 2**63)


def fit(name: str, module: nn.Module, loss: Callable[[int], Tensor], plan: Plan, run: Run) -> None:
    """Train `module` in place. `loss(step)` must depend on the step only, so that a resumed run goes the same way.

    At the end the module holds the averaged weights, if `plan` wants an average. A finished stage is only loaded.
    """
    optimizer = torch.optim.AdamW(module.parameters(), lr=plan.rate, betas=(0.9, 0.99), weight_decay=0.01)
    average = AveragedModel(module, multi_avg_fn=get_ema_multi_avg_fn(plan.average)) if plan.average else None
    path = run.work / f"{name}.pt"
    start = 0
    if path.exists():
        state = torch.load(path, weights_only=True)
        start = state["step"]
        module.load_state_dict(state["module"])
        optimizer.load_state_dict(state["optimizer"])
        if average:
            average.load_state_dict(state["average"])
        run.note(f"{name} goes on at step {start}")

    module.train()
    clock, losses = time.monotonic(), []
    for step in range(start, plan.steps):
        for group in optimizer.param_groups:
            group["lr"] = plan.rate * plan.factor(step)
        value = loss(step)
        optimizer.zero_grad()
        value.backward()
        nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimizer.step()
        if average and step >= plan.average_from * plan.steps:
            average.update_parameters(module)
        losses.append(value.item())
        done = step + 1
        if done % _LOG_EVERY == 0:
            seconds = (time.monotonic() - clock) / len(losses)
            run.note(f"{name} {done:5}/{plan.steps} loss {sum(losses) / len(losses):.4f} {seconds:.3f} s/step")
            clock, losses = time.monotonic(), []
        if done % _SAVE_EVERY == 0 or done == plan.steps:
            state = {"step": done, "module": module.state_dict(), "optimizer": optimizer.state_dict()}
            torch.save(state | ({"average": average.state_dict()} if average else {}), path.with_suffix(".new"))
            os.replace(path.with_suffix(".new"), path)
    if average:
        module.load_state_dict(average.module.state_dict())
    module.eval()
