"""An adapter under the names of another program: kohya's, diffusers', ComfyUI's or PEFT's.

Names are never taken apart. The base says which rows of which weight a layer changes, and what these rows are called
in the other layout; where one layout fuses what the other splits, rows of `up` are gathered, and `down` is stacked.
Factors are copied bit by bit wherever their strength can be said beside them.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple

from lorashrink.adapters import Adapter, Layer, adapter_of, layer_name, peft
from lorashrink.adapters.family import Shape
from lorashrink.bases import Base, BaseFamily, Views, views_shape
from lorashrink.errors import NonFinite, ShapeError, UsageError
from lorashrink.files.store import ComputedStore, TensorInfo, cast, tensor_info
from lorashrink.linking.matching import match

if TYPE_CHECKING:
    from torch import Tensor

NAMINGS = ("kohya", "diffusers", "comfy", "peft")

# What belongs to a layer of factors; a layer with other tensors can only be renamed as a whole.
_FACTORS = {"up", "down", "alpha"}

Made = tuple[TensorInfo, Callable[[], "Tensor"]]


class _Rows(NamedTuple):
    """Rows of a module that one layer, or none, writes."""

    layer: int | None
    start: int  # in the layer
    size: int


@dataclass(frozen=True, eq=False)
class _Target:
    """A module of the other layout, and where its rows come from."""

    part: str
    module: str
    rows: tuple[_Rows, ...]

    @property
    def sources(self) -> tuple[int, ...]:
        return tuple(dict.fromkeys(each.layer for each in self.rows if each.layer is not None))


@dataclass(frozen=True, eq=False)
class Renamed:
    """An adapter under other names."""

    adapter: Adapter
    kept: Mapping[str, str]  # key -> why it has its old name
    exact: bool  # whether every number of it is one of the input's


@dataclass(eq=False)
class _Output:
    dtype: str | None  # of factors; None leaves them theirs
    made: dict[str, Made] = field(default_factory=dict)
    scales: dict[str, tuple[int, float]] = field(default_factory=dict)  # module name -> (rank, scale), for PEFT
    kept: dict[str, str] = field(default_factory=dict)  # key -> why it has its old name
    exact: bool = True


def renamed(adapter: Adapter, naming: str, base: Base, dtype: str | None = None) -> Renamed:
    """The adapter in another naming, its factors in this dtype of the format. Nothing is computed before it is read.

    Raises UsageError (a naming that cannot hold the adapter), ShapeError (layers that overlap, or do not fit
    the base) and FamilyMismatch.
    """
    output = _Output(dtype)
    targets, left = _targets(adapter, base, layout_of(naming, base))
    parts = {target.part for target in targets}
    if naming == "peft" and len(parts) > 1:
        raise UsageError(
            f"{adapter.path}: changes {len(parts)} models ({', '.join(sorted(parts))}), and a PEFT folder is for one. "
            "Use diffusers naming."
        )
    if naming == "peft" and (other := [layer.algo for layer in adapter.layers if not _is_lora(layer)]):
        raise UsageError(
            f"{adapter.path}: is {other[0]}, and only LoRA is written as a PEFT folder. Shrink it with --as lora first."
        )
    for target in targets:
        _write(output, adapter, target, layer_name_in(naming, base.family, target.part, target.module), naming)
    for index in left:
        _keep(output, adapter.layers[index], "the base has no other name for it")
    named = {views: address for address, views in base.modules(layout_of(naming, base)).items()}
    for key, reason in adapter.others.items():
        name = layer_name(key)
        if address := named.get(base.find(name)):  # a bias of a weight goes where the weight goes
            _copy(output, adapter, key, layer_name_in(naming, base.family, *address) + key[len(name) :])
        else:
            output.kept[key] = reason
    for key in (*output.kept, *adapter.common):
        _copy(output, adapter, key, key)
    metadata = {key: text for key, text in adapter.store.metadata.items() if key != peft.METADATA_KEY}
    widest = max((rank for rank, _ in output.scales.values()), default=0)
    if metadata.get("ss_network_dim", "").isdigit() and widest > int(metadata["ss_network_dim"]):
        metadata["ss_network_dim"] = str(widest)  # where layers were fused
    settings = _settings(adapter, output) if naming == "peft" else {}
    store = ComputedStore(adapter.path, output.made, metadata, adapter.store.files, adapter.store.headers)
    new = replace(adapter_of(adapter.path, store, settings), as_folder=naming == "peft")
    return Renamed(new, output.kept, output.exact)


def _copy(output: _Output, adapter: Adapter, key: str, new: str) -> None:
    if new in output.made:
        raise ShapeError(f"{adapter.path}: {new} would be the name of two tensors. Export the file again.")
    output.made[new] = (adapter.store.tensors[key], partial(adapter.store.read, key))


def check_naming(naming: str | None, base: object) -> None:
    """Raises UsageError if this is no naming, or none can be had because there is no base."""
    if naming not in (None, *NAMINGS):
        raise UsageError(f"naming: '{naming}' is not one of {', '.join(NAMINGS)}.")
    if naming and base is None:
        raise UsageError("naming: new names come from the base; give it first or with --base. A norm table is enough.")


def layout_of(naming: str, base: Base) -> str:
    """The layout whose module names a naming is made of."""
    if naming == "kohya":
        return base.family.kohya
    return "native" if naming == "comfy" else "diffusers"


def layer_name_in(naming: str, family: BaseFamily, part: str, module: str) -> str:
    """What a layer for this module is called."""
    if naming == "kohya":
        kind, number = (
            ("unet", "") if part == "unet" else ("te", part.removeprefix("te") if family.encoders > 1 else "")
        )
        prior = "prior_" if family.denoiser == "prior" else ""
        return f"lora_{prior}{kind}{number}_{module.replace('.', '_')}"
    if naming == "peft":
        return f"base_model.model.{module}"
    if naming == "diffusers":
        folder = family.folder(part)
        if not folder and part != "unet":  # a language model is a model of its own
            raise UsageError(f"naming: diffusers has no name for the part {part} of {family.title}.")
        return f"{folder}.{module}" if folder else module
    prefix = family.in_one_file(part)
    if not prefix:
        raise UsageError(f"naming: ComfyUI has no name for the part {part} of {family.title}.")
    return prefix + module


def _settings(adapter: Adapter, output: _Output) -> peft.Settings:
    roles = {role for layer in adapter.layers for role in layer.keys}
    known = {**adapter.settings.get("", {}), "use_dora": "magnitude" in roles, "lora_bias": "bias" in roles}
    return peft.settings_for(output.scales, known)


# --- which rows of which layer ------------------------------------------------------------------


class _Piece(NamedTuple):
    """Rows of one tensor of the base that a layer changes."""

    start: int
    stop: int
    layer: int
    offset: int  # of the first one in the layer


def _spans(views: Views) -> list[tuple[str, int, int]]:
    return [(view.key, *(view.rows or (0, view.shape[0]))) for view in views]


def _targets(adapter: Adapter, base: Base, layout: str) -> tuple[list[_Target], list[int]]:
    """(modules of the layout that the adapter changes, layers that they cannot take whole)."""
    views = {index: each for index, each in enumerate(match(adapter, base)) if each}
    targets = _covered(adapter, views, base.modules(layout))
    taken = Counter[int]()
    for target in targets:
        for row in target.rows:
            if row.layer is not None:
                taken[row.layer] += row.size
    whole = {index: each for index, each in views.items() if taken[index] == views_shape(each)[0]}
    if len(whole) < len(views):
        targets = _covered(adapter, whole, base.modules(layout))
    return targets, [index for index in range(len(adapter)) if index not in whole]


def _covered(adapter: Adapter, views: Mapping[int, Views], modules: Mapping[tuple[str, str], Views]) -> list[_Target]:
    pieces: dict[str, list[_Piece]] = defaultdict(list)
    for index, each in views.items():
        offset = 0
        for key, start, stop in _spans(each):
            pieces[key].append(_Piece(start, stop, index, offset))
            offset += stop - start
    for key, changed in pieces.items():
        changed.sort()
        for first, second in pairwise(changed):
            if second.start < first.stop:
                names = " and ".join(adapter.layers[each.layer].name for each in (first, second))
                raise ShapeError(f"{adapter.path}: {names} change the same rows of {key}. Export them one by one.")
    targets = []
    for (part, module), each in modules.items():
        rows = [row for span in _spans(each) for row in _rows(span, pieces.get(span[0], ()))]
        if any(row.layer is not None for row in rows):
            targets.append(_Target(part, module, tuple(_joined(rows))))
    return targets


def _rows(span: tuple[str, int, int], pieces: Sequence[_Piece]) -> list[_Rows]:
    _, place, stop = span
    rows = []
    for piece in pieces:
        if piece.stop <= place or piece.start >= stop:
            continue
        if piece.start > place:
            rows.append(_Rows(None, 0, piece.start - place))
            place = piece.start
        end = min(stop, piece.stop)
        rows.append(_Rows(piece.layer, piece.offset + place - piece.start, end - place))
        place = end
    if place < stop:
        rows.append(_Rows(None, 0, stop - place))
    return rows


def _joined(rows: Sequence[_Rows]) -> list[_Rows]:
    """Neighbouring rows of one layer as one run."""
    joined: list[_Rows] = []
    for row in rows:
        last = joined[-1] if joined else None
        if last and last.layer == row.layer and (row.layer is None or last.start + last.size == row.start):
            joined[-1] = last._replace(size=last.size + row.size)
        else:
            joined.append(row)
    return joined


# --- the tensors of a module --------------------------------------------------------------------


def _write(output: _Output, adapter: Adapter, target: _Target, name: str, naming: str) -> None:
    layers = [adapter.layers[index] for index in target.sources]
    whole = [_Rows(target.sources[0], 0, layers[0].shape[0] if layers[0].shape else target.rows[0].size)]
    if naming in ("diffusers", "peft") and any("magnitude" in layer.keys and not _per_row(layer) for layer in layers):
        for layer in layers:
            _keep(output, layer, "DoRA with a magnitude per input, which PEFT does not know")
    elif list(target.rows) == whole and not _is_lora(layers[0]):
        _rename(output, layers[0], name)
    elif all(_is_lora(layer) and layer.keys.keys() <= _FACTORS for layer in layers) or list(target.rows) == whole:
        _write_lora(output, adapter, target, name, naming)
    else:
        culprit = next(layer for layer in layers if not (_is_lora(layer) and layer.keys.keys() <= _FACTORS))
        why = f"{culprit.algo}, which cannot be cut to the rows of {name}"
        for layer in layers:
            _keep(output, layer, why if layer is culprit else f"belongs together with {culprit.name}, {why}")


def _keep(output: _Output, layer: Layer, reason: str) -> None:
    output.kept |= dict.fromkeys(layer.keys.values(), reason)
    if "alpha" not in layer.keys and layer.scale != 1 and layer.family.written:
        # its scale was in the settings, which the output does not have
        output.made[f"{layer.name}.alpha"] = (tensor_info("F32", ()), partial(_number, layer.scale * layer.rank))


def _is_lora(layer: Layer) -> bool:
    return layer.family.name == "lora" and "mid" not in layer.keys


def _rename(output: _Output, layer: Layer, name: str) -> None:
    for key in layer.keys.values():
        output.made[name + key[len(layer.name) :]] = (layer.store.tensors[key], partial(layer.store.read, key))


def _write_lora(output: _Output, adapter: Adapter, target: _Target, name: str, naming: str) -> None:
    layers = {index: adapter.layers[index] for index in target.sources}
    factors = _Fused(layers, target.rows, output.dtype)
    kohya = naming == "kohya"
    up, down = (
        (f"{name}.lora_up.weight", f"{name}.lora_down.weight")
        if kohya
        else (f"{name}.lora_B.weight", f"{name}.lora_A.weight")
    )
    scale = factors.scale
    said = naming == "peft" or kohya or (naming == "comfy" and scale != 1)
    output.made[up] = (tensor_info(factors.up_dtype, factors.up_shape), partial(factors.up, 1.0 if said else scale))
    output.made[down] = (tensor_info(factors.down_dtype, factors.down_shape), factors.down)
    if said and naming != "peft":
        output.made[f"{name}.alpha"] = (tensor_info("F32", ()), partial(_number, scale * factors.rank))
    output.scales[target.module] = (factors.rank, scale)
    output.exact &= (said or scale == 1) and factors.exact
    for layer in layers.values():
        if "bias" in layer.keys:
            _write_bias(output, layer, name, "" if said and naming == "peft" else naming)
        if "magnitude" in layer.keys:
            _write_magnitude(output, layer, name, naming)


def _write_bias(output: _Output, layer: Layer, name: str, naming: str) -> None:
    """PEFT multiplies the bias with the scale of the factors; what others add has no scale."""
    name += ".diff_b" if naming in ("kohya", "comfy") else ".lora_B.bias"
    factor = layer.scale if naming else 1.0
    info = layer.infos["bias"]
    output.made[name] = (info, partial(_bias, layer, factor, info.dtype))
    output.exact &= factor == 1


def _write_magnitude(output: _Output, layer: Layer, name: str, naming: str) -> None:
    """DoRA's magnitude: a vector in PEFT, a row or column of the weight's dimensions elsewhere."""
    key, out, kernel = layer.keys["magnitude"], layer.shape[0], [1] * (len(layer.shape) - 2)
    info = layer.infos["magnitude"]
    peft_style = naming in ("diffusers", "peft")
    of_rows: Shape = ((1, out, *kernel) if kernel else (out,)) if peft_style else (out, 1, *kernel)
    shape = of_rows if _per_row(layer) else info.shape
    name += ".lora_magnitude_vector" if peft_style else ".dora_scale"
    output.made[name] = (tensor_info(info.dtype, shape), partial(_reshaped, layer, key, shape))


def _per_row(layer: Layer) -> bool:
    """Whether DoRA's magnitude has a number per output: PEFT's always has, LyCORIS' may have one per input."""
    shape = layer.infos["magnitude"].shape
    return ".lora_magnitude_vector" in layer.keys["magnitude"] or len(shape) == 1 or shape[0] == layer.shape[0] != 1


def _reshaped(layer: Layer, key: str, shape: tuple[int, ...]) -> Tensor:
    return layer.store.read(key).reshape(shape)


def _bias(layer: Layer, factor: float, dtype: str) -> Tensor:
    return cast(_times(layer.store.read(layer.keys["bias"]), factor), dtype)


def _times(tensor: Tensor, factor: float) -> Tensor:
    """The product in double precision; the very same numbers if there is nothing to multiply."""
    return tensor if factor == 1 else tensor.double() * factor


def _number(value: float) -> Tensor:
    import torch

    return torch.tensor(value, dtype=torch.float32)


class _Fused:
    """The factors of one module whose rows come from one layer, or from several."""

    def __init__(self, layers: Mapping[int, Layer], rows: Sequence[_Rows], dtype: str | None) -> None:
        self.layers, self.rows = layers, rows
        first = next(iter(layers.values()))
        self.shared = len(layers) == 1 or _same_down(list(layers.values()))
        self.rank = first.rank if self.shared else sum(layer.rank for layer in layers.values())
        self.scale = next((layer.scale for layer in layers.values() if layer.scale), 0.0)
        up, down = first.infos["up"], first.infos["down"]
        self.up_dtype, self.down_dtype = dtype or up.dtype, dtype or down.dtype
        # one scale is said for all, so that the others' differences go into the numbers
        self.exact = all(
            (layer.scale, layer.infos["up"].dtype, layer.infos["down"].dtype)
            == (self.scale, self.up_dtype, self.down_dtype)
            for layer in layers.values()
        )
        self.up_shape = (sum(row.size for row in rows), self.rank, *up.shape[2:])
        self.down_shape = (self.rank, *down.shape[1:])

    def down(self) -> Tensor:
        """[r, in·…]: the factor that all have, or all of them one below the other."""
        import torch

        layers = list(self.layers.values())[: 1 if self.shared else None]
        return torch.cat([cast(layer.store.read(layer.keys["down"]), self.down_dtype) for layer in layers])

    def up(self, factor: float) -> Tensor:
        """[out, r, …]: gathered rows; each layer's in the columns of its own part of `down`."""
        import torch

        result = torch.zeros(self.up_shape, dtype=cast(torch.empty(0), self.up_dtype).dtype)
        columns, first = {}, 0
        for index, layer in self.layers.items():
            columns[index] = slice(0, layer.rank) if self.shared else slice(first, first + layer.rank)
            first += layer.rank
        place = 0
        for row in self.rows:
            if row.layer is not None:
                layer = self.layers[row.layer]
                part = layer.store.read(layer.keys["up"])[row.start : row.start + row.size]
                relative = factor * (layer.scale / self.scale if self.scale else 1.0)
                rounded = cast(_times(part, relative), self.up_dtype)
                if relative != 1 and not torch.isfinite(rounded.float()).all():
                    raise NonFinite(
                        f"{layer.store.path}: {layer.name} times its scale does not fit {self.up_dtype}. Use -t fp32."
                    )
                result[place : place + row.size, columns[row.layer]] = rounded
            place += row.size
        return result


def _same_down(layers: Sequence[Layer]) -> bool:
    """Whether all layers have one and the same `down`, as converted files do."""
    import torch

    first = layers[0].store.read(layers[0].keys["down"])
    return all(
        layer.infos["down"].shape == tuple(first.shape) and torch.equal(layer.store.read(layer.keys["down"]), first)
        for layer in layers[1:]
    )
