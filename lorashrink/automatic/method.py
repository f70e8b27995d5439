"""What the dimensions of an adapter are compared with, and the recipes that follow from it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from lorashrink.recipes.levels import ADAPTER_LINE, BASE_LINE, Level, error_for
from lorashrink.text import percent_text

if TYPE_CHECKING:
    from lorashrink.bases import Base


@dataclass(frozen=True, slots=True)
class Method:
    """What the dimensions of an adapter are compared with."""

    name: str  # "calibrated", "base" or "adapter"
    why: str
    base: Path | Base | None = None
    calibration: Path | None = None

    @property
    def score(self) -> str:
        """The part of recipes that says which dimensions go first."""
        return {"calibrated": "calib,bytes", "base": "fro_ckpt,bytes", "adapter": "bytes"}[self.name]

    def of_level(self, level: Level) -> str:
        """The recipe that keeps as much as a level of quality needs."""
        if self.name == "calibrated":
            return f"{self.score},quality={level.mean:g}"
        if self.name == "base":
            return f"{self.score},error={error_for(level, BASE_LINE):.3g}"
        return f"energy={1 - error_for(level, ADAPTER_LINE) ** 2:.6g}"

    def of_size(self, size: float) -> str:
        """The recipe of a file of so many bytes at most."""
        return f"{self.score},size={size / 2**20!r}"

    def of_rank(self, rank: int) -> str:
        """The recipe of one rank for all layers."""
        return f"calib,rank={rank}" if self.name == "calibrated" else f"rank={rank}"

    def stands_in(self, level: Level) -> str:
        """Which numbers stand for a level where nothing predicts pictures, and where they come from; "" otherwise."""
        if self.name == "calibrated":
            return ""
        error = error_for(level, BASE_LINE if self.name == "base" else ADAPTER_LINE)
        energy = f" (energy {1 - error**2:.4g})" if self.name == "adapter" else ""
        return (
            f"pictures not checked: {percent_text(error)} error of the weights{energy} stands for {level.mean:g} dB, "
            "as measured on a small model in docs/evidence.md"
        )
