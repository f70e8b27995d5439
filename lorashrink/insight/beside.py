"""What two adapters hold beside their ΔW: biases, magnitudes, other tensors, and metadata."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lorashrink.adapters import Adapter, layer_name, peft
from lorashrink.bases import Base
from lorashrink.names import address
from lorashrink.results.comparison import MetadataDifference, OtherDifference


@dataclass(frozen=True, eq=False, slots=True)
class _Other:
    """A tensor of one side that belongs to none of its ΔW."""

    side: Adapter
    key: str
    reason: str
    scale: float = 1.0

    def read(self) -> Tensor:
        """The tensor in double precision, times its scale."""
        tensor = self.side.store.read(self.key)
        return tensor.to(torch.complex128 if tensor.is_complex() else torch.float64) * self.scale


# Parts of a layer that are no part of its ΔW.
_BESIDE = {"magnitude": "DoRA's magnitude", "bias": "a bias beside the factors"}


def other_differences(sides: Sequence[Adapter], dictionary: Base | None) -> tuple[list[OtherDifference], int]:
    """(tensors outside of all ΔW that differ, how many do not)."""
    others_a, others_b = (tensors_beside(side, dictionary) for side in sides)
    differences, equal = [], 0
    for owner in {**others_a, **others_b}:
        a, b = others_a.get(owner), others_b.get(owner)
        relative = None
        if a and b and (relative := _relative_difference(a.read(), b.read())) == 0:
            equal += 1
            continue
        reason = (a or b).reason  # type: ignore[union-attr]  # one of them is there
        differences.append(OtherDifference(a.key if a else None, b.key if b else None, reason, relative))
    return differences, equal


def tensors_beside(side: Adapter, dictionary: Base | None) -> dict[tuple[object, str], _Other]:
    """(what it belongs to, what it is) -> a tensor that is no part of ΔW."""

    def owner(name: str) -> object:
        return (dictionary.find(name) if dictionary else ()) or address(name)

    others: dict[tuple[object, str], _Other] = {}
    for layer in side:
        for role, reason in _BESIDE.items():
            if role in layer.keys:
                # PEFT multiplies a bias as it multiplies the factors
                scale = layer.scale if role == "bias" else 1.0
                others[owner(layer.name), role] = _Other(side, layer.keys[role], reason, scale)
    for key, reason in side.others.items():
        name = layer_name(key)
        ending = key[len(name) :]
        others[owner(name), "bias" if ending == ".diff_b" else ending] = _Other(side, key, reason)
    return others


def _relative_difference(a: Tensor, b: Tensor) -> float | None:
    """‖a − b‖ / ‖a‖: 0 for equal tensors, None for other sizes and where there is no such number."""
    if a.numel() != b.numel():
        return None
    size, difference = float(a.norm()), float((a.flatten() - b.flatten()).norm())
    if difference == 0:
        return 0.0
    return difference / size if size and math.isfinite(difference / size) else None


def metadata_differences(a: Adapter, b: Adapter) -> tuple[MetadataDifference, ...]:
    """The entries that differ, by their keys."""
    entries_a, entries_b = _entries(a), _entries(b)
    return tuple(
        MetadataDifference(key, entries_a.get(key), entries_b.get(key))
        for key in sorted(entries_a.keys() | entries_b.keys())
        if entries_a.get(key) != entries_b.get(key)
    )


def _entries(adapter: Adapter) -> dict[str, str]:
    """Metadata, and the settings of a PEFT folder."""
    settings: Mapping[str, object] = adapter.settings.get("", {}) if adapter.as_folder else {}
    texts = {f"{peft.CONFIG_FILE}: {key}": json.dumps(value, sort_keys=True) for key, value in settings.items()}
    return {**adapter.store.metadata, **texts}
