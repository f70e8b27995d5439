"""The modules of a model whose weights an adapter changes."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any, NamedTuple

from torch import nn

from lorashrink.bases import Base, View, Views
from lorashrink.errors import InputError

Modules = Callable[[str, str], nn.Module | None]  # (part, name) -> module


def modules_of(pipeline: Any, base: Base) -> Modules:
    """A function that finds the module of a base's weight in the pipeline."""

    def find(part: str, name: str) -> nn.Module | None:
        component = getattr(pipeline, base.family.folder(part) or "-", None)
        return component and module_at(component, name)

    return find


def module_at(component: nn.Module, name: str) -> nn.Module | None:
    """The linear layer or convolution of this name, even if the library has a level above it more or less."""
    tails = (name, name.removeprefix("text_model."), name.removeprefix("model."), name.removeprefix("transformer."))
    for tail in dict.fromkeys((*tails, *(f"{head}.{name}" for head, _ in component.named_children()))):
        try:
            module = component.get_submodule(tail)
        except AttributeError:
            continue
        if isinstance(module, (nn.Linear, nn.Conv2d)) or type(module).__name__ == "Conv1D":
            return module
    return None


@contextmanager
def forward_hooks(modules: Iterable[nn.Module], hook: Callable[..., Any]) -> Iterator[None]:
    """The hook, as for `nn.Module.register_forward_hook`, is on the modules for as long as this lasts."""
    with ExitStack() as stack:
        for module in modules:
            stack.callback(module.register_forward_hook(hook).remove)
        yield


class Watched(NamedTuple):
    """A part of the base's weights, and the module that has it."""

    view: View
    module: nn.Module
    start: int  # first row in the module

    @property
    def rows(self) -> tuple[int, int]:
        """First row in the module, and the one behind the last."""
        return self.start, self.start + self.view.shape[0]


def watched(modules: Modules, layout: str, base: Base) -> list[Watched]:
    """The parts of the base's weights that have a module, in a layout of names. Raises InputError if none has."""
    parts = []
    for (part, name), views in base.modules(layout).items():
        module = modules(part, name)
        if module is None:
            continue
        start = 0
        for view in views:
            parts.append(Watched(view, module, start))
            start += view.shape[0]
    if not parts:
        raise InputError(f"{base.path}: none of its {len(base.all_views)} weights is a layer of the loaded model.")
    return parts


def by_weight(modules: Sequence[Watched]) -> dict[str, list[Watched]]:
    """Key of the base -> the modules that have parts of this weight."""
    found: dict[str, list[Watched]] = defaultdict(list)
    for each in modules:
        found[each.view.key].append(each)
    return found


def pieces(views: Views, by_key: Mapping[str, Sequence[Watched]]) -> Iterator[tuple[Watched, tuple[int, int]]]:
    """What of the watched modules a layer changes, and which of its rows that is."""
    start = 0
    for view in views:
        first, last = view.rows or (0, view.shape[0])
        for each in by_key.get(view.key, ()):
            low, high = each.view.rows or (0, each.view.shape[0])
            begin, end = max(first, low), min(last, high)
            if begin < end:
                part = replace(each.view, shape=(end - begin, *each.view.shape[1:]), rows=(begin, end))
                yield (
                    Watched(part, each.module, each.start + begin - low),
                    (start + begin - first, start + end - first),
                )
        start += last - first
