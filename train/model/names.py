"""What sd-scripts calls the modules of SDXL, from the rules by which lorashrink knows its bases."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import nn

from lorashrink.bases import FAMILIES, View, encoders
from lorashrink.bases.rules import spell
from lorashrink.linking.renaming import layer_name_in

SDXL = next(family for family in FAMILIES if family.name == "sdxl")


@dataclass(frozen=True, slots=True, eq=False)
class Named:
    """A module that holds weights, and its names."""

    lycoris: str  # what LyCORIS makes of its path in a diffusers model
    kohya: str  # sd-scripts' name
    module: nn.Module


def named_modules(unet: nn.Module, text_encoders: Sequence[nn.Module]) -> tuple[Named, ...]:
    """All modules with weights of a diffusers UNet and of transformers' CLIP encoders, in any version's layout."""
    parts = {"unet": unet, **{f"te{number}": encoder for number, encoder in enumerate(text_encoders, 1)}}
    return tuple(named for part, model in parts.items() for named in _of_part(part, model))


def kohya_names(unet: nn.Module, text_encoders: Sequence[nn.Module]) -> dict[str, str]:
    """LyCORIS' name -> sd-scripts' name of every module with weights."""
    return {named.lycoris: named.kohya for named in named_modules(unet, text_encoders)}


def _of_part(part: str, model: nn.Module) -> Iterator[Named]:
    modules = {
        path: module
        for path, module in model.named_modules()
        if isinstance(getattr(module, "weight", None), nn.Parameter)
    }
    # The rules look at shapes only where they split or fuse weights, which these two layouts do not.
    weights = {path: (View(path, (1, 1)),) for path in modules}
    rules = SDXL.rules if part == "unet" else encoders.RULES
    for name, (view,) in spell(weights, rules).layouts["native"].items():
        yield Named(
            lycoris=f"lora_{part}_{view.key}".replace(".", "_"),
            kohya=layer_name_in("kohya", SDXL, part, name),
            module=modules[view.key],
        )
