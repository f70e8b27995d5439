"""Adapters: which tensors of a file form a layer, and what that layer adds to the base.

`FAMILIES` is the registry. A new family is a file beside `lora.py` with rows for this table.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from lorashrink.adapters import lora, peft
from lorashrink.adapters.family import SHARED, Family
from lorashrink.errors import NotAnAdapter, ShapeError
from lorashrink.files import FLOATS, TensorInfo, TensorStore, open_tensors
from lorashrink.names import address

if TYPE_CHECKING:
    from lorashrink.delta import Delta

FAMILIES: tuple[Family, ...] = lora.FAMILIES

# Endings that belong to adapters of families which are recognised but not decomposed (yet): they tell
# an adapter from a checkpoint, and a layer that carries one is more than its two factors.
FOREIGN = re.compile(
    r"\.(?:hada_[wt][12](?:_[ab])?|lokr_[wt][12](?:_[ab])?|oft_(?:blocks|R\.weight)|rescale|on_input"
    r"|[ab][12m]\.weight|lora_(?:embedding_[AB]|E|[AB]\.bias)(?:\.[^.]+)*|diff(?:_b)?|[wb]_norm"
    r"|set_weight|reshape_weight|ia3_l|vera_lambda_[bd]|[pq]_layer\.weight|lambda_layer)$"
)


@dataclass(frozen=True, eq=False)
class Layer:
    """One layer of an adapter; its tensors are read when `delta` is asked for."""

    name: str  # the part of the keys before the family's suffix
    family: Family
    keys: Mapping[str, str]  # role -> key in the file
    infos: Mapping[str, TensorInfo]
    store: TensorStore = field(repr=False)
    config_scale: float = 1.0  # when the file has no alpha tensor

    @cached_property
    def shape(self) -> tuple[int, ...]:
        """Shape of the base weight: [out, in] or [out, in, kh, kw]."""
        return self.family.shape(self.infos)

    @property
    def rank(self) -> int:
        """Stored rank."""
        return self.family.rank(self.infos)

    @property
    def algo(self) -> str:
        """The family's name, or "dora" if the layer has a magnitude."""
        return "dora" if "magnitude" in self.keys else self.family.name

    @property
    def dtype(self) -> str:
        """The format's name of the factors' dtype, e.g. "F16"."""
        return self.infos["up"].dtype

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
        return float(tensor)

    @property
    def scale(self) -> float:
        """alpha / stored rank; without an alpha tensor what the file's configuration says, else 1."""
        return self.config_scale if self.alpha is None else self.alpha / self.rank

    @property
    def delta(self) -> Delta:
        """ΔW in factors, freshly read."""
        tensors = {role: self.store.read(key) for role, key in self.keys.items() if role not in SHARED}
        return self.family.delta(tensors, self.scale, self.shape)


@dataclass(frozen=True, eq=False)
class Adapter:
    """An open adapter file: its layers, and the keys that belong to none, with the reason."""

    path: Path
    store: TensorStore = field(repr=False)
    layers: tuple[Layer, ...]
    others: Mapping[str, str]  # key -> why it is no part of a layer
    settings: peft.Settings = field(default_factory=dict, repr=False)

    def __iter__(self) -> Iterator[Layer]:
        return iter(self.layers)

    def __len__(self) -> int:
        return len(self.layers)

    def close(self) -> None:
        """Close the file."""
        self.store.close()

    def __enter__(self) -> Adapter:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def open_adapter(path: str | Path) -> Adapter:
    """Open an adapter file or PEFT folder and sort its keys into layers, from the header alone.

    Raises InputError or DamagedFile (unreadable), NotAnAdapter (no key looks like an adapter's), and
    ShapeError (a factor is missing, or the factors of a layer do not fit each other).
    """
    path = Path(path)
    folder = path if peft.is_folder(path) else path.parent
    # A file that PEFT saved is half an adapter: its scale is in the file beside it.
    of_folder = peft.is_folder(folder) and path in (folder, folder / peft.WEIGHTS_FILE)
    store = open_tensors(folder / peft.WEIGHTS_FILE if of_folder else path)
    try:
        settings = peft.from_folder(folder) if of_folder else peft.from_metadata(store.metadata)
        layers, others = _sort_keys(store, settings)
        if not layers and not any(FOREIGN.search(key) for key in others):
            raise NotAnAdapter(
                f"{path}: no adapter layer found among its {len(store.tensors)} tensors. "
                "If this is the base checkpoint, give it first or with --base."
            )
        return Adapter(path, store, layers, others, settings)
    except BaseException:
        store.close()
        raise


def looks_like_adapter(keys: Mapping[str, object]) -> bool:
    """Whether any of these tensor names ends as only adapters' do."""
    return any(_SUFFIX.search(key) or FOREIGN.search(key) for key in keys if not key.endswith(".alpha"))


# One expression for all suffixes; its group name "f0_up" leads back to FAMILIES[0] and the role, "any_alpha" to a
# role that every family may have.
_SUFFIX = re.compile(
    "|".join(
        f"(?P<f{number}_{role}>{suffix})$"
        for number, family in enumerate(FAMILIES)
        for role, suffix in family.suffixes.items()
    )
    + "".join(f"|(?P<any_{role}>{suffix})$" for role, suffix in SHARED.items())
)


def _sort_keys(store: TensorStore, settings: peft.Settings) -> tuple[tuple[Layer, ...], dict[str, str]]:
    groups: dict[str, dict[str, str]] = {}  # layer name -> "f0_up" -> key
    others: dict[str, str] = {}
    extras: dict[str, str] = {}  # layer name -> a foreign key that belongs to it
    for key in store.tensors:
        if found := _SUFFIX.search(key):
            roles = groups.setdefault(key[: found.start()], {})
            if found.lastgroup in roles:
                raise ShapeError(
                    f"{store.path}: {key} and {roles[found.lastgroup]} both are a part of one layer: the file holds "
                    "several adapters. Export them one by one."
                )
            roles[str(found.lastgroup)] = key
        elif found := FOREIGN.search(key):
            others[key] = "of a family that is not decomposed"
            extras[key[: found.start()]] = key
        else:
            others[key] = "not part of an adapter layer"
    layers = []
    for name, tagged in groups.items():
        if name in extras:
            others |= dict.fromkeys(tagged.values(), f"belongs together with {extras[name]}, which is not decomposed")
        elif all(tag.startswith("any_") for tag in tagged):
            others |= dict.fromkeys(tagged.values(), "belongs to factors that are not there")
        else:
            layers.append(_layer(store, name, tagged, settings))
    return tuple(layers), others


def _layer(store: TensorStore, name: str, tagged: Mapping[str, str], settings: peft.Settings) -> Layer:
    numbers = {tag.partition("_")[0] for tag in tagged} - {"any"}
    if len(numbers) > 1:
        raise ShapeError(
            f"{store.path}: layer {name} is there in two spellings: {', '.join(sorted(tagged.values()))}. "
            "Export the file again."
        )
    family = FAMILIES[int(min(numbers)[1:])]
    keys = {tag.partition("_")[2]: key for tag, key in tagged.items()}
    if missing := family.required - keys.keys():
        raise ShapeError(
            f"{store.path}: layer {name} has {', '.join(sorted(tagged.values()))} but no "
            f"{' and '.join(sorted(missing))} factor beside it. The file is incomplete; export it again."
        )
    infos = {role: store.tensors[key] for role, key in keys.items()}
    if problem := family.check(infos):
        raise ShapeError(f"{store.path}: layer {name}: {problem}. Export the file again.")
    for role, info in infos.items():
        if role != "alpha" and info.dtype not in FLOATS:
            raise ShapeError(f"{store.path}: layer {name}: {keys[role]} is {info.dtype}, and factors are floats.")
    try:
        scale = peft.scale(settings, name, family.rank(infos))
    except (ValueError, TypeError, re.error) as error:
        raise ShapeError(
            f"{store.path}: layer {name}: its lora_alpha or a pattern is broken ({error}). Export it again."
        ) from error
    return Layer(name, family, keys, infos, store, scale)


# Names and widths that only one family has. The first row with all its marks decides.
_LOOKS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("sdxl", ("te2_",)),
    ("sdxl", ("unet_", "transformer_blocks_2_")),
    ("sdxl", ("attn2_to_k:2048",)),
    ("sd15", ("attn2_to_k:768",)),
    ("sd2", ("attn2_to_k:1024",)),
)


def adapter_family(adapter: Adapter) -> str | None:
    """The family of models that the adapter's own names and widths point to, or None if they do not tell."""
    marks = set()
    for layer in adapter.layers:
        part, flat = address(layer.name)
        marks.add(f"{part}_{flat}")
        if flat.endswith("attn2_to_k"):
            marks.add(f"attn2_to_k:{layer.shape[1]}")
    for family, needed in _LOOKS:
        if all(any(mark in seen for seen in marks) for mark in needed):
            return family
    return None
