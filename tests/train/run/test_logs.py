"""Logs: their folder, what accelerate writes there read again, and the figure of it."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator

from lorashrink.errors import InputError
from lorashrink.plots.loss import loss_curve
from lorashrink.train.flags.options import Options
from lorashrink.train.run.loop import TRACKER, Tag, log_folder_of, read_scalars, save_loss_curve, tracker_of

NOW = datetime(2026, 1, 2, 3, 4, 5)


@pytest.mark.parametrize(("prefix", "name"), [("xl-locon", "xl-locon20260102030405"), (None, "20260102030405")])
def test_the_folder_of_a_run_is_named_by_prefix_and_time(prefix: str | None, name: str) -> None:
    assert log_folder_of(Options(logging_dir="logs", log_prefix=prefix), NOW) == Path("logs") / name


def test_a_prefix_alone_logs_nothing() -> None:
    options = Options(log_prefix="xl-locon")
    assert log_folder_of(options, NOW) is None
    assert tracker_of(options) is None


@pytest.mark.parametrize("logger", ["tensorboard", "all", None])
def test_a_folder_without_a_logger_means_tensorboard(logger: str | None) -> None:
    assert tracker_of(Options(logging_dir="logs", log_with=logger)) == (logger or "tensorboard")


def test_what_accelerate_logs_is_read_back_and_drawn(tmp_path: Path) -> None:
    folder = log_folder_of(Options(logging_dir=str(tmp_path), log_prefix="x"), NOW)
    accelerator = Accelerator(cpu=True, log_with="tensorboard", project_dir=folder)
    accelerator.init_trackers(TRACKER, config={"seed": 1})
    count = 1200  # more than tensorboard keeps unless told
    for step in range(1, count + 1):
        values = {Tag.LOSS: 1 / step, Tag.AVERAGE_LOSS: torch.tensor(0.5), Tag.UNET_RATE: 0.25, Tag.SCALED_LAYERS: 3}
        accelerator.log(values, step=step)
    accelerator.log({Tag.EPOCH_LOSS: 0.125}, step=1)
    accelerator.end_training()

    assert [entry.name for entry in folder.iterdir()] == ["network_train"]
    scalars = read_scalars(folder)
    assert scalars["loss/current"] == [(step, pytest.approx(1 / step, rel=1e-6)) for step in range(1, count + 1)]
    assert scalars["max_norm/keys_scaled"][-1] == (count, 3.0)
    assert scalars["loss/epoch_average"] == [(1, 0.125)]
    assert loss_curve(scalars).axes[0].lines[0].get_xdata()[-1] == count
    assert save_loss_curve(folder) == folder / "loss.png"
    assert (folder / "loss.png").read_bytes()[:4] == b"\x89PNG"


def test_a_folder_without_a_log_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=str(tmp_path)):
        read_scalars(tmp_path)
    with pytest.raises(InputError, match="missing"):
        read_scalars(tmp_path / "missing")


SCALARS = {
    Tag.LOSS: [(1, 0.5), (2, 0.1), (3, 0.3)],
    Tag.AVERAGE_LOSS: [(1, 0.5), (2, 0.3), (3, 0.28)],
    Tag.EPOCH_LOSS: [(1, 0.9)],
    Tag.UNET_RATE: [(1, 1e-4), (2, 1e-4), (3, 0.0)],
    Tag.TEXT_ENCODER_RATE: [(1, 5e-5), (2, 5e-5), (3, 0.0)],
}


def test_the_average_is_bold_over_pale_losses() -> None:
    losses, rates = loss_curve(SCALARS).axes
    pale, bold = losses.lines
    assert list(pale.get_xydata()[:, 1]) == [0.5, 0.1, 0.3]
    assert list(bold.get_xydata()[:, 1]) == [0.5, 0.3, 0.28]
    assert bold.get_linewidth() > pale.get_linewidth()
    assert [text.get_text() for text in losses.texts] == ["average 0.28"]
    assert losses.get_ylabel() == "loss (mean squared error)"
    assert rates.get_xlabel() == "optimizer step"


def test_learning_rates_have_a_panel_and_names() -> None:
    _, rates = loss_curve(SCALARS).axes
    assert {line.get_label(): list(line.get_ydata()) for line in rates.lines} == {
        "unet": [1e-4, 1e-4, 0.0],
        "textencoder": [5e-5, 5e-5, 0.0],
    }
    assert [text.get_text() for text in rates.get_legend().get_texts()] == ["textencoder", "unet"]


def test_equal_learning_rates_are_one_line_with_both_names() -> None:
    _, rates = loss_curve(SCALARS | {Tag.TEXT_ENCODER_RATE: SCALARS[Tag.UNET_RATE]}).axes
    assert [line.get_label() for line in rates.lines] == ["textencoder\nunet"]


def test_a_log_needs_losses_and_may_lack_rates() -> None:
    (losses,) = loss_curve({tag: SCALARS[tag] for tag in (Tag.LOSS, Tag.AVERAGE_LOSS)}).axes
    assert losses.get_xlabel() == "optimizer step"
    with pytest.raises(InputError, match="loss/average"):
        loss_curve({Tag.UNET_RATE: SCALARS[Tag.UNET_RATE]})
