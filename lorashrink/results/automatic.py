"""The result of `shrink`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from lorashrink.errors import UsageError, hint_of
from lorashrink.results.shown import NOT_PLAIN
from lorashrink.text import decibel_text

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True)
class PicturePair:
    """One prompt, drawn with the adapter and with its smaller version."""

    label: str
    none: str  # path, without an adapter
    before: str
    after: str
    psnr: float  # dB, between before and after
    counts: bool  # it calls what the adapter was made for, and the worst of these decides


@dataclass(frozen=True, slots=True)
class Shrunk:
    """One adapter, and what became of it."""

    input: str
    output: str | None  # None: nothing was written; "" for an adapter in memory
    bytes_before: int
    bytes_after: int  # of the output, or of the one that was not worth writing
    method: str  # "calibrated", "base" or "adapter": what the dimensions were compared with
    why: str  # why this method, and what would be better
    recipe: str
    dtype: str
    relative_error: float  # of the weights: sqrt(Σ‖lost‖² / Σ‖ΔW‖²)
    predicted_db: float | None = None  # mean PSNR of pictures; None without statistics of the model
    worst_picture_db: float | None = None  # None: no pictures were drawn
    pictures: tuple[PicturePair, ...] = ()
    loads_in: tuple[str, ...] | None = None  # programs; None: the names tell no family of models
    skipped: str | None = None  # why nothing was written in this run
    warnings: tuple[str, ...] = ()
    details: tuple[str, ...] = ()  # tensors that were copied or removed: how many, and why
    # Of an adapter in memory: its tensors, and the metadata that a file would have
    state_dict: Mapping[str, Tensor] | None = field(default=None, compare=False, repr=False, metadata=NOT_PLAIN)
    metadata: Mapping[str, str] = field(default_factory=dict, compare=False, repr=False, metadata=NOT_PLAIN)

    @property
    def share(self) -> float:
        """Size of the output as a share of the input's."""
        return self.bytes_after / self.bytes_before

    @property
    def quality(self) -> float | None:
        """PSNR in dB: of the worst picture, or else the predicted mean. None if nothing was drawn or predicted."""
        return self.predicted_db if self.worst_picture_db is None else self.worst_picture_db

    @property
    def quality_text(self) -> str:
        """`31.2 dB` of the worst picture, or `about 40 dB`, which is predicted; empty without either."""
        if self.quality is None:
            return ""
        return f"about {self.quality:.0f} dB" if self.worst_picture_db is None else decibel_text(self.quality)


@dataclass(frozen=True, slots=True)
class FailedInput:
    """An input that could not be shrunk."""

    input: str
    error: str  # what is wrong, and what to do
    hint: str | None  # what to do; None if the error does not say

    @classmethod
    def of(cls, path: str, error: str) -> FailedInput:
        """The failure of an input."""
        return cls(path, error, hint_of(error.removeprefix(f"{path}: ")))


@dataclass(frozen=True, slots=True)
class ShrinkReport:
    """The outcome of a run over one or many adapters."""

    version: str
    results: tuple[Shrunk, ...]
    failed: tuple[FailedInput, ...]
    page: str | None = None  # the file that shows the run; None where nothing was shrunk
    notes: tuple[str, ...] = ()  # on the run as a whole, such as why no pictures were drawn

    @property
    def state_dict(self) -> Mapping[str, Tensor]:
        """The tensors of an adapter in memory. Raises UsageError if files were shrunk."""
        states = [result.state_dict for result in self.results if result.state_dict is not None]
        if not states:
            raise UsageError("state_dict: only of an adapter in memory; the tensors are in the files of `results`.")
        return states[0]

    @property
    def written(self) -> tuple[Shrunk, ...]:
        """The results that have an output, of this run or an earlier one."""
        return tuple(result for result in self.results if result.output)

    @property
    def not_written(self) -> dict[str, list[str]]:
        """Reason -> names of the files that have no output for it."""
        names: dict[str, list[str]] = {}
        for result in self.results:
            if not result.output:
                names.setdefault(result.skipped or "", []).append(Path(result.input).name)
        return names
