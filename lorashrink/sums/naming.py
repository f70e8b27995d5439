"""The names of the layers in a sum of adapters with different naming conventions."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import NamedTuple

from lorashrink.adapters import Adapter, lora
from lorashrink.adapters.family import Family
from lorashrink.bases import Base, Views
from lorashrink.bases.rules import LAYOUTS
from lorashrink.errors import UsageError
from lorashrink.linking.renaming import NAMINGS, layer_name_in, layout_of
from lorashrink.names import address, naming


class Spelling(NamedTuple):
    """How the factors of a LoRA are called behind the name of their layer."""

    family: Family
    endings: Mapping[str, str]  # role -> ending

    @classmethod
    def of(cls, adapter: Adapter) -> Spelling | None:
        """That of the first LoRA in the adapter."""
        layer = next((layer for layer in adapter if layer.family.name == "lora"), None)
        if layer is None:
            return None
        if layer.family is lora.KOHYA:
            return KOHYA
        used = {role: layer.keys[role] for role in ("up", "down", "alpha") if role in layer.keys}
        return cls(layer.family, {role: key[len(layer.name) :] for role, key in used.items()})


KOHYA = Spelling(lora.KOHYA, {"up": ".lora_up.weight", "down": ".lora_down.weight", "alpha": ".alpha"})

PEFT = Spelling(lora.PEFT, {"up": ".lora_B.weight", "down": ".lora_A.weight"})

_Address = tuple[str, str]  # (part, module name)

_LEVEL = "text_model."  # of CLIP, which transformers >= 5 leaves out


@dataclass(frozen=True, eq=False, slots=True)
class Names:
    """What layers of the output are called."""

    naming: str
    renames: bool  # whether that is another naming than the first adapter's
    spelling: Spelling | None
    base: Base | None  # finds a layer by its name
    layout: str | None  # of the modules, if these can be named
    by_key: Mapping[str, Sequence[tuple[_Address, Views]]]  # tensor of the base -> its modules in the layout
    short: frozenset[str] = frozenset()  # parts in whose names the first adapter leaves out the level text_model

    @classmethod
    def of(cls, first: Adapter, views: Sequence[Views], base: Base | None, requested: str | None) -> Names:
        """The requested naming, or the one of the first adapter."""
        if requested:
            spelling = KOHYA if requested == "kohya" else PEFT
            layout = layout_of(requested, base) if base else None
            return cls(requested, True, spelling, base, layout, _by_key(base, layout))
        used = naming([layer.name for layer in first])
        layout = layout_used(first, views, base, used) if base else None
        names = cls(used, False, Spelling.of(first), base, layout, _by_key(base, layout))
        modules = base.modules(layout) if base and layout else {}
        addresses = {module_views: address for address, module_views in modules.items()}
        short = set()
        for layer, layer_views in zip(first, views, strict=True):
            part, module = addresses.get(layer_views, ("", ""))
            if module.startswith(_LEVEL) and layer.name == names.named(part, module.removeprefix(_LEVEL)):
                short.add(part)
        return replace(names, short=frozenset(short))

    @property
    def hint(self) -> str:
        """What helps where a layer has no name in this naming."""
        if self.renames:
            return "Leave --naming out."
        if self.naming not in NAMINGS:
            return f"Choose one with --naming and a base: {', '.join(NAMINGS)}."
        return "Give the base with --base; a norm table is enough."

    def modules(self, key: str) -> list[tuple[str, Views]]:
        """(name, views) of the layers that a tensor of the base has in this naming."""
        return [(self.named(*address), views) for address, views in self.by_key.get(key, ())]

    def named(self, part: str, module: str) -> str:
        """What a layer for this module is called."""
        assert self.base is not None, "it has the modules"
        module = module.removeprefix(_LEVEL) if part in self.short else module
        return layer_name_in(self.naming, self.base.family, part, module)

    def alike(self, side: Adapter) -> bool:
        """Whether an adapter's own names are of this naming."""
        return naming([layer.name for layer in side]) == self.naming

    def owner(self, name: str) -> object:
        """The same for all names of one module."""
        return (self.base.find(name) if self.base else ()) or address(name)


def _by_key(base: Base | None, layout: str | None) -> dict[str, list[tuple[_Address, Views]]]:
    modules: dict[str, list[tuple[_Address, Views]]] = defaultdict(list)
    for module, views in base.modules(layout).items() if base and layout else ():
        for key in {view.key: None for view in views}:
            modules[key].append((module, views))
    return modules


def layout_used(first: Adapter, views: Sequence[Views], base: Base, used: str) -> str | None:
    """The layout that the first adapter's names are made of; None if its names are of no naming that can be written."""
    if used not in NAMINGS:
        return None
    counts = {}
    for layout in LAYOUTS:
        addresses = {module_views: address for address, module_views in base.modules(layout).items()}
        with suppress(UsageError):  # this naming has no name for a part of the model
            counts[layout] = sum(
                layer.name == layer_name_in(used, base.family, *addresses[layer_views])
                for layer, layer_views in zip(first, views, strict=True)
                if layer_views in addresses
            )
    best = max(counts, key=counts.__getitem__, default=None)
    return best if best and counts[best] else layout_of(used, base)
