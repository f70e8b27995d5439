"""Tensors in a dtype of the format that may be too narrow for their numbers: what is lost is said, or is an error."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from lorashrink.errors import NonFinite
from lorashrink.files.store import cast
from lorashrink.text import count_text, percent_text

if TYPE_CHECKING:
    from torch import Tensor

# Rounding to 11 bits changes a tensor's norm by less; numbers below the smallest normal one lose more.
_ROUNDING = 2.0**-10
# From here on a user wants to know.
_NOTEWORTHY = 0.01


def narrowed(tensor: Tensor, kind: str, key: str, path: Path, losses: dict[str, float]) -> Tensor:
    """The tensor in this dtype. Raises NonFinite if that cannot hold its numbers.

    losses: gets key -> share of its norm that is lost, if that is noteworthy.
    """
    loss = _lost(tensor, kind)
    if math.isinf(loss):
        raise NonFinite(f"{path}: {key} has numbers that {kind} cannot hold. Use -t bf16 or -t fp32.")
    if loss > _NOTEWORTHY:
        losses[key] = loss
    return cast(tensor, kind)


def balanced(up: Tensor, down: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    """The same product of two factors whose largest numbers are alike, if the dtype loses more than rounding does."""
    if all(_lost(factor, kind) <= _ROUNDING for factor in (up, down)):
        return up, down
    largest_up, largest_down = (float(factor.abs().max()) for factor in (up, down))
    if not (0 < largest_up < math.inf and 0 < largest_down < math.inf):
        return up, down
    power = 2.0 ** round((math.log2(largest_up) - math.log2(largest_down)) / 2)  # which multiplies without rounding
    return up / power, down * power


def loss_warnings(losses: Mapping[str, float], kind: str) -> list[str]:
    """What is said of tensors that `narrowed` found to lose much."""
    if not losses:
        return []
    first, share = next(iter(losses)), percent_text(max(losses.values()))
    if len(losses) == 1:
        what = f"{first} loses {share} of its norm: its numbers"
    else:
        what = f"{count_text(len(losses), 'tensor')}, first {first}, lose up to {share} of their norm: their numbers"
    return [f"{what} are too small for {kind}. Use -t bf16 or fp32"]


def _lost(tensor: Tensor, kind: str) -> float:
    """‖x − x'‖ / ‖x‖ of a tensor and what the dtype makes of it: infinity if it holds numbers that are too large."""
    new = cast(tensor, kind).to(tensor.dtype)
    if not new.isfinite().all():
        return math.inf if tensor.isfinite().all() else 0.0
    norm = float(tensor.double().norm())
    return float((new.double() - tensor.double()).norm()) / norm if norm else 0.0
