"""The modules of a model whose weights an adapter changes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from torch import nn

from lorashrink.bases import Base, View, Views
from lorashrink.errors import InputError
from lorashrink.linking.rows import RowMap, row_intervals

# --- what is watched ----------------------------------------------------------------------------


Modules = Callable[[str, str], nn.Module | None]  # (part, name) -> module


def modules_of(pipeline: Any, base: Base) -> Modules:
    """Where the base's weights are in the pipeline."""

    def find(part: str, name: str) -> nn.Module | None:
        component = getattr(pipeline, base.family.folder(part) or "-", None)
        return component and module_at(component, name)

    return find


def module_at(component: nn.Module, name: str) -> nn.Module | None:
    """The linear layer or convolution of this name, whatever level above it the library left out or put in."""
    tails = (name, name.removeprefix("text_model."), name.removeprefix("model."), name.removeprefix("transformer."))
    for tail in dict.fromkeys((*tails, *(f"{head}.{name}" for head, _ in component.named_children()))):
        try:
            module = component.get_submodule(tail)
        except AttributeError:
            continue
        if isinstance(module, (nn.Linear, nn.Conv2d)) or type(module).__name__ == "Conv1D":
            return module
    return None


class Watched(NamedTuple):
    """A part of the base's weights, and the module that has it."""

    view: View
    module: nn.Module
    start: int  # first row in the module


def watched(modules: Modules, layout: str, base: Base) -> list[Watched]:
    """Each part of the base's weights that has a module, in a layout of names. Raises InputError if none has."""
    found = []
    for (part, name), views in base.modules(layout).items():
        module = modules(part, name)
        if module is None:
            continue
        start = 0
        for view in views:
            found.append(Watched(view, module, start))
            start += view.shape[0]
    if not found:
        raise InputError(f"{base.path}: none of its {len(base.all_views)} weights is a layer of the loaded model.")
    return found


def by_weight(modules: Sequence[Watched]) -> RowMap[Watched]:
    """Which rows of the base's weights are in which modules."""
    owners = RowMap[Watched]()
    for module in modules:
        owners.add(row_intervals((module.view,)), module)
    return owners


def pieces(views: Views, modules: RowMap[Watched]) -> Iterator[tuple[Watched, tuple[int, int]]]:
    """What of the watched modules a layer changes, and which of its rows that is."""
    for rows, own, watched in modules.common(row_intervals(views)):
        view = replace(watched.view, shape=(own.size, *watched.view.shape[1:]), rows=(own.start, own.stop))
        yield Watched(view, watched.module, watched.start + own.first), rows.in_layer
