"""Sort the tensors of a file into layers, from their names and shapes alone."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property, lru_cache

import regex

from lorashrink.adapters import families, peft
from lorashrink.adapters.changed_base import against_true_base
from lorashrink.adapters.experts import of_experts
from lorashrink.adapters.family import SHARED, Family, Infos
from lorashrink.adapters.layer import LARGEST, Layer
from lorashrink.adapters.peft_keys import changes_base
from lorashrink.errors import ShapeError
from lorashrink.files.packed import INDEX
from lorashrink.files.store import FLOATS, TensorStore

UNKNOWN = "not part of an adapter layer"
_CARRIED = re.compile("|".join(f"(?P<c{number}>{ending})$" for number, (ending, _) in enumerate(families.CARRIED)))


_REMEMBERED = 20_000  # names of tensors


@dataclass(frozen=True, eq=False)
class Endings:
    """What the names of tensors end with, in all families together."""

    families: tuple[Family, ...]
    # An output has the names of its input, and the files of a batch mostly have the same.
    _splits: dict[str, tuple[str, str] | None] = field(default_factory=dict, init=False, repr=False)
    _choices: dict[frozenset[str], tuple[Family | None, bool]] = field(default_factory=dict, init=False, repr=False)

    @cached_property
    def suffixes(self) -> tuple[str, ...]:
        """Every suffix once."""
        own = [suffix for family in self.families for suffix in family.suffixes.values()]
        return tuple(dict.fromkeys([*own, *SHARED.values()]))

    @cached_property
    def weak(self) -> frozenset[str]:
        """Suffixes that alone do not prove that a tensor belongs to an adapter."""
        proofs = {
            suffix for family in self.families for role, suffix in family.suffixes.items() if role in family.proofs
        }
        return frozenset(self.suffixes) - proofs

    @cached_property
    def suffix_pattern(self) -> re.Pattern[str]:
        """Matches the suffix of a tensor's name, in a group that has its number."""
        # The leftmost match is the longest suffix. An empty group behind each names it, so that every alternative
        # begins with a dot or a letter, which re uses to skip the rest.
        return re.compile("|".join(f"{suffix}(?P<s{number}>)$" for number, suffix in enumerate(self.suffixes)))

    @cached_property
    def common_pattern(self) -> re.Pattern[str]:
        """Matches the names of tensors that several layers share."""
        names = dict.fromkeys(name for family in self.families for name in family.common.values())
        return re.compile("|".join(f"^(?:{name})$" for name in names) or r"(?!)")

    def split(self, key: str) -> tuple[str, str] | None:
        """(name of the layer, suffix) of a tensor's name; None if it ends as no family's do."""
        if key in self._splits:
            return self._splits[key]
        match = self.suffix_pattern.search(key)
        split = (key[: match.start()], self.suffixes[int(str(match.lastgroup)[1:])]) if match else None
        if len(self._splits) < _REMEMBERED:
            self._splits[key] = split
        return split

    def choice(self, suffixes: frozenset[str]) -> tuple[Family | None, bool]:
        """(the first family that has all these suffixes, of which only weak ones may belong to none, or None;
        whether they are one family's in two spellings). Thousands of layers have few sets of them."""
        if suffixes not in self._choices:
            strong = suffixes - self.weak
            marked = [
                family
                for family in self.families
                if any(family.suffixes[role] in strong for role in family.proofs if role in family.suffixes)
            ]
            fitting = next((family for family in marked if strong <= set(family.suffixes.values())), None)
            twice = fitting is None and len({family.name for family in marked}) == 1
            self._choices[suffixes] = fitting, twice
        return self._choices[suffixes]


# The registry is read at each call, so that a family added to it counts at once.
_endings = lru_cache(maxsize=4)(Endings)


def looks_like_adapter(keys: Mapping[str, object]) -> bool:
    """Whether any of these tensor names ends as only adapters' do, or is that of a packed adapter."""
    endings = _endings(families.FAMILIES)
    return INDEX in keys or any(
        ((split := endings.split(key)) and split[1] not in endings.weak) or _CARRIED.search(key) for key in keys
    )


def layer_name(key: str) -> str:
    """The layer, or base module, that a tensor of an adapter belongs to: its name without the family's ending."""
    if carried := _CARRIED.search(key):
        return key[: carried.start()]
    split = _endings(families.FAMILIES).split(key)
    return split[0] if split else key


def sort_keys(store: TensorStore, settings: peft.Settings) -> tuple[tuple[Layer, ...], dict[str, str]]:
    """(layers, key -> why it is no part of one). Raises ShapeError if the tensors of a layer do not fit."""
    endings = _endings(families.FAMILIES)
    groups, others, carried = _grouped(store, endings)
    layers = []
    patterns = peft.Patterns()
    shared = set(SHARED.values())
    for name, keys in groups.items():
        family, twice = endings.choice(frozenset(keys))
        if keys.keys() <= shared:
            others |= dict.fromkeys(keys.values(), carried.get(name, "belongs to factors that are not there"))
        elif keys.keys() <= endings.weak:
            others |= {key: _companion(key) for key in keys.values()}
        elif family:
            layer, stay = _layer(store, settings, patterns, family, name, keys)
            others |= stay
            if layer:
                layers.append(layer)
        elif twice:
            raise ShapeError(
                f"{store.path}: layer {name} is there in two spellings: {', '.join(sorted(keys.values()))}. "
                "Export the file again."
            )
        else:
            others |= dict.fromkeys(keys.values(), f"its layer, {name}, is made of several families")
    for key in {key for layer in layers for key in layer.common.values()}:
        others.pop(key, None)
    return tuple(layers), others


def _grouped(store: TensorStore, endings: Endings) -> tuple[dict[str, dict[str, str]], dict[str, str], dict[str, str]]:
    """(layer -> suffix -> key, other key -> why it is in no layer, layer -> why tensors of it are carried)."""
    groups: dict[str, dict[str, str]] = {}
    others: dict[str, str] = {}
    carried: dict[str, str] = {}
    for key in store.tensors:
        if endings.common_pattern.search(key):  # it is taken out of `others` again if a layer uses it
            others[key] = "shared by layers that stay as they are"
        elif (split := endings.split(key)) and not (split[1] in endings.weak and _CARRIED.search(key)):
            name, suffix = split
            keys = groups.setdefault(name, {})
            if suffix in keys:
                raise ShapeError(
                    f"{store.path}: {key} and {keys[suffix]} both are a part of one layer: the file holds "
                    "several adapters. Export them one by one."
                )
            keys[suffix] = key
        elif match := _CARRIED.search(key):
            others[key] = carried[key[: match.start()]] = families.CARRIED[int(str(match.lastgroup)[1:])][1]
        else:
            others[key] = _companion(key)
    return groups, others, carried


def _companion(key: str) -> str:
    return next((reason for pattern, reason in families.COMPANIONS if re.search(pattern, key)), UNKNOWN)


def _layer(
    store: TensorStore,
    settings: peft.Settings,
    patterns: peft.Patterns,
    family: Family,
    name: str,
    tagged: Mapping[str, str],
) -> tuple[Layer | None, dict[str, str]]:
    """(the layer that these tensors make, or None; key -> why it is no part of it). `tagged` maps suffixes to keys."""
    roles = {suffix: role for role, suffix in {**SHARED, **family.suffixes}.items()}
    stay = {key: _companion(key) for suffix, key in tagged.items() if suffix not in roles}
    keys = {roles[suffix]: key for suffix, key in tagged.items() if suffix in roles}
    common = {
        role: key for role, pattern in family.common.items() for key in store.tensors if re.fullmatch(pattern, key)
    }
    infos = {role: store.tensors[key] for role, key in {**keys, **common}.items()}
    try:
        config = peft.config(settings, name)
        complete = family.common.keys() <= infos.keys()
        reason = None if complete else "its shared matrices are not in the file"
        reason = reason or family.carried(infos, config)
        if not reason and family.name == "lora" and "lora_A" in family.suffixes["down"] and "down" in infos:
            count = peft.experts(settings, name, next(iter(infos["down"].shape), 0), patterns)
            family = of_experts(count) if isinstance(count, int) and count else family
            reason = count if isinstance(count, str) else None
        if reason:
            return None, stay | dict.fromkeys(keys.values(), reason)
        _check(store, name, family, keys, infos)
        scale = peft.scale(settings, name, family.rank(infos), patterns)
        if not abs(scale) <= LARGEST:
            raise ValueError(f"the scale is {scale:g}")
    except (ValueError, TypeError, ArithmeticError, AttributeError, regex.error, TimeoutError) as error:
        raise ShapeError(
            f"{store.path}: layer {name}: its lora_alpha or a pattern is broken ({error}). Export it again."
        ) from error
    if family.name == "lora" and (initialisation := changes_base(config)):
        family = against_true_base(family, initialisation)
    return Layer(name, family, keys, infos, store, scale, config, common), stay


def _check(store: TensorStore, name: str, family: Family, keys: Mapping[str, str], infos: Infos) -> None:
    if not any(required <= infos.keys() for required in family.required):
        nearest = min(family.required, key=lambda required: len(required - infos.keys()))
        raise ShapeError(
            f"{store.path}: layer {name} has {', '.join(sorted(keys.values()))} but no "
            f"{' and '.join(sorted(nearest - infos.keys()))} factor beside it. The file is incomplete; export it again."
        )
    if problem := family.check(infos):
        raise ShapeError(f"{store.path}: layer {name}: {problem}. Export the file again.")
    for role, key in keys.items():
        dtype = infos[role].dtype
        if dtype not in FLOATS and math.prod(infos[role].shape) > 1:  # alphas and switches may be whole numbers
            raise ShapeError(f"{store.path}: layer {name}: {key} is {dtype}, and factors are floats.")
