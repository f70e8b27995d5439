"""Tensors of a sum that belong to no ΔW: biases, norms and whole weights."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from lorashrink.adapters import Adapter, layer_name
from lorashrink.errors import ShapeError, UsageError
from lorashrink.files.store import TensorInfo, cast, tensor_info
from lorashrink.linking.renaming import LazyTensor
from lorashrink.sums.naming import Names

if TYPE_CHECKING:
    from torch import Tensor


class Extras(NamedTuple):
    """Tensors beside the layers."""

    tensors: dict[str, LazyTensor]
    kept: dict[str, str]  # key -> what it is
    dropped: dict[str, str]  # key -> why the output has none such


@dataclass(frozen=True, eq=False, slots=True)
class _Extra:
    """A tensor of one adapter that belongs to none of its ΔW."""

    side: Adapter
    key: str
    name: str  # of its layer
    reason: str
    weight: float

    @property
    def info(self) -> TensorInfo:
        return self.side.store.tensors[self.key]

    def read(self) -> Tensor:
        return self.side.store.read(self.key)

    def output_name(self, first: Adapter, names: Names) -> str | None:
        """The name of its layer in the output's naming, None if nothing tells it."""
        if self.side is first and not names.renames:
            return self.name
        if names.base and (views := names.base.find(self.name)):
            for address, module_views in names.by_key.get(views[0].key, ()):
                if module_views == views:
                    return names.named(*address)
        return self.name if names.alike(self.side) else None


# Differences of vectors and modulations, which are added like those of matrices.
_DIFFERENCES = (".diff", ".diff_b", ".diff_m", ".w_norm", ".b_norm")


def collect_extras(sides: Sequence[Adapter], weights: Sequence[float], names: Names, dtype: str) -> Extras:
    """Sums of differences of vectors; other tensors only where there is nothing to add."""
    groups: dict[tuple[object, str], list[_Extra]] = defaultdict(list)
    for side, weight in zip(sides, weights, strict=True):
        for key, reason in side.others.items() if weight else ():
            name = layer_name(key)
            groups[names.owner(name), key[len(name) :]].append(_Extra(side, key, name, reason, weight))
        for layer in side if weight else ():
            if "bias" in layer.keys:
                if names.naming not in ("kohya", "comfy"):
                    raise UsageError(
                        f"{side.path}: {layer.name} has a bias beside its factors, and sums of those are only written "
                        "in the names of kohya or ComfyUI. Add --naming kohya with a base."
                    )
                bias = _Extra(side, layer.keys["bias"], layer.name, "a difference of a bias", weight * layer.scale)
                groups[names.owner(layer.name), ".diff_b"].append(bias)
    extras = Extras({}, {}, {})
    for (_, ending), members in groups.items():
        lead, adds = members[0], ending in _DIFFERENCES
        target = lead.output_name(sides[0], names)
        if target is not None and (adds or _nothing_to_add(members)):
            extras.tensors[target + ending] = weighted_sum(members, dtype) if adds else (lead.info, lead.read)
            extras.kept[target + ending] = lead.reason
        else:
            why = "has no known name in the output's naming" if target is None else "which cannot be weighted or added"
            extras.dropped.update(
                {f"{extra.key} ({extra.side.path.name})": f"{extra.reason}, {why}" for extra in members}
            )
    return extras


def weighted_sum(members: Sequence[_Extra], dtype: str) -> LazyTensor:
    """The sum in a dtype of the format; a tensor alone at full strength stays as it is. Raises ShapeError."""
    lead = members[0]
    if any(extra.info.shape != lead.info.shape for extra in members):
        raise ShapeError(
            f"{members[1].side.path}: {members[1].key} has another shape than {lead.key} of {lead.side.path}. "
            "Merge adapters of one model."
        )
    if len(members) == 1 and lead.weight == 1:
        return lead.info, lead.read

    def add() -> Tensor:
        total = lead.read().double() * lead.weight
        for extra in members[1:]:
            total = total + extra.read().double() * extra.weight
        return cast(total, dtype)

    return tensor_info(dtype, lead.info.shape), add


def _nothing_to_add(members: Sequence[_Extra]) -> bool:
    """Whether it is one adapter's alone at full strength, or the same in all that have it."""
    if len(members) == 1:
        return members[0].weight == 1
    infos = {(extra.info.dtype, extra.info.shape) for extra in members}
    return len(infos) == 1 and len({b"".join(extra.side.store.chunks(extra.key)) for extra in members}) == 1
