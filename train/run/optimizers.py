"""Optimizers and schedules of the learning rate, by sd-scripts' names."""

from __future__ import annotations

import ast
import importlib
import inspect
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, cast

from diffusers.optimization import get_piecewise_constant_schedule
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from transformers import get_constant_schedule, get_scheduler
from transformers.optimization import Adafactor, AdafactorSchedule

from lorashrink.errors import UsageError
from lorashrink.train.flags.checks import optimizer_name, optimizer_path
from lorashrink.train.flags.options import Options, key_values

_log = logging.getLogger(__name__)


def make_optimizer(options: Options, groups: Sequence[Mapping[str, Any]]) -> tuple[Optimizer, str]:
    """The optimizer of these parameter groups, and its description for metadata: `module.Class(key=value,...)`."""
    name = optimizer_name(options)
    flag = f"--optimizer_type {name}"
    kind = _imported(optimizer_path(options), flag)
    arguments = _pairs("--optimizer_args", options.optimizer_args)
    relative = kind is Adafactor and (arguments.get("relative_step", True) or arguments.get("warmup_init", False))
    if relative:
        arguments["relative_step"] = True
        hint = "the options for it have no effect, but with --optimizer_args relative_step=False"
        _log.warning("Adafactor sets the learning rate itself: %s", hint)
    own = [{key: value for key, value in group.items() if not (relative and key == "lr")} for group in groups]
    rate = None if relative else options.learning_rate
    with _refusing(flag, "--optimizer_args"):
        # On a GPU one kernel for all parameters; with fp16 torch would not tell accelerate that a step was skipped.
        on_gpu = all(parameter.is_cuda for group in own for parameter in group["params"])
        takes_it = kind.__module__.startswith("torch.optim.") and "fused" in inspect.signature(kind).parameters
        chosen = {"fused", "foreach", "capturable", "differentiable"} & arguments.keys()
        fused = {"fused": True} if takes_it and on_gpu and not chosen and options.mixed_precision != "fp16" else {}
        optimizer: Optimizer = kind(own, lr=rate, **fused, **arguments)
    if "d" in optimizer.defaults:  # Prodigy and its like find one factor for all groups, and multiply it by one rate
        rates = {group["lr"] for group in optimizer.param_groups}
        if len(rates) > 1:
            raise UsageError(f"{flag} takes one learning rate: give --unet_lr and --text_encoder_lr alike")
        if (rate := rates.pop()) <= 0.1:
            _log.warning("%s finds the learning rate itself, and multiplies it by yours, %g; 1 is usual", name, rate)
    if hasattr(optimizer, "train"):  # schedule-free: one version of the weights is trained, another one is used
        optimizer.train()
    settings = ",".join(f"{key}={value}" for key, value in arguments.items())
    return optimizer, f"{kind.__module__}.{kind.__name__}" + (f"({settings})" if settings else "")


def make_scheduler(options: Options, optimizer: Optimizer, total_steps: int) -> LRScheduler:
    """The schedule of the learning rate, for an optimizer that accelerate has not wrapped yet.

    `total_steps` is how often it is stepped, which accelerate does once per process and optimizer step.
    """
    if hasattr(optimizer, "eval"):  # schedule-free
        if options.lr_scheduler != "constant" or options.lr_scheduler_type or options.lr_warmup_steps:
            hint = "--lr_scheduler and --lr_warmup_steps have no effect; --optimizer_args warmup_steps=N is its own"
            _log.warning("%s needs no schedule: %s", optimizer_name(options), hint)
        return cast(LRScheduler, get_constant_schedule(optimizer))
    name, path = options.lr_scheduler, options.lr_scheduler_type
    flag = f"--lr_scheduler_type {path}" if path else f"--lr_scheduler {name}"
    if isinstance(optimizer, Adafactor) and optimizer.defaults["relative_step"]:
        if options.lr_warmup_steps:
            raise UsageError("the schedule of Adafactor has no warm-up; leave out --lr_warmup_steps")
        return cast(LRScheduler, AdafactorSchedule(optimizer, options.learning_rate))
    arguments = _pairs("--lr_scheduler_args", options.lr_scheduler_args)
    if path:
        kind = _imported(path if "." in path else f"torch.optim.lr_scheduler.{path}", flag)
        with _refusing(flag, "--lr_scheduler_args"):
            return cast(LRScheduler, kind(optimizer, **arguments))
    if name == "adafactor":
        raise UsageError("--lr_scheduler adafactor needs --optimizer_args relative_step=True")
    warmup, decay = (
        int(value * total_steps) if isinstance(value, float) else value
        for value in (options.lr_warmup_steps, options.lr_decay_steps)
    )
    cycles, lowest = options.lr_scheduler_num_cycles, options.lr_scheduler_min_lr_ratio
    lowered = {"num_cycles": cycles / 2, "min_lr_rate": lowest}
    settings: dict[str, dict[str, Any]] = {
        "inverse_sqrt": {"timescale": options.lr_scheduler_timescale},
        "cosine_with_restarts": {"num_cycles": cycles},
        "polynomial": {"power": options.lr_scheduler_power},
        "cosine_with_min_lr": lowered,
        "cosine_warmup_with_min_lr": lowered,
        "warmup_stable_decay": {"num_cycles": cycles / 2, "num_decay_steps": decay, "min_lr_ratio": lowest or 0.0},
    }
    with _refusing(flag, "--lr_scheduler_args and its other options"):
        if name == "piecewise_constant":
            return cast(LRScheduler, get_piecewise_constant_schedule(optimizer, **arguments))
        if name == "constant":
            return cast(LRScheduler, get_constant_schedule(optimizer, **arguments))
        # What both give is refused, not decided.
        more = dict(**settings.get(name, {}), **arguments)
        return cast(LRScheduler, get_scheduler(name, optimizer, warmup, total_steps, more))


def learning_rates(optimizer: Optimizer, names: Sequence[str]) -> dict[str, float]:
    """What to log: `lr/unet` and the like, and for D-Adaptation and Prodigy also `lr/d*lr/unet`."""
    rates: dict[str, float] = {}
    for name, group in zip(names, optimizer.param_groups, strict=True):
        rates[f"lr/{name}"] = float(group["lr"])
        if "d" in group:
            rates[f"lr/d*lr/{name}"] = float(group["d"] * group["lr"])
    return rates


def _pairs(flag: str, words: Iterable[str]) -> dict[str, Any]:
    """The arguments in `key=value` words; values are Python's literals."""
    values = {}
    for key, text in key_values(flag, words).items():
        try:
            values[key] = ast.literal_eval(text)
        except (ValueError, SyntaxError, TypeError):
            kinds = "a number, True, False, None, a list nor a text in quotes"
            raise UsageError(f"{flag}: the value in '{key}={text}' is neither {kinds}") from None
    return values


def _imported(path: str, flag: str) -> Any:
    """The class at a dotted path."""
    module, _, name = path.rpartition(".")
    try:
        return getattr(importlib.import_module(module), name)
    except AttributeError:
        raise UsageError(f"{flag}: {module} has no {name}") from None
    except (ImportError, TypeError, ValueError) as error:
        raise UsageError(f"{flag} cannot be imported; check its spelling, or install its package: {error}") from None


@contextmanager
def _refusing(flag: str, where: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # each package has its own way to refuse
        raise UsageError(f"{flag} refuses its settings; check {where}: {error}") from error
