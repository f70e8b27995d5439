"""What a prepared adapter answers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from lorashrink.results.shown import Shown


@dataclass(frozen=True, slots=True, repr=False)
class Outcome(Shown):
    """What one recipe would make of an adapter."""

    recipe: str
    dtype: str  # "same", "fp16", ...
    threshold: float | None  # lowest kept score, None if no score decided or everything was kept
    bytes: int  # of the file that `resize` would write
    relative_error: float  # sqrt(Σ‖lost‖² / Σ‖ΔW‖²)
    energy: float
    ranks: Mapping[str, int]  # layer -> rank, 0 = removed
    copied: int = 0  # tensors that stay as they are
    predicted_db: float | None = None  # PSNR to the pictures of the whole adapter; None without statistics

    @property
    def mean_rank(self) -> float:
        """Over all layers; removed ones count as 0."""
        return sum(self.ranks.values()) / len(self.ranks) if self.ranks else 0.0


@dataclass(frozen=True, slots=True, repr=False)
class Curve(Shown):
    """Size against error for one score, smallest file first."""

    table = "outcomes"

    source: str
    bytes: int  # of the adapter as it is
    outcomes: tuple[Outcome, ...]

    @property
    def points(self) -> tuple[tuple[int, float], ...]:
        """(bytes, relative error) of each outcome."""
        return tuple((outcome.bytes, outcome.relative_error) for outcome in self.outcomes)
