"""The names of the layers in a sum of adapters with different naming conventions."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
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

# --- names --------------------------------------------------------------------------------------


class Spelling(NamedTuple):
    """How the factors of a LoRA are called behind the name of their layer."""

    family: Family
    endings: Mapping[str, str]  # role -> ending


KOHYA = Spelling(lora.KOHYA, {"up": ".lora_up.weight", "down": ".lora_down.weight", "alpha": ".alpha"})

PEFT = Spelling(lora.PEFT, {"up": ".lora_B.weight", "down": ".lora_A.weight"})


def _spelling(adapter: Adapter) -> Spelling | None:
    """That of the first LoRA in the adapter."""
    for layer in adapter:
        if layer.family.name == "lora":
            if layer.family is lora.KOHYA:
                return KOHYA
            used = {role: layer.keys[role] for role in ("up", "down", "alpha") if role in layer.keys}
            return Spelling(layer.family, {role: key[len(layer.name) :] for role, key in used.items()})
    return None


_Address = tuple[str, str]  # (part, module name)

_LEVEL = "text_model."  # of CLIP, which transformers >= 5 leaves out


@dataclass(frozen=True, eq=False, slots=True)
class Names:
    """What layers of the output are called."""

    naming: str
    asked: bool  # whether that is another naming than the first adapter's
    spelling: Spelling | None
    known: Base | None  # finds a layer by its name
    layout: str | None  # of the modules, if these can be named
    by_key: Mapping[str, Sequence[tuple[_Address, Views]]]  # tensor of the base -> its modules in the layout
    short: frozenset[str] = frozenset()  # parts in whose names the first adapter leaves out the level text_model

    @classmethod
    def of(cls, first: Adapter, views: Sequence[Views], known: Base | None, asked: str | None) -> Names:
        """The naming that is asked for, or the one of the first adapter."""
        if asked:
            spelling = KOHYA if asked == "kohya" else PEFT
            layout = layout_of(asked, known) if known else None
            return cls(asked, True, spelling, known, layout, _by_key(known, layout))
        used = naming([layer.name for layer in first])
        layout = _layout(first, views, known, used) if known else None
        names = cls(used, False, _spelling(first), known, layout, _by_key(known, layout))
        return replace(names, short=frozenset(names._shortened(first, views)))

    def modules(self, key: str) -> list[tuple[str, Views]]:
        """(name, views) of the layers that a tensor of the base has in this naming."""
        return [(self.named(*address), views) for address, views in self.by_key.get(key, ())]

    def named(self, part: str, module: str) -> str:
        """What a layer for this module is called."""
        assert self.known is not None, "it has the modules"
        module = module.removeprefix(_LEVEL) if part in self.short else module
        return layer_name_in(self.naming, self.known.family, part, module)

    def _shortened(self, first: Adapter, views: Sequence[Views]) -> Iterator[str]:
        """The parts of which the adapter has names without the level that they have here."""
        table = self.known.modules(self.layout) if self.known and self.layout else {}
        addresses = {each: address for address, each in table.items()}
        for layer, each in zip(first, views, strict=True):
            part, module = addresses.get(each, ("", ""))
            if module.startswith(_LEVEL) and layer.name == self.named(part, module.removeprefix(_LEVEL)):
                yield part

    def alike(self, side: Adapter) -> bool:
        """Whether an adapter's own names are of this naming."""
        return naming([layer.name for layer in side]) == self.naming

    def owner(self, name: str) -> object:
        """The same for all names of one module."""
        return (self.known.find(name) if self.known else ()) or address(name)


def _by_key(known: Base | None, layout: str | None) -> dict[str, list[tuple[_Address, Views]]]:
    found: dict[str, list[tuple[_Address, Views]]] = defaultdict(list)
    for place, views in known.modules(layout).items() if known and layout else ():
        for key in {view.key: None for view in views}:
            found[key].append((place, views))
    return found


def _layout(first: Adapter, views: Sequence[Views], known: Base, used: str) -> str | None:
    """The layout that the first adapter's names are made of; None if its names are of no naming that can be written."""
    if used not in NAMINGS:
        return None
    counts = {}
    for layout in LAYOUTS:
        named = {each: address for address, each in known.modules(layout).items()}
        pairs = [(layer.name, named[each]) for layer, each in zip(first, views, strict=True) if each in named]
        with suppress(UsageError):  # this naming has no name for a part of the model
            counts[layout] = sum(name == layer_name_in(used, known.family, *place) for name, place in pairs)
    best = max(counts, key=counts.__getitem__, default=None)
    return best if best and counts[best] else layout_of(used, known)
