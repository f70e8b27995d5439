"""Which layers a sum of adapters has, and which rows of which adapter's layers each of them takes."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field

from lorashrink.adapters import Adapter, Layer
from lorashrink.adapters.family import Infos, Shape
from lorashrink.bases import Views, views_shape
from lorashrink.engine.delta import fan_in
from lorashrink.errors import ShapeError, UsageError
from lorashrink.files.store import TensorStore, tensor_info
from lorashrink.linking.pairing import members_of
from lorashrink.linking.rows import RowMap, RowRun, joined_runs, row_intervals
from lorashrink.names import kind
from lorashrink.sums.layers import Part, SumLayer
from lorashrink.sums.naming import KOHYA, PEFT, Names, Spelling


def output_slots(
    sides: Sequence[Adapter], views: Sequence[Sequence[Views]], weights: Sequence[float], names: Names
) -> list[Slot]:
    """The layers of the output, with what adds to each of their rows. Raises UsageError for rows without a name."""
    members = [member for member in members_of(sides, views) if weights[member.side] or member.side == 0]
    slots: list[Slot] = []
    owners = RowMap[int]()  # which of the slots has which rows

    def take(name: str, views: Views, lead: Layer | None) -> None:
        if rows := owners.free(row_intervals(views)):
            owners.add(rows, len(slots))
            slots.append(Slot(name, views, lead))

    alike = [names.alike(side) for side in sides]
    for side, layer, layer_views in members:
        if side or names.renames:
            free = owners.free(row_intervals(layer_views))
            for name, module in [module for interval in free for module in names.modules(interval.key)]:
                take(name, module, None)
            unnamed = owners.free(row_intervals(layer_views))
            if unnamed and (unnamed != free or not alike[side]):
                raise UsageError(
                    f"{sides[side].path}: {layer.name} has no known name in {names.naming} naming, which the output "
                    f"is to have. {names.hint}"
                )
        take(layer.name, layer_views, layer)
    for side, layer, layer_views in members:
        runs: dict[int, list[RowRun]] = defaultdict(list)
        for rows, own, index in owners.common(row_intervals(layer_views)) if weights[side] else ():
            runs[index].append(RowRun(own.first, rows.first, rows.size))
        for index, slot_runs in runs.items():
            slots[index].parts.append(Part(layer, weights[side], joined_runs(slot_runs)))
    return [slot for slot in slots if slot.parts]


@dataclass(frozen=True, eq=False, slots=True)
class Slot:
    """A layer of the output."""

    name: str
    views: Views
    lead: Layer | None  # whose name and shape it has
    parts: list[Part] = field(default_factory=list)

    def layer(self, names: Names, dtype: str, store: TensorStore) -> SumLayer:
        """The sum as a LoRA under the slot's name.

        Raises ShapeError if its parts do not fit each other, and UsageError if they are not added.
        """
        shape = self.shape()
        for part in self.parts:
            if fan_in(part.layer.shape) != fan_in(shape):
                raise ShapeError(
                    f"{part.layer.store.path}: layer {part.layer.name} is {list(part.layer.shape)}, but {self.name} of "
                    "another adapter, which changes the same weight, is "
                    f"{list(shape)}. Merge adapters of one model."
                )
        name = re.sub("^oft_unet_", "lora_unet_", self.name)  # a prefix that no loader of LoRA knows
        family, endings = self._spelling(names)
        out, *inner = shape
        rank = sum(part.layer.rank for part in self.parts)
        infos: Infos = {
            "up": tensor_info(dtype, (out // family.experts, rank * family.experts, *[1] * (len(inner) - 1))),
            "down": tensor_info(dtype, (rank * family.experts, *inner)),
            "A": tensor_info(dtype, (rank, out)),
            "B": tensor_info(dtype, (*inner, rank)),
            "alpha": tensor_info("F32", ()),
        }
        return SumLayer(
            name=name,
            family=family,
            keys={role: name + ending for role, ending in endings.items()},
            infos={role: infos[role] for role in endings},
            store=store,
            parts=tuple(self.parts),
            kind=dtype,
        )

    def _spelling(self, names: Names) -> Spelling:
        """How the factors are stored: those of experts and, for PEFT, of embeddings differ from all others."""
        families = {part.layer.family.name: part.layer.family for part in self.parts}
        if "experts" in families:
            first = self.parts[0].layer
            if any(part.layer.family.experts != first.family.experts for part in self.parts) or len(families) > 1:
                raise UsageError(
                    f"{first.store.path}: {self.name} holds factors of experts, and those of another adapter are of "
                    "another number of experts, or of none. Merge adapters with the same target_parameters."
                )
            return Spelling(first.family, PEFT.endings)
        if "embedding" in families and names.naming in ("diffusers", "peft"):
            return Spelling(families["embedding"], {"A": ".lora_embedding_A", "B": ".lora_embedding_B"})
        return names.spelling or (PEFT if "." in self.name else KOHYA)

    def shape(self) -> Shape:
        """Shape of the base weight, as far as base and adapters tell. Raises UsageError if they tell too little."""
        if self.lead is None:
            return views_shape(self.views)
        layers = [self.lead, *(part.layer for part in self.parts)]
        layer = next((layer for layer in layers if layer.shape_known), self.lead)
        if not layer.shape_known and kind(self.name, ()) not in ("attn", "mlp", "te"):
            raise UsageError(
                f"{layer.store.path}: {layer.name} is {layer.algo}, and only the base tells whether this is a "
                "convolution. Give it with --base; a norm table is enough."
            )
        return (views_shape(self.views)[0], *layer.shape[1:])
