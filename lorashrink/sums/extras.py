"""Tensors of a sum that belong to no ΔW: biases, norms and whole weights."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

from lorashrink.adapters import Adapter, Layer, layer_name
from lorashrink.errors import ShapeError, UsageError
from lorashrink.files.store import cast, tensor_info
from lorashrink.linking.renaming import Made
from lorashrink.sums.naming import Names

if TYPE_CHECKING:
    from torch import Tensor

# --- what belongs to no ΔW ----------------------------------------------------------------------


class _Extras(NamedTuple):
    """Tensors beside the layers."""

    made: dict[str, Made]
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

    def read(self) -> Tensor:
        return self.side.store.read(self.key)


# Differences of vectors, which are added like those of matrices.
_DIFFERENCES = (".diff", ".diff_b", ".w_norm", ".b_norm")


def collect_extras(sides: Sequence[Adapter], weights: Sequence[float], names: Names, dtype: str) -> _Extras:
    """Sums of differences of vectors; other tensors only where there is nothing to add."""
    groups: dict[tuple[object, str], list[_Extra]] = defaultdict(list)
    for side, weight in zip(sides, weights, strict=True):
        for key, reason in side.others.items() if weight else ():
            name = layer_name(key)
            groups[names.owner(name), key[len(name) :]].append(_Extra(side, key, name, reason, weight))
        for layer in side if weight else ():
            if "bias" in layer.keys:
                _check_bias(side, layer, names)
                bias = _Extra(side, layer.keys["bias"], layer.name, "a difference of a bias", weight * layer.scale)
                groups[names.owner(layer.name), ".diff_b"].append(bias)
    extras = _Extras({}, {}, {})
    for (_, ending), members in groups.items():
        _add_extra(extras, ending, members, sides[0], names, dtype)
    return extras


def _check_bias(side: Adapter, layer: Layer, names: Names) -> None:
    if names.naming not in ("kohya", "comfy"):
        raise UsageError(
            f"{side.path}: {layer.name} has a bias beside its factors, and sums of those are only written in the names "
            "of kohya or ComfyUI. Add --naming kohya with a base."
        )


def _add_extra(
    extras: _Extras, ending: str, members: Sequence[_Extra], first: Adapter, names: Names, dtype: str
) -> None:
    lead = members[0]
    name = lead.name if lead.side is first and not names.asked else _renamed(lead, names)
    if ending in _DIFFERENCES and name is not None:
        shapes = {each.side.store.tensors[each.key].shape for each in members}
        if len(shapes) > 1:
            raise ShapeError(
                f"{members[1].side.path}: {members[1].key} has another shape than {lead.key} of {lead.side.path}. "
                "Merge adapters of one model."
            )
        if len(members) == 1 and lead.weight == 1:
            extras.made[name + ending] = (lead.side.store.tensors[lead.key], lead.read)
        else:
            extras.made[name + ending] = (tensor_info(dtype, shapes.pop()), partial(_sum, members, dtype))
        extras.kept[name + ending] = lead.reason
    elif name is not None and _nothing_to_add(members):
        extras.made[name + ending] = (lead.side.store.tensors[lead.key], lead.read)
        extras.kept[name + ending] = lead.reason
    else:
        why = "has no known name in the output's naming" if name is None else "which cannot be weighted or added"
        extras.dropped.update({f"{each.key} ({each.side.path.name})": f"{each.reason}, {why}" for each in members})


def _renamed(extra: _Extra, names: Names) -> str | None:
    """The name of its layer in the output's naming, None if nothing tells it."""
    if names.known and (views := names.known.find(extra.name)):
        for address, each in names.by_key.get(views[0].key, ()):
            if each == views:
                return names.named(*address)
    return extra.name if names.alike(extra.side) else None


def _nothing_to_add(members: Sequence[_Extra]) -> bool:
    """Whether it is one adapter's alone at full strength, or the same in all that have it."""
    if len(members) == 1:
        return members[0].weight == 1
    infos = {(info.dtype, info.shape) for each in members for info in [each.side.store.tensors[each.key]]}
    return len(infos) == 1 and len({bytes(b"".join(each.side.store.chunks(each.key))) for each in members}) == 1


def _sum(members: Sequence[_Extra], dtype: str) -> Tensor:
    total = members[0].read().double() * members[0].weight
    for each in members[1:]:
        total = total + each.read().double() * each.weight
    return cast(total, dtype)
