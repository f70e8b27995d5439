"""Adapters: which tensors of a file form a layer, and what that layer adds to the base.

`FAMILIES` is the registry. A new family is a file beside `lora.py` with rows for this table.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorashrink.adapters import (
    adalora,
    embedding,
    full,
    glora,
    ia3,
    loha,
    lokr,
    lora,
    oft,
    peft,
    vera,
)
from lorashrink.adapters.family import SHARED, Family, Infos, Needs, Shape, Stored
from lorashrink.adapters.looks import family_of
from lorashrink.errors import NotAnAdapter, ShapeError
from lorashrink.files import FLOATS, TensorInfo, TensorStore, open_tensors

if TYPE_CHECKING:
    from torch import Tensor

    from lorashrink.delta import AnyDelta

# Of families with the same suffixes the first one whose marks are there wins.
FAMILIES: tuple[Family, ...] = (
    *adalora.FAMILIES,
    *lora.FAMILIES,
    *loha.FAMILIES,
    *lokr.FAMILIES,
    *glora.FAMILIES,
    *full.FAMILIES,
    *oft.FAMILIES,
    *ia3.FAMILIES,
    *vera.FAMILIES,
    *embedding.FAMILIES,
)

# Tensors that only adapters have but that are no weight matrix's ΔW: ending -> why they stay as they are.
CARRIED: tuple[tuple[str, str], ...] = (
    (r"\.diff_b|\.b_norm", "a difference of a bias"),
    (r"\.w_norm", "a difference of a normalisation layer"),
    (r"\.(?:set|reshape)_weight", "replaces a weight of the base"),
    (r"\.(?:[pq]_layer\.weight|lambda_layer)", "T-LoRA, whose ΔW depends on the base model's time step"),
    (r"\.fourierft_spectrum(?:\.[^.]+)*", "FourierFT, which has no factors"),
    (
        r"\.?vblora_(?:logits_[AB](?:_topk_(?:indices|weights))?|vector_bank)(?:\.[^.]+)*",
        "VB-LoRA, whose layers share one bank of vectors",
    ),
    (r"\.hra_u(?:\.[^.]+)*", "HRA, a product of reflections"),
    (r"\.boft_[Rs](?:\.[^.]+)*", "BOFT as PEFT stores it, which multiplies the base weight"),
    (r"\.(?:shira_weight|randlora_(?:lambda|gamma)|c3a_kernel)(?:\.[^.]+)*", "has no factors"),
    (r"\.lokr_t1", "a reserved tensor of LoKr"),
    (r"\.ln_tuning_layers\.(?:weight|bias)", "a whole normalisation layer"),
)
# Tensors that come with adapters and that bases have too: they do not tell an adapter from a base.
COMPANIONS: tuple[tuple[str, str], ...] = (
    (r"\.base_layer\.[^.]+$", "a tensor of the base model, saved beside its adapter"),
    (r"^base_model\.model\..+\.(?:weight|bias)$", "a whole weight that was trained or saved with the adapter"),
    (r"\.(?:query|key)_norm\.scale$", "replaces a normalisation layer's scale"),
    (r"^bundle_emb\.|(?:^|\.)emb_params$|^string_to_param", "an embedding that comes with the adapter"),
)
UNKNOWN = "not part of an adapter layer"
_CARRIED = re.compile("|".join(f"(?P<c{number}>{ending})$" for number, (ending, _) in enumerate(CARRIED)))


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

    @property
    def rank(self) -> int:
        """Stored rank."""
        return self.family.rank(self.infos)

    @property
    def width(self) -> int:
        """Rank of `delta`, as far as headers tell."""
        if self.family.needs is Needs.MULTIPLICATION:
            return min(self.shape[0], math.prod(self.shape[1:])) if len(self.shape) > 1 else 0
        return self.family.width(self.infos)

    @property
    def algo(self) -> str:
        """The family's name, with "+dora" (or "dora" alone for LoRA) if the layer has a magnitude."""
        if "magnitude" not in self.keys:
            return self.family.name
        return "dora" if self.family.name == "lora" else f"{self.family.name}+dora"

    @property
    def own(self) -> Mapping[str, str]:
        """role -> key of the tensors that only this family has, which a LoRA replaces."""
        return {role: key for role, key in self.keys.items() if role not in SHARED}

    @property
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
        return float(tensor)

    @property
    def scale(self) -> float:
        """What the factors are multiplied with: mostly alpha / stored rank, or what the file's configuration says."""
        return self.family.scale(self.infos, self.alpha, self.config_scale)

    @property
    def off(self) -> bool:
        """Whether its alpha turns the layer off; where alpha is a constraint it does not."""
        return self.family.needs is not Needs.MULTIPLICATION and self.scale == 0

    @property
    def bound(self) -> bool:
        """Whether `delta` can be had: some families need the base weight for it."""
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
        try:
            return self.family.delta(Stored(tensors, self.scale, self.shape, weight, self.config))
        except ShapeError as error:
            raise ShapeError(f"{self.store.path}: layer {self.name}: {error}") from error

    def on(self, shape: Shape, weight: Callable[[], Tensor] | None) -> Layer:
        """The same layer with what the base knows: a shape that the file leaves open, and the weight if needed."""
        open_shape = self.family.flat(self.infos) or self.family.needs is not Needs.NOTHING
        return replace(self, base_shape=shape if open_shape else None, weight=weight)


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

    def __iter__(self) -> Iterator[Layer]:
        return iter(self.layers)

    def __len__(self) -> int:
        return len(self.layers)

    @property
    def common(self) -> frozenset[str]:
        """Keys that several layers use."""
        return frozenset(key for layer in self.layers for key in layer.common.values())

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
    of_folder = peft.is_folder(folder) and path in (folder, *(folder / name for name in peft.WEIGHTS_FILES))
    store = open_tensors(peft.weights_in(folder) if of_folder else path)
    try:
        settings = peft.from_folder(folder) if of_folder else peft.from_metadata(store.metadata)
        return replace(adapter_of(path, store, settings), as_folder=of_folder)
    except BaseException:
        store.close()
        raise


def adapter_of(path: Path, store: TensorStore, settings: peft.Settings) -> Adapter:
    """The adapter that these tensors make. Raises as `open_adapter`."""
    layers, others = _sort_keys(store, settings)
    if not layers and not any(_CARRIED.search(key) for key in others):
        raise NotAnAdapter(
            f"{path}: no adapter layer found among its {len(store.tensors)} tensors. "
            "If this is the base checkpoint, give it first or with --base."
        )
    return Adapter(path, store, layers, others, settings)


def looks_like_adapter(keys: Mapping[str, object]) -> bool:
    """Whether any of these tensor names ends as only adapters' do."""
    for key in keys:
        found = _SUFFIX.search(key)
        if (found and _ROLES[str(found.lastgroup)] not in _WEAK) or _CARRIED.search(key):
            return True
    return False


def layer_name(key: str) -> str:
    """The layer, or base module, that a tensor of an adapter belongs to: its name without the family's ending."""
    found = _CARRIED.search(key) or _SUFFIX.search(key)
    return key[: found.start()] if found else key


def adapter_family(adapter: Adapter) -> str | None:
    """The family of models that the adapter's own names and widths point to, or None if they do not tell."""
    return family_of((layer.name, layer.shape) for layer in adapter.layers)


# --- sorting keys -------------------------------------------------------------------------------


def _marks(family: Family) -> frozenset[str]:
    return family.marks or frozenset(family.suffixes)


# Every suffix once, under a name that regular expressions allow; the leftmost match is the longest suffix.
_ROLES: dict[str, str] = {
    f"s{number}": suffix
    for number, suffix in enumerate(
        dict.fromkeys([suffix for family in FAMILIES for suffix in family.suffixes.values()] + list(SHARED.values()))
    )
}
# An empty group marks each; so that every alternative begins with a dot or a letter, which re uses to skip the rest.
_SUFFIX = re.compile("|".join(f"{suffix}(?P<{name}>)$" for name, suffix in _ROLES.items()))
_COMMON = re.compile(
    "|".join(f"^(?:{name})$" for name in dict.fromkeys(name for family in FAMILIES for name in family.common.values()))
    or r"(?!)"
)


def _weak(suffix: str) -> bool:
    """Whether a suffix alone does not prove that a tensor belongs to an adapter."""
    return not any(
        suffix == each and role in _marks(family) for family in FAMILIES for role, each in family.suffixes.items()
    )


_WEAK = frozenset(suffix for suffix in _ROLES.values() if _weak(suffix))


def _sort_keys(store: TensorStore, settings: peft.Settings) -> tuple[tuple[Layer, ...], dict[str, str]]:
    groups: dict[str, dict[str, str]] = {}  # layer name -> suffix -> key
    others: dict[str, str] = {}
    carried: dict[str, str] = {}  # layer name -> why tensors of it are carried along
    for key in store.tensors:
        # what all layers share is sorted with the first layer that uses it
        if _COMMON.search(key):
            others[key] = "shared by layers that stay as they are"
        elif (found := _SUFFIX.search(key)) and not (
            (suffix := _ROLES[str(found.lastgroup)]) in _WEAK and _CARRIED.search(key)
        ):
            roles = groups.setdefault(key[: found.start()], {})
            if suffix in roles:
                raise ShapeError(
                    f"{store.path}: {key} and {roles[suffix]} both are a part of one layer: the file holds "
                    "several adapters. Export them one by one."
                )
            roles[suffix] = key
        elif found := _CARRIED.search(key):
            others[key] = carried[key[: found.start()]] = CARRIED[int(str(found.lastgroup)[1:])][1]
        else:
            others[key] = _companion(key)
    layers = []
    for name, tagged in groups.items():
        if tagged.keys() <= set(SHARED.values()):
            others |= dict.fromkeys(tagged.values(), carried.get(name, "belongs to factors that are not there"))
            continue
        layer = _layer(store, name, tagged, settings, others)
        if layer:
            layers.append(layer)
    for layer in layers:
        for key in layer.common.values():
            others.pop(key, None)
    return tuple(layers), others


def _companion(key: str) -> str:
    return next((reason for pattern, reason in COMPANIONS if re.search(pattern, key)), UNKNOWN)


def _layer(
    store: TensorStore, name: str, tagged: Mapping[str, str], settings: peft.Settings, others: dict[str, str]
) -> Layer | None:
    """The layer that these tensors make; None if they are none, with the reason in `others`."""
    if tagged.keys() <= _WEAK:
        others |= {key: _companion(key) for key in tagged.values()}
        return None
    family = _family(store, name, tagged)
    if family is None:
        together = f"its layer, {name}, is made of several families"
        others |= dict.fromkeys(tagged.values(), together)
        return None
    by_suffix = {suffix: role for role, suffix in {**SHARED, **family.suffixes}.items()}
    for suffix in tagged.keys() - by_suffix.keys():
        others[tagged[suffix]] = _companion(tagged[suffix])
    keys = {by_suffix[suffix]: key for suffix, key in tagged.items() if suffix in by_suffix}
    common = {
        role: key for role, pattern in family.common.items() for key in store.tensors if re.fullmatch(pattern, key)
    }
    infos = {role: store.tensors[key] for role, key in {**keys, **common}.items()}
    if reason := _not_decomposable(family, infos):
        others |= dict.fromkeys(keys.values(), reason)
        return None
    _check(store, name, family, keys, infos)
    try:
        scale = peft.scale(settings, name, family.rank(infos))
    except (ValueError, TypeError, ZeroDivisionError, re.error) as error:
        raise ShapeError(
            f"{store.path}: layer {name}: its lora_alpha or a pattern is broken ({error}). Export it again."
        ) from error
    return Layer(name, family, keys, infos, store, scale, peft.config(settings, name), common)


def _family(store: TensorStore, name: str, tagged: Mapping[str, str]) -> Family | None:
    """The first family that has all these suffixes, of which only weak ones may belong to none; None if none has."""
    strong = tagged.keys() - _WEAK
    marked = [
        family
        for family in FAMILIES
        if any(family.suffixes[role] in strong for role in _marks(family) if role in family.suffixes)
    ]
    for family in marked:
        if strong <= set(family.suffixes.values()):
            return family
    if len({family.name for family in marked}) == 1:
        raise ShapeError(
            f"{store.path}: layer {name} is there in two spellings: {', '.join(sorted(tagged.values()))}. "
            "Export the file again."
        )
    return None


def _not_decomposable(family: Family, infos: Infos) -> str | None:
    """Why tensors that are complete as they are make no ΔW of a matrix."""
    if family.name == "full" and full.is_vector(infos):
        return "a difference of a vector"
    if family.common and not family.common.keys() <= infos.keys():
        return "its shared matrices are not in the file"
    return None


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
        if math.prod(infos[role].shape) > 1 and dtype not in FLOATS:  # alphas and switches may be whole numbers
            raise ShapeError(f"{store.path}: layer {name}: {key} is {dtype}, and factors are floats.")


def lora_form(layer: Layer) -> tuple[str, Family, Mapping[str, str], Infos]:
    """(name, family, role -> key, role -> info with rank 1) of this layer as LoRA, in the spelling of its name.

    Names with dots are diffusers', ComfyUI's and PEFT's, whose factors have no alpha; flattened ones are kohya's.
    """
    out, *fan_in = layer.shape
    name = re.sub("^oft_unet_", "lora_unet_", layer.name)  # a prefix that no loader of LoRA knows
    infos = {
        "up": TensorInfo("F16", (out, 1, *[1] * (len(fan_in) - 1)), 0),
        "down": TensorInfo("F16", (1, *fan_in), 0),
    }
    if "." in name:
        return name, lora.PEFT, {"up": f"{name}.lora_B.weight", "down": f"{name}.lora_A.weight"}, infos
    keys = {"up": f"{name}.lora_up.weight", "down": f"{name}.lora_down.weight", "alpha": f"{name}.alpha"}
    return name, lora.KOHYA, keys, {**infos, "alpha": TensorInfo("F32", (), 4)}
