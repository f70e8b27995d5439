"""Every name under which an adapter may mean a weight of a base, from the names and shapes of its tensors."""

from __future__ import annotations

import re
from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass
from itertools import chain

from lorashrink.bases import encoders
from lorashrink.bases.family import BaseFamily
from lorashrink.bases.rules import LAYOUTS, Rules, spell
from lorashrink.bases.views import View, Views, views_id
from lorashrink.names import DENOISERS, address, flat

# Not part of what adapters change, though their names may look so.
_IGNORED = ("first_stage_model.", "vae.", "model_ema.")
_NO_WEIGHTS = ("bias", "position_ids")
_ENCODER = re.compile(r"text_encoders\.[^.]+\.(?:transformer\.)?")

Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True, eq=False, slots=True)
class Weights:
    """The weights of a base, each under several names.

    `by_name` maps (part, flattened module name) to views; `layouts` maps each layout to (part, module name) -> views,
    where every weight stands once.
    """

    by_name: Mapping[tuple[str, str], Views]
    layouts: Mapping[str, Mapping[tuple[str, str], Views]]

    def limited(self, ids: Container[str]) -> Weights:
        """Those whose `views_id` is one of these."""
        tables = {
            layout: {name: views for name, views in table.items() if views_id(views) in ids}
            for layout, table in {"": self.by_name, **self.layouts}.items()
        }
        return Weights(tables.pop(""), tables)


def relevant(shapes: Shapes) -> dict[str, tuple[int, ...]]:
    """The tensors that are not the autoencoder's, or averages of others."""
    return {key: shape for key, shape in shapes.items() if not key.startswith(_IGNORED)}


def name_weights(shapes: Shapes, family: BaseFamily) -> Weights:
    """Name all weights of a base of this family."""
    parts: dict[str, dict[str, Views]] = {}
    for key, shape in shapes.items():
        located = _locate(key, family)
        if located and not key.endswith(_NO_WEIGHTS) and len(shape) >= 2 and min(shape) > 0:
            part, module = located
            if part == "unet":
                turned = bool(family.transposed) and module.endswith(family.transposed)
            else:
                turned = module in encoders.TRANSPOSED and not key.endswith(".weight")
            view = View(key, shape[::-1], transposed=True) if turned else View(key, shape)
            parts.setdefault(part, {}).setdefault(module, (view,))
    by_name: dict[tuple[str, str], Views] = {}
    layouts: dict[str, dict[tuple[str, str], Views]] = {layout: {} for layout in LAYOUTS}
    for part, modules in parts.items():
        rules = family.rules if part in DENOISERS else Rules(()) if part == "connectors" else encoders.RULES
        spelled = spell(modules, rules)
        # A name that the base itself uses is no other weight's alias, and one name for two weights is no name at all.
        own = _unique((flat(module), views) for module, views in modules.items())
        short = ((address(module)[1], views) for module, views in modules.items())
        aliases = ((flat(name), views) for name, views in spelled.aliases)
        more = _unique((name, views) for name, views in chain(short, aliases) if name not in own)
        by_name |= {(part, name): views for name, views in {**more, **own}.items() if views}
        for layout, spellings in spelled.layouts.items():
            layouts[layout] |= {(part, name): views for name, views in spellings.items()}
    return Weights(by_name, layouts)


def _locate(key: str, family: BaseFamily) -> tuple[str, str] | None:
    """(part, module name) of a tensor, None if it is in none of the family's parts."""
    module = key.removesuffix(".weight").removesuffix("_weight")
    for prefix, part in family.by_length:
        if key.startswith(prefix) and (prefix or not key.startswith("text_encoders.")):
            return part, module[len(prefix) :]
    match = _ENCODER.match(key)
    return ("te1", module[match.end() :]) if match and family.encoders == 1 else None


def _unique(pairs: Iterable[tuple[str, Views]]) -> dict[str, Views]:
    """Name -> views, () where a name means several weights."""
    by_name: dict[str, Views] = {}
    for name, views in pairs:
        by_name[name] = views if by_name.get(name, views) == views else ()
    return by_name
