"""Optimizers by real steps, schedules by closed formulas, and what a wrong option says."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer

from lorashrink.errors import UsageError
from lorashrink.train.flags.options import Options, parse
from lorashrink.train.run.optimizers import (
    learning_rates,
    make_optimizer,
    make_scheduler,
)

RADAM_FREE, ADAMW_FREE, SGD_FREE = (f"schedulefree.{name}ScheduleFree" for name in ("RAdam", "AdamW", "SGD"))
D_ADAPT = "dadaptation.DAdaptAdam"
# All that is on this machine; by name, and some by path.
ORDINARY = ["AdamW", "Lion", "Adafactor", "Prodigy", D_ADAPT]
FINDS_ITS_RATE = ["Prodigy", D_ADAPT]
SCHEDULE_FREE = [RADAM_FREE, ADAMW_FREE, SGD_FREE]
NAMES = ["textencoder", "unet"]


def two_groups(text: float = 0.01, unet: float = 0.02) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(0)
    first, second = (Parameter(torch.randn(6, 4, generator=generator)) for _ in range(2))
    return [{"params": [first], "lr": text}, {"params": [second], "lr": unet}]


def distance(groups: list[dict[str, Any]]) -> Tensor:
    """A loss with its least at 3."""
    return sum(((group["params"][0] - 3) ** 2).mean() for group in groups)


def step(optimizer: Optimizer, groups: list[dict[str, Any]], times: int = 1) -> None:
    for _ in range(times):
        optimizer.zero_grad()
        distance(groups).backward()
        optimizer.step()


def values(groups: list[dict[str, Any]]) -> list[Tensor]:
    return [group["params"][0].detach().clone() for group in groups]


def same(left: list[Tensor], right: list[Tensor]) -> bool:
    return all(torch.equal(first, second) for first, second in zip(left, right, strict=True))


@pytest.mark.parametrize("name", [*ORDINARY, *SCHEDULE_FREE, "adamw", "PRODIGY", "lion"])
def test_every_optimizer_lowers_a_loss(name: str) -> None:
    rate = 1.0 if name in (*FINDS_ITS_RATE, "PRODIGY") else 0.01
    groups = two_groups(rate, rate)
    optimizer, description = make_optimizer(Options(optimizer_type=name, learning_rate=rate), groups)
    losses = []
    for _ in range(30):
        losses.append(distance(groups).item())
        step(optimizer, groups)
    assert min(losses) < losses[0]
    assert description.split("(")[0].lower().endswith(name.rpartition(".")[2].lower())


@pytest.mark.parametrize(("precision", "args"), [("bf16", ()), ("fp16", ()), ("bf16", ("foreach=True",))])
def test_one_kernel_on_a_gpu_does_all_parameters(device: str, precision: str, args: tuple[str, ...]) -> None:
    """Not with fp16, whose skipped steps accelerate sees, or by choice."""
    groups = two_groups()
    for group in groups:
        group["params"] = [Parameter(group["params"][0].detach().to(device))]
    chosen = Options(optimizer_type="AdamW", mixed_precision=precision, optimizer_args=args)
    optimizer, description = make_optimizer(chosen, groups)
    fused = device == "cuda" and precision == "bf16" and not args
    assert {bool(group["fused"]) for group in optimizer.param_groups} == {fused}
    assert "fused" not in description
    before = values(groups)
    step(optimizer, groups)
    assert not same(values(groups), before)


@pytest.mark.parametrize("name", ["AdamW8bit", "bitsandbytes.optim.PagedAdamW8bit"])
def test_a_missing_package_is_named(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # None makes the import fail as if the package were not there, on machines that have it too.
    for module in ("bitsandbytes", "bitsandbytes.optim"):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(UsageError, match=f"{name} cannot be imported; .* install its package: .*bitsandbytes"):
        make_optimizer(Options(optimizer_type=name), two_groups())


REFERENCES: dict[str, Callable[[list[dict[str, Any]]], Optimizer]] = {
    "": torch.optim.AdamW,
    "AdamW": torch.optim.AdamW,
    "torch.optim.Adagrad": torch.optim.Adagrad,
}


@pytest.mark.parametrize("name", REFERENCES)
def test_steps_are_those_of_the_class_that_is_named(name: str) -> None:
    ours, theirs = two_groups(), two_groups()
    optimizer, _ = make_optimizer(Options(optimizer_type=name), ours)
    step(optimizer, ours, 5)
    step(REFERENCES[name](theirs), theirs, 5)
    assert same(values(ours), values(theirs))


def test_groups_keep_their_learning_rates_and_are_not_changed() -> None:
    groups = two_groups(0.25, 0.5)
    optimizer, description = make_optimizer(Options(learning_rate=0.125), groups)
    assert learning_rates(optimizer, NAMES) == {"lr/textencoder": 0.25, "lr/unet": 0.5}
    assert description == "torch.optim.adamw.AdamW"
    assert all(set(group) == {"params", "lr"} for group in groups)


def test_a_group_without_a_learning_rate_takes_the_common_one() -> None:
    optimizer, _ = make_optimizer(Options(learning_rate=0.125), [{"params": two_groups()[0]["params"]}])
    assert learning_rates(optimizer, ["unet"]) == {"lr/unet": 0.125}


def test_arguments_are_pythons_literals() -> None:
    options = parse(["--optimizer_args", "betas=(0.5, 0.75)", "weight_decay=1e-3", "amsgrad=True", "foreach=None"])
    optimizer, description = make_optimizer(options, two_groups())
    assert {key: optimizer.defaults[key] for key in ("betas", "weight_decay", "amsgrad", "foreach")} == {
        "betas": (0.5, 0.75),
        "weight_decay": 0.001,
        "amsgrad": True,
        "foreach": None,
    }
    assert description == "torch.optim.adamw.AdamW(betas=(0.5, 0.75),weight_decay=0.001,amsgrad=True,foreach=None)"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"optimizer_args": ("weight_decay",)}, r"--optimizer_args: 'weight_decay' is no key=value pair"),
        ({"optimizer_args": ("=1",)}, "is no key=value pair"),
        ({"optimizer_args": ("betas=0.9,",)}, "AdamW refuses its settings; check --optimizer_args"),
        ({"optimizer_args": ("betas=(0.9",)}, r"the value in 'betas=\(0.9' is neither a number"),
        ({"optimizer_args": ("amsgrad=true",)}, "the value in 'amsgrad=true' is neither a number, True, False"),
        ({"optimizer_args": ("weight_decay=__import__('os')",)}, "is neither a number"),
        ({"optimizer_args": ("wd=0.1",)}, "AdamW refuses its settings; check --optimizer_args.*'wd'"),
        ({"optimizer_args": ("lr=0.1",)}, "AdamW refuses its settings.*'lr'"),
        ({"optimizer_args": ("weight_decay=-1",)}, "AdamW refuses its settings.*weight_decay"),
        ({"optimizer_type": "torch.optim.Nothing"}, "--optimizer_type torch.optim.Nothing: torch.optim has no Nothing"),
        ({"optimizer_type": "no_such_package.Best"}, "cannot be imported; check its spelling.*no_such_package"),
        ({"optimizer_type": ".Best"}, "cannot be imported"),
        ({"optimizer_type": "torch.optim.lr_scheduler"}, "refuses its settings"),
    ],
)
def test_wrong_optimizer_options_are_explained(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        make_optimizer(Options(**options), two_groups())


def test_the_old_names_of_optimizers_work(monkeypatch: pytest.MonkeyPatch) -> None:
    assert make_optimizer(Options(use_lion_optimizer=True), two_groups())[1] == "lion_pytorch.lion_pytorch.Lion"
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", None)
    with pytest.raises(UsageError, match="AdamW8bit cannot be imported"):
        make_optimizer(Options(use_8bit_adam=True), two_groups())


@pytest.mark.parametrize("name", FINDS_ITS_RATE)
def test_adaptive_optimizers_take_one_rate_near_one(name: str, caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(UsageError, match=f"{name} takes one learning rate.*--unet_lr and --text_encoder_lr"):
        make_optimizer(Options(optimizer_type=name), two_groups(1.0, 0.5))
    make_optimizer(Options(optimizer_type=name, learning_rate=1.0), two_groups(1.0, 1.0))
    assert not caplog.records
    make_optimizer(Options(optimizer_type=name), two_groups(1e-4, 1e-4))
    assert [record.getMessage().startswith(f"{name} finds the learning rate itself") for record in caplog.records] == [
        True
    ]


def test_the_adapted_rate_is_logged_beside_the_requested_one() -> None:
    groups = two_groups(0.5, 0.5)
    optimizer, _ = make_optimizer(
        Options(optimizer_type="Prodigy", learning_rate=0.5, optimizer_args=("d0=0.001",)), groups
    )
    assert learning_rates(optimizer, NAMES) == {
        "lr/textencoder": 0.5,
        "lr/d*lr/textencoder": 0.0005,
        "lr/unet": 0.5,
        "lr/d*lr/unet": 0.0005,
    }
    step(optimizer, groups, 20)
    assert learning_rates(optimizer, NAMES)["lr/d*lr/unet"] > 0.001


def test_a_missing_name_of_a_group_is_no_silent_gap() -> None:
    with pytest.raises(ValueError, match="zip"):
        learning_rates(make_optimizer(Options(), two_groups())[0], ["unet"])


class TestAdafactor:
    OPTIONS = Options(optimizer_type="Adafactor", learning_rate=0.01, lr_scheduler="cosine")

    def test_sets_its_own_rate_says_so_and_brings_its_schedule(self, caplog: pytest.LogCaptureFixture) -> None:
        groups = two_groups()
        optimizer, description = make_optimizer(self.OPTIONS, groups)
        assert description == "transformers.optimization.Adafactor(relative_step=True)"
        assert "have no effect" in caplog.text
        scheduler = make_scheduler(self.OPTIONS, optimizer, 10)
        assert learning_rates(optimizer, NAMES) == {"lr/textencoder": 0.01, "lr/unet": 0.01}
        step(optimizer, groups)
        root_mean_square = [float(value.square().mean().sqrt()) for value in values(two_groups())]
        scheduler.step()
        # Shazeer and Stern 2018: the first relative step is 0.01, times the weights' root mean square.
        rates = list(learning_rates(optimizer, NAMES).values())
        assert rates == pytest.approx([0.01 * size for size in root_mean_square], rel=1e-5)

    def test_warming_up_implies_relative_steps(self) -> None:
        options = Options(optimizer_type="Adafactor", optimizer_args=("relative_step=False", "warmup_init=True"))
        assert make_optimizer(options, two_groups())[0].defaults["relative_step"] is True

    def test_takes_rates_and_any_schedule_without_relative_steps(self, caplog: pytest.LogCaptureFixture) -> None:
        options = Options(
            optimizer_type="Adafactor",
            optimizer_args=("relative_step=False",),
            lr_scheduler="linear",
            lr_warmup_steps=2,
        )
        optimizer, _ = make_optimizer(options, two_groups())
        scheduler = make_scheduler(options, optimizer, 10)
        step(optimizer, two_groups())
        scheduler.step()
        assert learning_rates(optimizer, NAMES) == {"lr/textencoder": 0.005, "lr/unet": 0.01}
        assert not caplog.records

    @pytest.mark.parametrize("arguments", [(), ("relative_step=False",)])
    def test_its_schedule_goes_with_nothing_else_and_has_no_warm_up(self, arguments: tuple[str, ...]) -> None:
        warmed = Options(
            optimizer_type="Adafactor", optimizer_args=arguments, lr_scheduler="adafactor", lr_warmup_steps=5
        )
        with pytest.raises(UsageError, match=r"no warm-up|relative_step=True"):
            make_scheduler(warmed, make_optimizer(warmed, two_groups())[0], 10)


class TestScheduleFree:
    @pytest.mark.parametrize("name", SCHEDULE_FREE)
    def test_training_and_using_the_weights_are_two_modes(self, name: str) -> None:
        groups = two_groups()
        optimizer, _ = make_optimizer(Options(optimizer_type=name), groups)
        step(optimizer, groups, 8)
        training = values(groups)
        optimizer.eval()
        used = values(groups)
        assert not same(training, used)
        optimizer.eval()
        assert same(used, values(groups))
        optimizer.train()
        for back, before in zip(values(groups), training, strict=True):
            torch.testing.assert_close(back, before)

    def test_the_modes_reach_through_the_wrapper_of_accelerate(self) -> None:
        groups = two_groups()
        optimizer, _ = make_optimizer(Options(optimizer_type=ADAMW_FREE), groups)
        prepared = Accelerator(cpu=True).prepare(optimizer)
        step(prepared, groups, 8)
        training = values(groups)
        prepared.eval()
        assert not same(training, values(groups))

    @pytest.mark.parametrize("name", ORDINARY)
    def test_other_optimizers_have_no_modes(self, name: str) -> None:
        groups = two_groups(1.0, 1.0)
        optimizer, _ = make_optimizer(Options(optimizer_type=name, learning_rate=1.0), groups)
        step(optimizer, groups, 2)
        before = values(groups)
        prepared = Accelerator(cpu=True).prepare(optimizer)
        prepared.eval()
        prepared.train()
        assert same(before, values(groups))

    def test_the_schedule_changes_nothing_and_says_what_it_leaves_out(self, caplog: pytest.LogCaptureFixture) -> None:
        def run(scheduled: bool) -> list[Tensor]:
            groups = two_groups()
            options = Options(optimizer_type=SGD_FREE)
            optimizer, _ = make_optimizer(options, groups)
            scheduler = make_scheduler(options, optimizer, 5) if scheduled else None
            for _ in range(8):
                step(optimizer, groups)
                if scheduler:
                    scheduler.step()
            return values(groups)

        assert same(run(True), run(False))
        assert not caplog.records
        options = Options(optimizer_type=SGD_FREE, lr_scheduler="cosine", lr_warmup_steps=5)
        make_scheduler(options, make_optimizer(options, two_groups())[0], 5)
        assert "SGDScheduleFree needs no schedule: --lr_scheduler and --lr_warmup_steps have no effect" in caplog.text


TOTAL = 20
RATE = 0.5


def course(options: Options, total: int = TOTAL) -> list[float]:
    """The learning rate of each step from the first to the one after the last, as a share of the given rate."""
    groups = two_groups(RATE, RATE)
    optimizer, _ = make_optimizer(options, groups)
    scheduler = make_scheduler(options, optimizer, total)
    rates = []
    for _ in range(total + 1):
        rates.append(learning_rates(optimizer, NAMES)["lr/unet"] / RATE)
        step(optimizer, groups)
        scheduler.step()
    return rates


def warmed(after: Callable[[float], float], warmup: int = 4) -> Callable[[int], float]:
    """A straight rise from 0, and then a function of the share of the remaining steps."""
    return lambda step: step / warmup if step < warmup else after((step - warmup) / (TOTAL - warmup))


def half_cosine(share: float) -> float:
    return (1 + math.cos(math.pi * share)) / 2


W = {"lr_warmup_steps": 4}
# The formulas are the definitions in transformers' and diffusers' documentation.
COURSES: dict[str, tuple[dict[str, Any], Callable[[int], float]]] = {
    "constant": ({}, lambda step: 1),
    "constant_with_warmup": (W, warmed(lambda share: 1)),
    "linear": (W, warmed(lambda share: 1 - share)),
    "cosine": (W, warmed(half_cosine)),
    "cosine without warm-up": ({}, lambda step: half_cosine(step / TOTAL)),
    "cosine_with_restarts": (
        W | {"lr_scheduler_num_cycles": 3},
        warmed(lambda share: 0 if share == 1 else half_cosine(math.fmod(3 * share, 1))),
    ),
    "polynomial": (
        W | {"lr_scheduler_power": 2.0, "lr_scheduler_args": ("lr_end=0.05",)},
        warmed(lambda share: 0.1 + 0.9 * (1 - share) ** 2),
    ),
    "inverse_sqrt": (
        W | {"lr_scheduler_timescale": 9},
        lambda step: step / 4 if step < 4 else 1 / math.sqrt((step + 9 - 4) / 9),
    ),
    "cosine_with_min_lr": (
        W | {"lr_scheduler_min_lr_ratio": 0.2},
        warmed(lambda share: 0.2 + 0.8 * half_cosine(share)),
    ),
    "cosine_warmup_with_min_lr": (
        {"lr_scheduler_min_lr_ratio": 0.2},
        lambda step: 0.2 + 0.8 * half_cosine((step + 1) / TOTAL),
    ),
    "warmup_stable_decay": (
        W | {"lr_decay_steps": 8, "lr_scheduler_min_lr_ratio": 0.1},
        lambda step: 0.1 + 0.9 * (step / 4 if step < 4 else 1 if step < 12 else half_cosine((step - 12) / 8)),
    ),
    "piecewise_constant": (
        {"lr_scheduler_args": ("step_rules='1:5,0.5:12,0.25'",)},
        lambda step: 1 if step < 5 else 0.5 if step < 12 else 0.25,
    ),
}


@pytest.mark.parametrize("name", COURSES)
def test_schedules_follow_their_formulas(name: str) -> None:
    settings, formula = COURSES[name]
    rates = course(Options(learning_rate=RATE, lr_scheduler=name.split()[0], **settings))
    assert rates == pytest.approx([formula(step) for step in range(TOTAL + 1)], abs=1e-7)


@pytest.mark.parametrize("warmup", ["4", "0.2", "20%"])
def test_warm_up_is_a_number_of_steps_or_a_share_of_all(warmup: str) -> None:
    rates = course(parse(["--lr_scheduler=linear", f"--lr_warmup_steps={warmup}", f"--learning_rate={RATE}"]))
    assert rates == pytest.approx(course(Options(learning_rate=RATE, lr_scheduler="linear", lr_warmup_steps=4)))
    assert rates[:5] == [0, 0.25, 0.5, 0.75, 1]


def test_decay_is_a_number_of_steps_or_a_share_of_all() -> None:
    steps, share = (
        course(Options(learning_rate=RATE, lr_scheduler="warmup_stable_decay", lr_decay_steps=decay))
        for decay in (5, 0.25)
    )
    assert steps == share
    assert steps.count(1) == TOTAL - 5 + 1


def test_cosine_has_no_use_for_a_number_of_cycles() -> None:
    several = Options(learning_rate=RATE, lr_scheduler="cosine", lr_scheduler_num_cycles=7)
    assert course(several) == course(Options(learning_rate=RATE, lr_scheduler="cosine"))


def test_each_group_follows_the_schedule_from_its_own_rate() -> None:
    options = Options(lr_scheduler="linear")
    groups = two_groups(0.25, 0.5)
    optimizer, _ = make_optimizer(options, groups)
    scheduler = make_scheduler(options, optimizer, 4)
    step(optimizer, groups)
    scheduler.step()
    assert learning_rates(optimizer, NAMES) == {"lr/textencoder": 0.1875, "lr/unet": 0.375}


@pytest.mark.parametrize("path", ["StepLR", "torch.optim.lr_scheduler.StepLR"])
def test_a_schedule_may_be_named_by_its_class(path: str) -> None:
    options = Options(
        learning_rate=RATE,
        lr_scheduler="cosine",
        lr_scheduler_type=path,
        lr_scheduler_args=("step_size=5", "gamma=0.5"),
    )
    assert course(options) == pytest.approx([0.5 ** (step // 5) for step in range(TOTAL + 1)])


@pytest.mark.parametrize("name", FINDS_ITS_RATE)
def test_a_schedule_scales_what_an_optimizer_finds(name: str) -> None:
    options = {"lr_scheduler": "cosine_with_min_lr", "lr_scheduler_min_lr_ratio": 0.5}
    rates = course(Options(optimizer_type=name, learning_rate=RATE, **options))
    assert rates == pytest.approx([0.5 + 0.5 * half_cosine(step / TOTAL) for step in range(TOTAL + 1)])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr_scheduler": "piecewise_constant"}, "--lr_scheduler piecewise_constant refuses.*step_rules"),
        ({"lr_scheduler": "cosine_with_min_lr"}, "refuses its settings; check --lr_scheduler_args and its other"),
        ({"lr_scheduler": "constant", "lr_scheduler_args": ("gamma=1",)}, "constant refuses.*gamma"),
        (
            {"lr_scheduler": "linear", "lr_scheduler_args": ("gamma",)},
            "--lr_scheduler_args: 'gamma' is no key=value pair",
        ),
        ({"lr_scheduler_type": "StepLR"}, "--lr_scheduler_type StepLR refuses.*step_size"),
        ({"lr_scheduler_type": "Nothing"}, "--lr_scheduler_type Nothing: torch.optim.lr_scheduler has no Nothing"),
        ({"lr_scheduler_type": "no_such_package.X"}, "--lr_scheduler_type no_such_package.X cannot be imported"),
    ],
)
def test_a_wrong_schedule_says_what_is_wrong(options: dict[str, Any], message: str) -> None:
    chosen = Options(learning_rate=RATE, **options)
    with pytest.raises(UsageError, match=message):
        make_scheduler(chosen, make_optimizer(chosen, two_groups())[0], TOTAL)
