"""The log of a run and the figure of its losses."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from accelerate import Accelerator

from lorashrink.errors import InputError
from lorashrink.plots.loss import loss_curve, read_scalars


def test_what_accelerate_logs_is_read_back_and_drawn(tmp_path: Path) -> None:
    accelerator = Accelerator(cpu=True, log_with="tensorboard", project_dir=tmp_path)
    accelerator.init_trackers("network_train", config={"seed": 1})
    count = 1200  # more than tensorboard keeps unless told
    for step in range(1, count + 1):
        values = {
            "loss/current": 1 / step,
            "loss/average": torch.tensor(0.5),
            "lr/unet": 0.25,
            "max_norm/keys_scaled": 3,
        }
        accelerator.log(values, step=step)
    accelerator.log({"loss/epoch_average": 0.125}, step=1)
    accelerator.end_training()

    scalars = read_scalars(tmp_path)
    assert scalars["loss/current"] == [(step, pytest.approx(1 / step, rel=1e-6)) for step in range(1, count + 1)]
    assert scalars["max_norm/keys_scaled"][-1] == (count, 3.0)
    assert scalars["loss/epoch_average"] == [(1, 0.125)]
    assert loss_curve(scalars).axes[0].lines[0].get_xdata()[-1] == count


def test_a_folder_without_a_log_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=str(tmp_path)):
        read_scalars(tmp_path)
    with pytest.raises(InputError, match="missing"):
        read_scalars(tmp_path / "missing")


SCALARS = {
    "loss/current": [(1, 0.5), (2, 0.1), (3, 0.3)],
    "loss/average": [(1, 0.5), (2, 0.3), (3, 0.28)],
    "loss/epoch_average": [(1, 0.9)],
    "lr/unet": [(1, 1e-4), (2, 1e-4), (3, 0.0)],
    "lr/textencoder": [(1, 5e-5), (2, 5e-5), (3, 0.0)],
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
    _, rates = loss_curve(SCALARS | {"lr/textencoder": SCALARS["lr/unet"]}).axes
    assert [line.get_label() for line in rates.lines] == ["textencoder\nunet"]


def test_a_log_needs_losses_and_may_lack_rates() -> None:
    (losses,) = loss_curve({tag: SCALARS[tag] for tag in ("loss/current", "loss/average")}).axes
    assert losses.get_xlabel() == "optimizer step"
    with pytest.raises(InputError, match="loss/average"):
        loss_curve({"lr/unet": SCALARS["lr/unet"]})
