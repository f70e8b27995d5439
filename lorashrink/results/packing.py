"""The results of `pack` and `unpack`."""

from __future__ import annotations

from dataclasses import dataclass

from lorashrink.bases.views import BaseInfo
from lorashrink.results.shrinking import Failure, LayerResult, Removed, Verbatim


@dataclass(frozen=True, slots=True)
class Packed:
    """One packed file."""

    source: str
    output: str
    bytes_before: int
    bytes_after: int
    bytes_unpacked: int  # of the file in fp16 that it unpacks to
    decided_by: str  # "calibration", "base" or "weights"
    predicted_db: float  # about: PSNR of pictures against those of the original adapter
    relative_error: float  # sqrt(Σ‖ΔW - ΔW'‖² / Σ‖ΔW‖²), rounding included
    bits: float  # of the code, per number that is kept
    seconds: float
    sha256: str  # of the numbers that it unpacks to
    layers: tuple[LayerResult, ...] = ()  # what was kept, before rounding
    verbatim: tuple[Verbatim, ...] = ()
    removed: tuple[Removed, ...] = ()
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class PackReport:
    """The outcome of packing one or many adapters."""

    version: str
    command: str
    base: BaseInfo | None
    results: tuple[Packed, ...]
    failed: tuple[Failure, ...]


@dataclass(frozen=True, slots=True)
class Unpacked:
    """One file that was unpacked."""

    source: str
    output: str
    dtype: str
    bytes_before: int
    bytes_after: int
    layers: int
    seconds: float
    sha256: str  # of the numbers in fp16, which is the one in the packed file


@dataclass(frozen=True, slots=True)
class UnpackReport:
    """The outcome of unpacking one or many files."""

    version: str
    command: str
    results: tuple[Unpacked, ...]
    failed: tuple[Failure, ...]
