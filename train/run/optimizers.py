"""Optimizers and schedules of the learning rate, by sd-scripts' names."""

from __future__ import annotations

import ast
import importlib
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeGuard, cast, runtime_checkable

import torch
from diffusers.optimization import get_piecewise_constant_schedule
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from transformers.optimization import (
    Adafactor,
    AdafactorSchedule,
    get_constant_schedule,
    get_constant_schedule_with_warmup,
    get_cosine_schedule_with_warmup,
    get_cosine_with_hard_restarts_schedule_with_warmup,
    get_cosine_with_min_lr_schedule_with_warmup,
    get_cosine_with_min_lr_schedule_with_warmup_lr_rate,
    get_inverse_sqrt_schedule,
    get_linear_schedule_with_warmup,
    get_polynomial_decay_schedule_with_warmup,
    get_wsd_schedule,
)

from lorashrink.errors import UsageError, nearest
from lorashrink.train.flags.options import Options, key_values

_log = logging.getLogger(__name__)


@runtime_checkable
class _ScheduleFree(Protocol):
    """What tells a schedule-free optimizer from others: it keeps two versions of the weights."""

    def train(self) -> None: ...

    def eval(self) -> None: ...


@dataclass(frozen=True, slots=True)
class _Known:
    """Where an optimizer's class is, what to install for it, and the arguments that make it what its name says."""

    path: str
    package: str | None = None
    arguments: Mapping[str, Any] = field(default_factory=dict)


_NESTEROV = {"momentum": 0.9, "nesterov": True}

OPTIMIZERS: Mapping[str, _Known] = {
    "AdamW": _Known("torch.optim.AdamW"),
    "AdamW8bit": _Known("bitsandbytes.optim.AdamW8bit", "bitsandbytes"),
    "PagedAdamW": _Known("bitsandbytes.optim.PagedAdamW", "bitsandbytes"),
    "PagedAdamW8bit": _Known("bitsandbytes.optim.PagedAdamW8bit", "bitsandbytes"),
    "PagedAdamW32bit": _Known("bitsandbytes.optim.PagedAdamW32bit", "bitsandbytes"),
    "Lion": _Known("lion_pytorch.Lion", "lion-pytorch"),
    "Lion8bit": _Known("bitsandbytes.optim.Lion8bit", "bitsandbytes"),
    "PagedLion8bit": _Known("bitsandbytes.optim.PagedLion8bit", "bitsandbytes"),
    "SGDNesterov": _Known("torch.optim.SGD", None, _NESTEROV),
    "SGDNesterov8bit": _Known("bitsandbytes.optim.SGD8bit", "bitsandbytes", _NESTEROV),
    "DAdaptation": _Known("dadaptation.experimental.DAdaptAdamPreprint", "dadaptation"),
    "DAdaptAdamPreprint": _Known("dadaptation.experimental.DAdaptAdamPreprint", "dadaptation"),
    "DAdaptAdaGrad": _Known("dadaptation.DAdaptAdaGrad", "dadaptation"),
    "DAdaptAdam": _Known("dadaptation.DAdaptAdam", "dadaptation"),
    "DAdaptAdan": _Known("dadaptation.DAdaptAdan", "dadaptation"),
    "DAdaptAdanIP": _Known("dadaptation.experimental.DAdaptAdanIP", "dadaptation"),
    "DAdaptLion": _Known("dadaptation.DAdaptLion", "dadaptation"),
    "DAdaptSGD": _Known("dadaptation.DAdaptSGD", "dadaptation"),
    "Prodigy": _Known("prodigyopt.Prodigy", "prodigyopt"),
    "Adafactor": _Known("transformers.optimization.Adafactor"),
    "RAdamScheduleFree": _Known("schedulefree.RAdamScheduleFree", "schedulefree"),
    "AdamWScheduleFree": _Known("schedulefree.AdamWScheduleFree", "schedulefree"),
    "SGDScheduleFree": _Known("schedulefree.SGDScheduleFree", "schedulefree"),
}


def optimizer_name(options: Options) -> str:
    """The optimizer's name, with its aliases resolved.

    Raises:
        UsageError: it is named twice.
    """
    named = {
        "--optimizer_type": options.optimizer_type,
        "--use_8bit_adam": options.use_8bit_adam and "AdamW8bit",
        "--use_lion_optimizer": options.use_lion_optimizer and "Lion",
    }
    given = {flag: name for flag, name in named.items() if name}
    if len(given) > 1:
        raise UsageError(f"{' and '.join(given)} name different optimizers; leave one of them")
    return str(next(iter(given.values()), "AdamW"))


def make_optimizer(options: Options, groups: Sequence[Mapping[str, Any]]) -> tuple[Optimizer, str]:
    """The optimizer, ready for its first step, and its description for metadata: `module.Class(key=value,...)`.

    Args:
        groups: parameter groups, with their learning rates. They are not changed.

    Raises:
        UsageError: no such optimizer, its package is missing, or it refuses its arguments.
    """
    name = optimizer_name(options)
    flag, known = f"--optimizer_type {name}", _known(name)
    kind = _imported(known.path, flag, known.package)
    arguments = {**known.arguments, **_pairs("--optimizer_args", options.optimizer_args)}
    relative = kind is Adafactor and (arguments.get("relative_step", True) or arguments.get("warmup_init", False))
    if relative:
        arguments["relative_step"] = True
        _log.warning(
            "Adafactor sets the learning rate itself: --learning_rate, --unet_lr, --text_encoder_lr and the schedule "
            "have no effect. With --optimizer_args relative_step=False they have"
        )
    own = [{key: value for key, value in group.items() if not (relative and key == "lr")} for group in groups]
    rate = {"lr": None if relative else options.learning_rate}
    made: Optimizer = _made(kind, own, rate, arguments, flag, "--optimizer_args")
    if "d" in made.defaults:
        _check_adaptive_rates(name, {group["lr"] for group in made.param_groups})
    train_mode(made)
    shown = ",".join(f"{key}={value}" for key, value in arguments.items())
    return made, f"{kind.__module__}.{kind.__name__}" + (f"({shown})" if shown else "")


def make_scheduler(options: Options, optimizer: Optimizer, total_steps: int) -> LRScheduler:
    """The schedule of the learning rate.

    Args:
        optimizer: from `make_optimizer`, not yet wrapped by accelerate.
        total_steps: how often the schedule is stepped; accelerate does so once per process and optimizer step.

    Raises:
        UsageError: no such schedule, it does not go with the optimizer, or it refuses its arguments.
    """
    if _is_schedule_free(optimizer):
        _warn_of_needless_schedule(options)
        return cast(LRScheduler, get_constant_schedule(optimizer))
    if isinstance(optimizer, Adafactor) and optimizer.defaults["relative_step"]:
        _refuse_warmup(options, "the schedule of Adafactor")
        return cast(LRScheduler, AdafactorSchedule(optimizer, options.learning_rate))
    arguments = _pairs("--lr_scheduler_args", options.lr_scheduler_args)
    if path := options.lr_scheduler_type:
        flag = f"--lr_scheduler_type {path}"
        _refuse_warmup(options, flag)
        kind = _imported(path if "." in path else f"torch.optim.lr_scheduler.{path}", flag)
        return cast(LRScheduler, _made(kind, optimizer, {}, arguments, flag, "--lr_scheduler_args"))
    kind, settings = _schedule(options, total_steps)
    flag = f"--lr_scheduler {options.lr_scheduler}"
    if "num_warmup_steps" not in settings:
        _refuse_warmup(options, flag)
    return cast(
        LRScheduler, _made(kind, optimizer, settings, arguments, flag, "--lr_scheduler_args and its other options")
    )


def train_mode(optimizer: Optimizer) -> None:
    """Put the weights where a schedule-free optimizer trains them. Other optimizers have but one place."""
    if _is_schedule_free(optimizer):
        optimizer.train()


def eval_mode(optimizer: Optimizer) -> None:
    """Put the weights where a schedule-free optimizer wants them used: before saving and before samples."""
    if _is_schedule_free(optimizer):
        optimizer.eval()


def learning_rates(optimizer: Optimizer, names: Sequence[str]) -> dict[str, float]:
    """What to log: `lr/unet` and the like, and for D-Adaptation and Prodigy, which scale it by d, also `lr/d*lr/unet`.

    Args:
        names: of the optimizer's groups, in their order.
    """
    rates: dict[str, float] = {}
    for name, group in zip(names, optimizer.param_groups, strict=True):
        rates[f"lr/{name}"] = float(group["lr"])
        if "d" in group:
            rates[f"lr/d*lr/{name}"] = float(group["d"] * group["lr"])
    return rates


def _is_schedule_free(optimizer: Optimizer) -> TypeGuard[_ScheduleFree]:
    # accelerate's wrapper has these methods too, and there they pass the call on, or do nothing.
    return isinstance(optimizer, _ScheduleFree)


def _known(name: str) -> _Known:
    """The optimizer of a name in any case, of a class in torch.optim, or of a dotted path."""
    if "." in name:
        return _Known(name)
    ours = {each.lower(): known for each, known in OPTIMIZERS.items()}
    torchs = {each.lower(): _Known(f"torch.optim.{each}") for each in vars(torch.optim) if each[0].isupper()}
    every = torchs | ours
    if name.lower() not in every:
        raise UsageError(f"--optimizer_type {name}: there is no such optimizer{_hint(name, OPTIMIZERS)}")
    return every[name.lower()]


def _schedule(options: Options, total: int) -> tuple[Callable[..., LRScheduler], dict[str, Any]]:
    """The maker of the named schedule and its settings."""
    warmed = {"num_warmup_steps": _steps(options.lr_warmup_steps, total)}
    timed = warmed | {"num_training_steps": total}
    cycles, lowest = options.lr_scheduler_num_cycles, options.lr_scheduler_min_lr_ratio
    lowered = timed | {"num_cycles": cycles / 2, "min_lr_rate": lowest}
    decay = {"num_decay_steps": _steps(options.lr_decay_steps, total), "min_lr_ratio": lowest or 0.0}
    schedules: dict[str, tuple[Callable[..., LRScheduler], dict[str, Any]]] = {
        "constant": (get_constant_schedule, {}),
        "piecewise_constant": (get_piecewise_constant_schedule, {}),
        "constant_with_warmup": (get_constant_schedule_with_warmup, warmed),
        "inverse_sqrt": (get_inverse_sqrt_schedule, warmed | {"timescale": options.lr_scheduler_timescale}),
        "linear": (get_linear_schedule_with_warmup, timed),
        "cosine": (get_cosine_schedule_with_warmup, timed),
        "cosine_with_restarts": (get_cosine_with_hard_restarts_schedule_with_warmup, timed | {"num_cycles": cycles}),
        "polynomial": (get_polynomial_decay_schedule_with_warmup, timed | {"power": options.lr_scheduler_power}),
        "cosine_with_min_lr": (get_cosine_with_min_lr_schedule_with_warmup, lowered),
        "cosine_warmup_with_min_lr": (get_cosine_with_min_lr_schedule_with_warmup_lr_rate, lowered),
        "warmup_stable_decay": (get_wsd_schedule, timed | {"num_cycles": cycles / 2} | decay),
    }
    if options.lr_scheduler == "adafactor":
        raise UsageError(
            "--lr_scheduler adafactor goes only with --optimizer_type Adafactor and its relative_step=True"
        )
    if options.lr_scheduler not in schedules:
        raise UsageError(
            f"--lr_scheduler {options.lr_scheduler}: there is no such schedule{_hint(options.lr_scheduler, schedules)}"
        )
    return schedules[options.lr_scheduler]


def _steps(value: float, total: int) -> int:
    """A number of steps, from that number or from a share of all steps."""
    return int(value * total) if isinstance(value, float) else value


def _refuse_warmup(options: Options, what: str) -> None:
    if options.lr_warmup_steps:
        raise UsageError(f"{what} has no warm-up; leave out --lr_warmup_steps, or choose another --lr_scheduler")


def _warn_of_needless_schedule(options: Options) -> None:
    if options.lr_scheduler != "constant" or options.lr_scheduler_type or options.lr_warmup_steps:
        _log.warning(
            "%s needs no schedule: --lr_scheduler and --lr_warmup_steps have no effect. "
            "--optimizer_args warmup_steps=N is its own warm-up",
            optimizer_name(options),
        )


def _check_adaptive_rates(name: str, rates: set[float]) -> None:
    """Prodigy and the D-Adaptation family find one factor for all groups, and multiply it by one learning rate."""
    if len(rates) > 1:
        raise UsageError(
            f"--optimizer_type {name} takes one learning rate for everything; "
            "give --unet_lr and --text_encoder_lr the same value, or leave both out"
        )
    if max(rates) <= 0.1:
        _log.warning(
            "%s finds the learning rate itself and multiplies it by the one that it is given, which is %g; 1 is usual",
            name,
            max(rates),
        )


def _pairs(flag: str, words: Iterable[str]) -> dict[str, Any]:
    """The arguments in `key=value` words; values are Python's literals."""
    values = {}
    for key, text in key_values(flag, words).items():
        try:
            values[key] = ast.literal_eval(text)
        except (ValueError, SyntaxError, TypeError):
            raise UsageError(
                f"{flag}: the value in '{key}={text}' is neither a number, True, False, None, a list nor a text in "
                "quotes"
            ) from None
    return values


def _imported(path: str, flag: str, package: str | None = None) -> Any:
    """The class at a dotted path; `package` is what to install when it is missing."""
    module, _, name = path.rpartition(".")
    try:
        return getattr(importlib.import_module(module), name)
    except AttributeError:
        newer = f"; a newer version may have it: pip install -U {package}" if package else ""
        raise UsageError(f"{flag}: {module} has no {name}{newer}") from None
    except (ImportError, TypeError, ValueError) as error:
        if package:
            raise UsageError(f"{flag.split()[-1]} needs a package: pip install {package} ({error})") from None
        raise UsageError(f"{flag} cannot be imported; check its spelling, or install its package: {error}") from None


def _made(
    kind: Callable[..., Any],
    subject: object,
    settings: Mapping[str, Any],
    arguments: Mapping[str, Any],
    flag: str,
    where: str,
) -> Any:
    """Call a class of any package; `settings` are ours, `arguments` the user's, and neither may repeat the other."""
    try:
        return kind(subject, **settings, **arguments)
    except Exception as error:  # each package has its own way to refuse
        raise UsageError(f"{flag} refuses its settings; check {where}: {error}") from error


def _hint(name: str, names: Iterable[str]) -> str:
    by_lower = {known.lower(): known for known in names}
    near = nearest(name.lower(), by_lower)
    return f"; did you mean {by_lower[near]}?" if near else f". There are {', '.join(by_lower.values())}"
