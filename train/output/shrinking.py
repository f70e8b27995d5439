"""Straight to small: each saved adapter is shrunk as soon as it is written."""

from __future__ import annotations

import logging
from pathlib import Path

from lorashrink.errors import LorashrinkError
from lorashrink.shrinking.run import resize
from lorashrink.train.flags.options import Options

_log = logging.getLogger(__name__)


def shrink(saved: Path, options: Options) -> list[Path]:
    """Write `saved` shrunk by each recipe of --shrink beside it, and return the new files.

    A failure is a warning: training, and the adapter that was saved, must not suffer from it.
    """
    if not options.shrink:
        return []
    try:
        # The GPU's memory belongs to training, and two cores do this in seconds.
        report = resize(
            saved, base=options.pretrained_model_name_or_path, recipes=options.shrink, device="cpu", force=True
        )
    except LorashrinkError as error:
        _log.warning("%s was saved but not shrunk: %s", saved.name, error)
        return []
    for failure in report.failed:
        _log.warning("%s was saved but not shrunk: %s", saved.name, failure.error)
    for result in report.results:
        _log.info(
            "%s: %.2f MB, shrunk by %s to %.2f MB (error %.2f %%): %s",
            saved.name,
            result.bytes_before / 1e6,
            result.recipe,
            result.bytes_after / 1e6,
            100 * result.relative_error,
            Path(result.output).name,
        )
    return [Path(result.output) for result in report.results]
