"""An adapter under the names of another program: kohya's, diffusers', ComfyUI's or PEFT's.

Names are never taken apart. The base says which rows of which weight a layer changes, and what these rows are called
in the other layout; where one layout fuses what the other splits, rows of `up` are gathered, and `down` is stacked.
Factors are copied bit by bit wherever the new file can state their strength beside them.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

from lorashrink.adapters import Adapter, Layer, adapter_of, layer_name, peft
from lorashrink.adapters.family import Shape
from lorashrink.adapters.peft_keys import refuse_new_names
from lorashrink.bases import Base, BaseFamily, Views, views_shape
from lorashrink.errors import NonFinite, ShapeError, UsageError
from lorashrink.files.store import ComputedStore, TensorInfo, cast, tensor_info
from lorashrink.linking.matching import match
from lorashrink.linking.rows import RowMap, RowRun, Rows, covers, joined_runs, row_intervals
from lorashrink.names import DIFFUSERS_PARTS

if TYPE_CHECKING:
    from torch import Tensor

NAMINGS = ("kohya", "diffusers", "comfy", "peft")

# What belongs to a layer of factors; a layer with other tensors can only be renamed as a whole.
_FACTORS = {"up", "down", "alpha"}

# What a header says of a tensor, and the function that computes it.
LazyTensor = tuple[TensorInfo, Callable[[], "Tensor"]]


_MAKE_LORA = "Make an ordinary LoRA of it first, with: lorashrink resize -r energy=1 --as lora --base BASE"


def _check_meaning(adapter: Adapter, views: Sequence[Views], naming: str) -> None:
    """Raises UsageError if the tensors under other names would be another adapter."""
    for config in adapter.settings.values():
        if problem := refuse_new_names(config, naming):
            raise UsageError(f"{adapter.path}: {problem}")
    for layer, rows in zip(adapter, views, strict=True):
        if layer.family.changed_base or layer.family.becomes_lora:
            what = "init_lora_weights is" if layer.family.changed_base else "it is an adapter of"
            raise UsageError(f"{adapter.path}: {what} {layer.family.name}, which has no other names. {_MAKE_LORA}")
        if layer.family.needs_settings(layer.config, views_shape(rows) if rows else ()):
            raise UsageError(
                f"{adapter.path}: what {layer.name} means, which is {layer.algo}, depends on PEFT's settings. "
                f"{_MAKE_LORA}"
            )


@dataclass(frozen=True, eq=False)
class Renamed:
    """An adapter under other names."""

    adapter: Adapter
    kept: Mapping[str, str]  # key -> why it has its old name
    exact: bool  # whether every number of it is one of the input's


def renamed(adapter: Adapter, naming: str, base: Base, dtype: str | None = None) -> Renamed:
    """The adapter in another naming, its factors in this dtype of the format. Nothing is computed before it is read.

    Raises UsageError (a naming that cannot hold the adapter), ShapeError (layers that overlap, or do not fit
    the base) and FamilyMismatch.
    """
    views = match(adapter, base)
    _check_meaning(adapter, views, naming)
    modules = base.modules(layout_of(naming, base))
    targets, unnamed = _targets(adapter, views, modules)
    if naming == "peft":
        _check_folder(adapter, targets)
    output = _Output(adapter, naming, dtype)
    for target in targets:
        output.write(target, layer_name_in(naming, base.family, target.part, target.module))
    for index in unnamed:
        output.keep(adapter.layers[index], "the base has no other name for it")
    addresses = {views: address for address, views in modules.items()}
    for key, reason in adapter.others.items():
        name = layer_name(key)
        if address := addresses.get(base.find(name)):  # a bias of a weight goes where the weight goes
            output.copy(key, layer_name_in(naming, base.family, *address) + key[len(name) :])
        else:
            output.kept[key] = reason
    for key in (*output.kept, *adapter.common):
        output.copy(key, key)
    return Renamed(output.adapter(), output.kept, output.exact)


def _check_folder(adapter: Adapter, targets: Sequence[_Target]) -> None:
    """Raises UsageError if no PEFT folder can hold the adapter."""
    parts = {target.part for target in targets}
    if len(parts) > 1:
        raise UsageError(
            f"{adapter.path}: changes {len(parts)} models ({', '.join(sorted(parts))}), and a PEFT folder is for one. "
            "Use diffusers naming."
        )
    if foreign := [layer.algo for layer in adapter.layers if not _is_lora(layer)]:
        raise UsageError(
            f"{adapter.path}: is {foreign[0]}, and only LoRA is written as a PEFT folder. Shrink it with --as lora "
            "first."
        )


# --- namings ------------------------------------------------------------------------------------


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
    """What a layer for this module is called. Raises UsageError if the naming has no name for the part."""
    if naming in ("kohya", "comfy") and part in DIFFUSERS_PARTS:
        program = "ComfyUI" if naming == "comfy" else naming
        raise UsageError(
            f"naming: {program} has no name for the part {part} of {family.title}. Use diffusers naming, or convert a "
            "file of one part alone."
        )
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


# --- which rows of which layer ------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Target:
    """A module of the other layout, and the layers that its rows come from."""

    part: str
    module: str
    rows: int
    runs: Mapping[int, tuple[RowRun, ...]]  # layer -> rows of the module that are rows of the layer


def _targets(
    adapter: Adapter, views: Sequence[Views], modules: Mapping[tuple[str, str], Views]
) -> tuple[list[_Target], list[int]]:
    """(modules of the layout that the adapter changes, layers that the modules do not have all rows of)."""
    intervals = {index: row_intervals(layer_views) for index, layer_views in enumerate(views) if layer_views}
    owners = _row_map(intervals)
    if clash := owners.clash():
        names = " and ".join(adapter.layers[index].name for index in clash.owners)
        raise ShapeError(f"{adapter.path}: {names} change the same rows of {clash.key}. Export them one by one.")
    targets = _covered(owners, modules)
    taken = Counter[int]()
    for target in targets:
        for index, runs in target.runs.items():
            taken[index] += sum(run.size for run in runs)
    complete = {i: rows for i, rows in intervals.items() if taken[i] == sum(interval.size for interval in rows)}
    if len(complete) < len(intervals):
        targets = _covered(_row_map(complete), modules)
    return targets, [index for index in range(len(adapter)) if index not in complete]


def _row_map(intervals: Mapping[int, Sequence[Rows]]) -> RowMap[int]:
    owners = RowMap[int]()
    for index, rows in intervals.items():
        owners.add(rows, index)
    return owners


def _covered(owners: RowMap[int], modules: Mapping[tuple[str, str], Views]) -> list[_Target]:
    targets = []
    for (part, module), views in modules.items():
        runs: dict[int, list[RowRun]] = defaultdict(list)
        for rows, own, index in sorted(owners.common(row_intervals(views)), key=lambda common: common.rows.first):
            runs[index].append(RowRun(rows.first, own.first, rows.size))
        if runs:
            joined = {index: joined_runs(layer_runs) for index, layer_runs in runs.items()}
            targets.append(_Target(part, module, views_shape(views)[0], joined))
    return targets


# --- the tensors of a module --------------------------------------------------------------------


class _Output:
    """The tensors of an adapter under their new names, as far as they are written."""

    def __init__(self, source: Adapter, naming: str, dtype: str | None) -> None:
        self.source, self.naming = source, naming
        self.dtype = dtype  # of factors; None leaves them theirs
        self.tensors: dict[str, LazyTensor] = {}
        self.scales: dict[str, tuple[int, float]] = {}  # module name -> (rank, scale), for PEFT
        self.kept: dict[str, str] = {}  # key -> why it has its old name
        self.exact = True

    def adapter(self) -> Adapter:
        """All of it as an adapter."""
        source, as_folder = self.source, self.naming == "peft"
        metadata = {key: text for key, text in source.store.metadata.items() if key != peft.METADATA_KEY}
        widest = max((rank for rank, _ in self.scales.values()), default=0)
        if metadata.get("ss_network_dim", "").isdigit() and widest > int(metadata["ss_network_dim"]):
            metadata["ss_network_dim"] = str(widest)  # where layers were fused
        settings: peft.Settings = {}
        if as_folder:
            roles = {role for layer in source.layers for role in layer.keys}
            kinds = {"use_dora": "magnitude" in roles, "lora_bias": "bias" in roles}
            settings = peft.settings_for(self.scales, {**source.settings.get("", {}), **kinds})
        store = ComputedStore(source.path, self.tensors, metadata, source.store.files, source.store.headers)
        return replace(adapter_of(source.path, store, settings), as_folder=as_folder)

    def copy(self, key: str, new: str) -> None:
        """A tensor of the input as it is. Raises ShapeError if the new name is taken."""
        if new in self.tensors:
            raise ShapeError(f"{self.source.path}: {new} would be the name of two tensors. Export the file again.")
        self.tensors[new] = (self.source.store.tensors[key], partial(self.source.store.read, key))

    def keep(self, layer: Layer, reason: str) -> None:
        """A layer under its old name."""
        self.kept |= dict.fromkeys(layer.keys.values(), reason)
        self._write_scale(layer, layer.name)

    def _write_scale(self, layer: Layer, name: str) -> None:
        """The alpha of a layer whose scale was in the settings, which the output does not have.

        Raises UsageError if no alpha of the family gives this scale.
        """
        if "alpha" in layer.keys or layer.family.scale(layer.infos, None, 1.0) == layer.scale:
            return
        alpha = layer.scale * layer.rank
        if not math.isclose(layer.family.scale(layer.infos, alpha, 1.0), layer.scale):
            raise UsageError(
                f"{self.source.path}: {layer.name} is {layer.algo} with a scale of {layer.scale:g}, which only PEFT's "
                f"settings can hold. {_MAKE_LORA}"
            )
        self._write_number(f"{name}.alpha", alpha)

    def write(self, target: _Target, name: str) -> None:
        """A module under a new name, or its layers under their old ones where the naming cannot hold them."""
        layers = {index: self.source.layers[index] for index in target.runs}
        first, *_ = layers.values()
        is_one_layer = first.shape[:1] in ((), (target.rows,)) and covers(next(iter(target.runs.values())), target.rows)
        uncuttable = [layer for layer in layers.values() if not (_is_lora(layer) and layer.keys.keys() <= _FACTORS)]
        doras = [layer for layer in layers.values() if "magnitude" in layer.keys]
        if self.naming in ("diffusers", "peft") and not all(map(magnitude_per_output, doras)):
            for layer in layers.values():
                self.keep(layer, "DoRA with a magnitude per input, which PEFT does not know")
        elif is_one_layer and not _is_lora(first):
            for key in first.keys.values():
                self.tensors[name + key[len(first.name) :]] = (first.store.tensors[key], partial(first.store.read, key))
            self._write_scale(first, name)
        elif is_one_layer or not uncuttable:
            self._write_lora(target, layers, name)
        else:
            culprit = uncuttable[0]
            why = f"{culprit.algo}, which cannot be cut to the rows of {name}"
            for layer in layers.values():
                self.keep(layer, why if layer is culprit else f"belongs together with {culprit.name}, {why}")

    def _write_lora(self, target: _Target, layers: Mapping[int, Layer], name: str) -> None:
        factors = _Fused(layers, target, self.dtype)
        scale, kohya = factors.scale, self.naming == "kohya"
        # diffusers' names have no alpha, so that there the scale goes into `up`
        has_scale = kohya or self.naming == "peft" or (self.naming == "comfy" and scale != 1)
        up, down = ("lora_up", "lora_down") if kohya else ("lora_B", "lora_A")
        up_info = tensor_info(factors.up_dtype, factors.up_shape)
        self.tensors[f"{name}.{up}.weight"] = (up_info, partial(factors.up, 1.0 if has_scale else scale))
        self.tensors[f"{name}.{down}.weight"] = (tensor_info(factors.down_dtype, factors.down_shape), factors.down)
        if has_scale and self.naming != "peft":
            self._write_number(f"{name}.alpha", scale * factors.rank)
        self.scales[target.module] = (factors.rank, scale)
        self.exact &= (has_scale or scale == 1) and factors.exact
        for layer in layers.values():
            if "bias" in layer.keys:
                self._write_bias(layer, name)
            if "magnitude" in layer.keys:
                self._write_magnitude(layer, name)

    def _write_number(self, name: str, value: float) -> None:
        def make() -> Tensor:
            import torch

            return torch.tensor(value, dtype=torch.float32)

        self.tensors[name] = (tensor_info("F32", ()), make)

    def _write_bias(self, layer: Layer, name: str) -> None:
        """PEFT multiplies the bias with the scale of the factors; what others add has no scale."""
        ending = "diff_b" if self.naming in ("kohya", "comfy") else "lora_B.bias"
        factor = 1.0 if self.naming == "peft" else layer.scale
        info = layer.infos["bias"]

        def make() -> Tensor:
            return cast(_times(layer.store.read(layer.keys["bias"]), factor), info.dtype)

        self.tensors[f"{name}.{ending}"] = (info, make)
        self.exact &= factor == 1

    def _write_magnitude(self, layer: Layer, name: str) -> None:
        """DoRA's magnitude: a vector in PEFT, a row or column of the weight's dimensions elsewhere."""
        info, out, kernel = layer.infos["magnitude"], layer.shape[0], [1] * (len(layer.shape) - 2)
        as_peft = self.naming in ("diffusers", "peft")
        shape: Shape = info.shape
        if magnitude_per_output(layer):
            shape = ((1, out, *kernel) if kernel else (out,)) if as_peft else (out, 1, *kernel)
        ending = "lora_magnitude_vector" if as_peft else "dora_scale"

        def make() -> Tensor:
            return layer.store.read(layer.keys["magnitude"]).reshape(shape)

        self.tensors[f"{name}.{ending}"] = (tensor_info(info.dtype, shape), make)


def _is_lora(layer: Layer) -> bool:
    return layer.family.name == "lora" and "mid" not in layer.keys


def magnitude_per_output(layer: Layer) -> bool:
    """Whether a DoRA layer's magnitude has a number per output: PEFT's always has, LyCORIS' may have one per input."""
    shape = layer.infos["magnitude"].shape
    return ".lora_magnitude_vector" in layer.keys["magnitude"] or len(shape) == 1 or shape[0] == layer.shape[0] != 1


def _times(tensor: Tensor, factor: float) -> Tensor:
    """The product in double precision; the very same numbers if there is nothing to multiply."""
    return tensor if factor == 1 else tensor.double() * factor


class _Fused:
    """The factors of one module whose rows come from one layer, or from several."""

    def __init__(self, layers: Mapping[int, Layer], target: _Target, dtype: str | None) -> None:
        self.layers, self.target = layers, target
        first, *others = layers.values()
        self.shared = True  # all have one and the same `down`, as converted files do
        if others:
            import torch

            first_down = first.store.read(first.keys["down"])
            self.shared = all(
                layer.infos["down"].shape == first.infos["down"].shape
                and torch.equal(layer.store.read(layer.keys["down"]), first_down)
                for layer in others
            )
        self.rank = first.rank if self.shared else sum(layer.rank for layer in layers.values())
        self.scale = next((layer.scale for layer in layers.values() if layer.scale), 0.0)
        up, down = first.infos["up"], first.infos["down"]
        self.up_dtype, self.down_dtype = dtype or up.dtype, dtype or down.dtype
        # one scale is written for all, so that the others' differences go into the numbers
        self.exact = all(
            (layer.scale, layer.infos["up"].dtype, layer.infos["down"].dtype)
            == (self.scale, self.up_dtype, self.down_dtype)
            for layer in layers.values()
        )
        self.up_shape = (target.rows, self.rank, *up.shape[2:])
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
        first = 0
        for index, layer in self.layers.items():
            columns = slice(first, first + layer.rank)
            first += 0 if self.shared else layer.rank
            relative = factor * (layer.scale / self.scale if self.scale else 1.0)
            up = layer.store.read(layer.keys["up"])
            for at, start, size in self.target.runs[index]:
                rounded = cast(_times(up[start : start + size], relative), self.up_dtype)
                if relative != 1 and not torch.isfinite(rounded.float()).all():
                    raise NonFinite(
                        f"{layer.store.path}: {layer.name} times its scale does not fit {self.up_dtype}. Use -t fp32."
                    )
                result[at : at + size, columns] = rounded
        return result
