"""Which tensors of a file form a layer, from their names and shapes alone.

`FAMILIES` is the registry. A new family is a file beside `lora.py` with rows for this table.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping

from lorashrink.adapters import adalora, embedding, full, glora, ia3, loha, lokr, lora, oft, peft, vera
from lorashrink.adapters.family import SHARED, Family, Infos
from lorashrink.adapters.layer import Layer
from lorashrink.errors import ShapeError
from lorashrink.files.store import FLOATS, TensorStore

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


def sort_keys(store: TensorStore, settings: peft.Settings) -> tuple[tuple[Layer, ...], dict[str, str]]:
    """(layers, key -> why it is no part of one). Raises ShapeError if the tensors of a layer do not fit."""
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
    if not family.common.keys() <= infos.keys():
        return "its shared matrices are not in the file"
    return family.carried(infos)


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
