"""Levels of quality, and the errors of the weights that stand for them where nothing can predict pictures."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from lorashrink.errors import UsageError


@dataclass(frozen=True, slots=True)
class Level:
    """How alike pictures are to be, as PSNR in dB against those of the original adapter."""

    name: str
    mean: float  # predicted, over all pictures
    worst: float  # of the pictures that are drawn


LEVELS: Mapping[str, Level] = {
    level.name: level for level in (Level("same", 50, 42), Level("high", 40, 33), Level("small", 33, 27))
}

_LOWEST, _HIGHEST = 10.0, 80.0  # dB: below, pictures have nothing in common; above, half precision decides


def level_of(quality: str | float) -> Level:
    """The level of a name or of a number of dB. Raises UsageError."""
    if quality in LEVELS:
        return LEVELS[str(quality)]
    try:
        number = float(str(quality).lower().removesuffix("db"))
    except ValueError:
        number = 0.0
    if not _LOWEST <= number <= _HIGHEST:
        raise UsageError(
            f"--quality {quality}: is {', '.join(LEVELS)}, or dB from {_LOWEST:g} to {_HIGHEST:g}, such as 40."
        )
    return Level(f"{number:g} dB", number, number)


# dB of the mean picture at which an error of 100 % would be, by the line dB = this - 20·log10(error). Of the files in
# docs/evidence.md with more than 28 dB, 13 of 15 by `fro_ckpt,bytes` and 6 of 8 by `energy` lie above their line.
BASE_LINE, ADAPTER_LINE = 20.0, 17.0


def error_for(level: Level, line: float) -> float:
    """The error of the weights, as a share of their norm, that stands for a level."""
    return float(10 ** ((line - level.mean) / 20))
