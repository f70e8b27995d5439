"""The row of the base table: how a family of models is recognised, and where its parts lie in a file."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class BaseFamily:
    """A family of models.

    `containers` maps the prefix of a part's tensors to the part ("unet", "te1", ...); a longer prefix
    wins. `recognise` sees all tensor names with their shapes.
    """

    name: str
    title: str
    containers: Mapping[str, str]
    recognise: Callable[[Mapping[str, tuple[int, ...]]], bool]


def has(names: Collection[str], *endings: str) -> bool:
    """Whether some tensor name is, or ends behind a container's dot with, one of the endings."""
    return any(name == ending or name.endswith("." + ending) for ending in endings for name in names)
