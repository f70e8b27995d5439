"""An open adapter and its layers: what is stored, and what it adds to the base."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorashrink.adapters import peft
from lorashrink.adapters.family import SHARED, Family, Infos, Needs, Shape, Stored
from lorashrink.errors import ShapeError
from lorashrink.files.store import TensorStore

if TYPE_CHECKING:
    from torch import Tensor

    from lorashrink.engine.delta import AnyDelta

LARGEST = 1e38  # what float32 holds, in which programs multiply


@dataclass(frozen=True, eq=False)
class Layer:
    """One layer of an adapter; its tensors are read when `delta` is asked for."""

    name: str  # the part of the keys before the family's suffix
    family: Family
    keys: Mapping[str, str]  # role -> key in the file
    infos: Infos
    store: TensorStore = field(repr=False)
    config_scale: float = 1.0  # when the file has no alpha tensor
    config: Mapping[str, Any] = field(default_factory=dict, repr=False)  # PEFT's settings
    common: Mapping[str, str] = field(default_factory=dict)  # role -> key of a tensor that other layers use too
    base_shape: Shape | None = None  # where the file does not tell the whole shape
    weight: Callable[[], Tensor] | None = field(default=None, repr=False)  # reads the base weight

    @cached_property
    def shape(self) -> Shape:
        """Shape of the base weight, [out, in] or [out, in, kh, kw], as far as it is known."""
        return self.base_shape or self.family.shape(self.infos)

    @cached_property
    def rank(self) -> int:
        """Stored rank."""
        return self.family.rank(self.infos)

    @cached_property
    def width(self) -> int:
        """Rank of `delta`, as far as headers tell."""
        if self.family.needs is Needs.MULTIPLICATION:
            return min(self.shape[0], math.prod(self.shape[1:])) if len(self.shape) > 1 else 0
        return self.family.width(self.infos)

    @property
    def numbers(self) -> int:
        """How many numbers one dimension has in the two factors of a LoRA."""
        return self.shape[0] + self.family.experts * math.prod(self.shape[1:])

    @property
    def together(self) -> str:
        """What the layers have in common that must have one rank; "" if this is alone."""
        return self.name.replace(".base_layer", "") if self.family.name == "experts" else ""

    @cached_property
    def algo(self) -> str:
        """The family's name, with "+dora" (or "dora" alone for LoRA) if the layer has a magnitude."""
        if "magnitude" not in self.keys:
            return self.family.name
        return "dora" if self.family.name == "lora" else f"{self.family.name}+dora"

    @cached_property
    def own(self) -> Mapping[str, str]:
        """role -> key of the tensors that only this family has, which a LoRA replaces."""
        return {role: key for role, key in self.keys.items() if role not in SHARED}

    @cached_property
    def dtype(self) -> str:
        """The format's name of the dtype of the layer's largest tensor, e.g. "F16"."""
        return max((self.infos[role] for role in self.own), key=lambda info: info.nbytes).dtype

    @cached_property
    def alpha(self) -> float | None:
        """The stored alpha, or None if the file has none for this layer."""
        if "alpha" not in self.keys:
            return None
        tensor = self.store.read(self.keys["alpha"])
        if tensor.numel() != 1 or tensor.is_complex():
            raise ShapeError(
                f"{self.store.path}: {self.keys['alpha']} should be one number, it is {list(tensor.shape)}."
            )
        value = float(tensor)
        if math.isfinite(value) and abs(value) > LARGEST:
            raise ShapeError(
                f"{self.store.path}: {self.keys['alpha']} is {value:g}, which overflows in every program. "
                "Export the file again."
            )
        return value

    @cached_property
    def scale(self) -> float:
        """What the factors are multiplied with: mostly alpha / stored rank, or what the file's configuration says."""
        return self.family.scale(self.infos, self.alpha, self.config_scale)

    @property
    def off(self) -> bool:
        """Whether its alpha turns the layer off; where alpha is a constraint it does not."""
        return self.family.needs is not Needs.MULTIPLICATION and self.scale == 0

    @property
    def bound(self) -> bool:
        """Whether `delta` can be computed: some families need the base weight for it."""
        if self.family.needs is Needs.SHAPE:
            return self.base_shape is not None
        return self.family.needs is Needs.NOTHING or self.weight is not None

    @property
    def shape_known(self) -> bool:
        """Whether `shape` is that of the base weight, kernel included."""
        return self.base_shape is not None or not (
            self.family.flat(self.infos) or self.family.needs in (Needs.MULTIPLICATION, Needs.SHAPE)
        )

    @property
    def delta(self) -> AnyDelta:
        """ΔW, freshly read, in factors where it has them."""
        tensors = {role: self.store.read(key) for role, key in {**self.own, **self.common}.items()}
        reads_base = self.family.needs in (Needs.ADDITION, Needs.MULTIPLICATION)
        weight = self.weight() if self.weight and reads_base else None
        stored = Stored(tensors, self.scale, self.shape, weight, self.config)
        try:
            return self.family.delta(stored)
        except ShapeError as error:
            raise ShapeError(f"{self.store.path}: layer {self.name}: {error}") from error

    def on(self, shape: Shape, weight: Callable[[], Tensor] | None) -> Layer:
        """The layer with what it needs of the base: a shape that the file leaves open, and the weight."""
        incomplete = self.family.flat(self.infos) or self.family.needs is not Needs.NOTHING
        if not incomplete and "magnitude" not in self.keys:
            return self
        return replace(self, base_shape=shape if incomplete else None, weight=weight)


@dataclass(frozen=True, eq=False)
class Adapter:
    """An open adapter file: its layers, and the keys that belong to none, with the reason."""

    path: Path
    store: TensorStore = field(repr=False)
    layers: tuple[Layer, ...]
    others: Mapping[str, str]  # key -> why it is no part of a layer
    settings: peft.Settings = field(default_factory=dict, repr=False)
    as_folder: bool = False  # whether outputs are PEFT folders
    dropped: Mapping[str, str] = field(default_factory=dict)  # key or layer -> why no output has it
    notes: tuple[str, ...] = ()  # what users should know of every output

    def __iter__(self) -> Iterator[Layer]:
        return iter(self.layers)

    def __len__(self) -> int:
        return len(self.layers)

    @property
    def common(self) -> frozenset[str]:
        """Keys that several layers use."""
        return frozenset(key for layer in self.layers for key in layer.common.values())

    @contextmanager
    def reading(self, indices: Iterable[int]) -> Iterator[None]:
        """While this thread reads the layers with these indices: few reads of the file are made for all of them."""
        keys: dict[TensorStore, list[str]] = defaultdict(list)
        for index in indices:
            keys[self.layers[index].store] += self.layers[index].own.values()
        with ExitStack() as stack:
            for store, names in keys.items():
                stack.enter_context(store.together(names))
            yield

    def close(self) -> None:
        """Close the file."""
        self.store.close()

    def __enter__(self) -> Adapter:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()
