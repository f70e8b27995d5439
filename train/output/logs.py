"""Where a run logs and under which names, and the figure of its losses."""

from __future__ import annotations

import io
from collections import defaultdict
from datetime import datetime
from enum import StrEnum
from pathlib import Path

from lorashrink.errors import InputError
from lorashrink.files.disk import write_bytes
from lorashrink.plots.loss import loss_curve
from lorashrink.train.flags.options import Options

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


def log_folder(options: Options, now: datetime) -> Path | None:
    """The folder of a run that starts now; None if nothing is logged to a folder."""
    if options.logging_dir is None:
        return None
    return Path(options.logging_dir) / f"{options.log_prefix or ''}{now:%Y%m%d%H%M%S}"


def tracker(options: Options) -> str | None:
    """What accelerate logs with: --log_with, or tensorboard if there is a folder for it."""
    return options.log_with or ("tensorboard" if options.logging_dir else None)


def read_scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """What tensorboard logged below a run's folder: tag -> (step, value), in the order of steps.

    Raises:
        InputError: the folder holds no log.
    """
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
    """Draw the losses and learning rates that were logged below a run's folder, as loss.png in it.

    Raises:
        InputError: no losses lie in the folder.
        OutputError: the figure cannot be written.
    """
    data = io.BytesIO()
    loss_curve(read_scalars(folder)).savefig(data, format="png")
    path = folder / "loss.png"
    write_bytes(path, data.getvalue())
    return path
