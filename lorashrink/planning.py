"""What becomes of one adapter: its layers matched with the base, judged by recipes, and laid out as files."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from lorashrink import metadata
from lorashrink.adapters import Adapter, Layer, adapter_family, peft
from lorashrink.base_norms import Norms
from lorashrink.bases import FAMILIES as BASE_FAMILIES
from lorashrink.bases import Base, Views, views_id, views_shape
from lorashrink.delta import fan_in
from lorashrink.errors import FamilyMismatch, InputError, NonFinite, RecipeError, ShapeError
from lorashrink.files import DTYPES, TensorInfo, header_bytes
from lorashrink.recipe import LayerFacts, Recipe, Selection, score, select
from lorashrink.recipe import quantiles as score_quantiles
from lorashrink.spectrum import Spectrum, alignment

if TYPE_CHECKING:
    from torch import Tensor

# --- results ------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class LayerResult:
    """What became of one layer."""

    name: str
    shape: tuple[int, ...]
    algo: str
    rank_before: int
    rank_after: int  # 0 = removed
    energy: float  # Σσ² kept / Σσ²
    rle_lora: float  # ‖lost‖_F / ‖ΔW‖_F
    rle_ckpt: float | None  # ‖lost‖_F / ‖W‖_F, None without a base weight


@dataclass(frozen=True, slots=True)
class Verbatim:
    """A tensor that was copied as it is."""

    key: str
    reason: str


@dataclass(frozen=True, slots=True)
class Removed:
    """A layer, or one tensor of it, that is not in the output."""

    name: str
    reason: str


@dataclass(frozen=True, slots=True)
class FileResult:
    """One written file (or, with a dry run, one that would be)."""

    source: str
    output: str
    recipe: str
    threshold: float | None
    bytes_before: int
    bytes_after: int
    relative_error: float  # sqrt(Σ‖lost‖² / Σ‖ΔW‖²)
    seconds: float
    layers: tuple[LayerResult, ...] = ()
    verbatim: tuple[Verbatim, ...] = ()
    removed: tuple[Removed, ...] = ()
    warnings: tuple[str, ...] = ()
    quantiles: Mapping[str, float] = field(default_factory=dict)  # of the score, on request
    skipped: bool = False  # an equal file was already there

    @property
    def energy(self) -> float:
        """Share of ΣΣσ² that was kept."""
        return 1 - self.relative_error**2

    @property
    def norm_ratio(self) -> float:
        """Share of the Frobenius norm that was kept: the square root of the energy."""
        return math.sqrt(max(0.0, self.energy))


# --- matching with the base ---------------------------------------------------------------------


def match(adapter: Adapter, base: Base) -> list[Views]:
    """For each layer the base weight that it changes, () where the base has none such.

    Raises FamilyMismatch or ShapeError if adapter and base do not belong together.
    """
    found = [base.find(layer.name) for layer in adapter.layers]
    wrong = [
        (layer, views)
        for layer, views in zip(adapter.layers, found, strict=True)
        if views and not same_matrix(layer.shape, views_shape(views))
    ]
    looks = adapter_family(adapter)
    titles = {family.name: family.title for family in BASE_FAMILIES}
    if (wrong or 2 * sum(map(bool, found)) < len(found)) and looks not in (None, base.family.name):
        raise FamilyMismatch(
            f"{adapter.path}: looks like an adapter for {titles.get(looks or '', looks)}, but {base.path} is "
            f"{base.family.title}. Give the base that it was trained on, or a relative of it."
        )
    if wrong:
        layer, views = wrong[0]
        raise ShapeError(
            f"{adapter.path}: layer {layer.name} changes a weight of {list(layer.shape)}, but {views_id(views)} of "
            f"{base.path} is {list(views_shape(views))}. Give the base that the adapter was trained on."
        )
    if adapter.layers and not any(found):
        raise FamilyMismatch(
            f"{adapter.path}: none of its {len(adapter)} layers, such as {adapter.layers[0].name}, is in {base.path} "
            f"({base.family.title}). Give the base that it was trained on, or a relative of it."
        )
    return found


def same_matrix(a: tuple[int, ...], b: tuple[int, ...]) -> bool:
    """Whether two shapes mean the same matrix: a 1×1 convolution is a linear layer."""

    def squeezed(shape: tuple[int, ...]) -> tuple[int, ...]:
        return shape[:2] if all(side == 1 for side in shape[2:]) else shape

    return squeezed(a) == squeezed(b)


# --- planning -----------------------------------------------------------------------------------

OUTPUT_DTYPES = {"fp16": "F16", "bf16": "BF16", "fp32": "F32"}
_SHRINKABLE_DTYPES = frozenset({"F16", "BF16", "F32", "F64"})
UNMAPPED = ("keep", "drop", "error")


@dataclass(frozen=True, eq=False)
class Decomposed:
    """An adapter with everything that recipes ask about its layers."""

    adapter: Adapter
    views: Sequence[Views]  # per layer; () without a base weight
    spectra: Sequence[Spectrum]
    norms: Norms
    alignments: Sequence[Tensor | None]

    def __post_init__(self) -> None:
        for layer, spectrum in zip(self.adapter.layers, self.spectra, strict=True):
            if not spectrum.finite:
                raise NonFinite(
                    f"{self.adapter.path}: layer {layer.name} contains NaN or infinity{_culprit(layer)}. "
                    "The training diverged, or the file is damaged; use an earlier checkpoint."
                )

    def facts(self, index: int, dtype: str) -> LayerFacts:
        """What a recipe may know about a layer that is written in this dtype of the format."""
        layer, views, aligned = self.adapter.layers[index], self.views[index], self.alignments[index]
        norms = self.norms.get(views_id(views), {}) if views else {}
        numbers = layer.shape[0] + fan_in(layer.shape)
        return LayerFacts(
            sigma=self.spectra[index].sigma.numpy(),
            numbers=numbers,
            bytes_per_rank=numbers * DTYPES[dtype][0],
            kernel=any(side > 1 for side in layer.shape[2:]),
            removable="magnitude" not in layer.keys,
            base_fro=norms.get("fro"),
            base_spn=norms.get("spn"),
            base_alignment=None if aligned is None else aligned.abs().numpy(),
        )


def _culprit(layer: Layer) -> str:
    for role, key in layer.keys.items():
        if role != "alpha" and not torch.isfinite(layer.store.read(key)).all():
            return f" (in {key})"
    return ""


@dataclass(frozen=True, eq=False)
class Plan:
    """Everything about one output before its numbers are computed."""

    decomposed: Decomposed
    recipe: Recipe
    shrunk: Sequence[int]  # indices of the layers that the recipe judged
    facts: Sequence[LayerFacts]  # of these
    selection: Selection  # of these
    tensors: Mapping[str, TensorInfo]  # of the output
    metadata: Mapping[str, str]
    verbatim: Mapping[str, str]  # key -> reason
    removed: Mapping[str, str]  # layer or key -> reason
    warnings: Sequence[str]
    settings: peft.Settings  # PEFT's, for the new ranks

    @cached_property
    def places(self) -> Mapping[int, int]:
        """Where a layer, by its index in the adapter, stands among those that the recipe judged."""
        return {index: place for place, index in enumerate(self.shrunk)}

    @cached_property
    def alpha(self) -> int:
        """The alpha of every layer of the output.

        One number, because diffusers (0.42) gives the most frequent alpha of a kohya file to all of its layers. It is
        the largest rank; a layer of a lower rank has factors that are smaller by √(rank/alpha) to make up for it.
        """
        return max(self.selection.widths, default=0)

    def baked(self, place: int) -> float:
        """What a layer's factors hold, relative to its truncated ΔW; the reader's alpha / rank does the rest."""
        layer = self.decomposed.adapter.layers[self.shrunk[place]]
        share = self.selection.widths[place] / self.alpha if "alpha" in layer.keys else 1.0
        return self.recipe.rescale * share

    @cached_property
    def size(self) -> int:
        """Bytes of the output."""
        return file_size(self.tensors, self.metadata)

    @cached_property
    def relative_error(self) -> float:
        """See `relative_error`."""
        return relative_error(self.facts, self.selection.kept)

    def layer_results(self) -> tuple[LayerResult, ...]:
        """One row per layer that the recipe judged."""
        rows = []
        for index, facts, kept, width in zip(
            self.shrunk, self.facts, self.selection.kept, self.selection.widths, strict=True
        ):
            layer = self.decomposed.adapter.layers[index]
            lost, whole = _lost(facts, kept), float((facts.sigma**2).sum() ** 0.5)
            rows.append(
                LayerResult(
                    name=layer.name,
                    shape=layer.shape,
                    algo=layer.algo,
                    rank_before=layer.rank,
                    rank_after=width,
                    energy=1 - (lost / whole) ** 2,
                    rle_lora=lost / whole,
                    rle_ckpt=abs(self.recipe.rescale) * lost / facts.base_fro if facts.base_fro else None,
                )
            )
        return tuple(rows)


def relative_error(layers: Sequence[LayerFacts], kept: Sequence[Sequence[int]]) -> float:
    """sqrt(Σ‖lost‖² / Σ‖ΔW‖²) over layers of which these dimensions are kept."""
    total = sum(float((facts.sigma**2).sum()) for facts in layers)
    lost = sum(_lost(facts, dimensions) ** 2 for facts, dimensions in zip(layers, kept, strict=True))
    return math.sqrt(lost / total) if total else 0.0


def _lost(facts: LayerFacts, kept: Sequence[int]) -> float:
    """‖ΔW - ΔW'‖_F, summed over the dimensions that are gone, so that small losses are exact."""
    rest = facts.sigma.copy()
    rest[list(kept)] = 0
    return float((rest**2).sum() ** 0.5)


def file_size(tensors: Mapping[str, TensorInfo], entries: Mapping[str, str]) -> int:
    """Bytes of a safetensors file with these tensors and metadata."""
    return len(header_bytes(tensors, entries)) + sum(info.nbytes for info in tensors.values())


def plan(
    decomposed: Decomposed, recipe: Recipe, *, dtype: str = "same", unmapped: str = "keep", origin: metadata.Origin
) -> Plan:
    """Decide what is kept, what is removed, and what the output looks like to the last byte.

    Raises RecipeError (nothing would be left, or `size=` cannot be met) and InputError (`unmapped="error"`).
    """
    adapter = decomposed.adapter
    shrunk, verbatim, removed = _sorted_layers(decomposed, recipe, unmapped)
    layout = _Layout(decomposed, recipe, origin, shrunk, verbatim, dtype)
    facts = [decomposed.facts(index, layout.kinds[index]) for index in shrunk]
    selection = select(recipe, facts, layout.size)
    if adapter.layers and not verbatim and not any(selection.widths):
        raise RecipeError(_nothing_left(adapter, recipe, facts))
    for index, width in zip(shrunk, selection.widths, strict=True):
        layer = adapter.layers[index]
        if not width:
            removed[layer.name] = "no dimension passes the recipe"
            continue
        for role, key in layer.keys.items():
            if role not in layer.family.written(layer.infos, width) and key not in verbatim:
                removed[key] = "folded into the factors, which every loader reads"
    return Plan(
        decomposed,
        recipe,
        shrunk,
        facts,
        selection,
        layout.tensors(selection.widths),
        layout.metadata(selection.widths, selection.threshold, relative_error(facts, selection.kept)),
        verbatim,
        removed,
        _warnings(decomposed, layout),
        layout.settings(selection.widths),
    )


def _sorted_layers(
    decomposed: Decomposed, recipe: Recipe, unmapped: str
) -> tuple[list[int], dict[str, str], dict[str, str]]:
    """(indices of the layers that the recipe can judge, key -> why verbatim, layer -> why removed)."""
    adapter = decomposed.adapter
    shrunk: list[int] = []
    verbatim, removed = dict(adapter.others), {}
    for index, layer in enumerate(adapter.layers):
        if recipe.needs_base and not decomposed.views[index]:
            if unmapped == "error":
                raise InputError(
                    f"{adapter.path}: layer {layer.name} changes no weight of the base, and recipe '{recipe}' "
                    "needs one. Use --unmapped keep or drop."
                )
            if unmapped == "drop":
                removed[layer.name] = "changes no weight of the base"
            else:
                verbatim |= dict.fromkeys(layer.keys.values(), "its layer changes no weight of the base")
        elif decomposed.spectra[index].rank == 0 and "magnitude" in layer.keys:
            verbatim |= dict.fromkeys(layer.keys.values(), "its ΔW is zero, but its magnitude changes the weight")
        elif decomposed.spectra[index].rank == 0:
            removed[layer.name] = "its alpha is 0, which means strength 0" if layer.scale == 0 else "ΔW is zero"
        else:
            shrunk.append(index)
            if "magnitude" in layer.keys:
                verbatim[layer.keys["magnitude"]] = "DoRA's magnitude, which belongs to the factors beside it"
    return shrunk, verbatim, removed


def _warnings(decomposed: Decomposed, layout: _Layout) -> list[str]:
    """What a user should know though nothing went wrong."""
    warnings = []
    layers = decomposed.adapter.layers
    off = [layer.name for layer in layers if layer.scale == 0]
    if off:
        warnings.append(f"alpha is 0 in {len(off)} layers, first {off[0]}; sd-scripts reads that as full strength")
    if layout.dtype == "same" and any(kind != layers[index].dtype for index, kind in layout.kinds.items()):
        warnings.append("factors in 8-bit floats are written as fp16, because truncated ones do not fit into 8 bits")
    dora = sum("magnitude" in layer.keys for layer in layers)
    if dora:
        warnings.append(f"{dora} layers are DoRA; their errors are those of ΔW, before the magnitude is applied")
    owners: dict[str, str] = {}
    for layer, views in zip(layers, decomposed.views, strict=True):
        first = owners.setdefault(views_id(views), layer.name) if views else layer.name
        if first != layer.name:
            warnings.append(f"{first} and {layer.name} change the same weight of the base")
    return warnings


class _Layout:
    """The output as a function of the ranks that are written, to the last byte."""

    def __init__(
        self,
        decomposed: Decomposed,
        recipe: Recipe,
        origin: metadata.Origin,
        shrunk: Sequence[int],
        verbatim: Mapping[str, str],
        dtype: str,
    ) -> None:
        self.adapter, self.recipe, self.origin, self.dtype = decomposed.adapter, recipe, origin, dtype
        self.shrunk, self.verbatim = shrunk, verbatim
        self.kinds = {index: _output_dtype(self.adapter.layers[index], dtype) for index in shrunk}
        self._as_is = {key: self.adapter.store.tensors[key] for key in verbatim}

    def size(self, widths: Sequence[int], threshold: float | None) -> int:
        """Bytes of the file."""
        return file_size(self.tensors(widths), self.metadata(widths, threshold))

    def tensors(self, widths: Sequence[int]) -> dict[str, TensorInfo]:
        """All tensors of the file."""
        result = dict(self._as_is)
        for index, width in zip(self.shrunk, widths, strict=True):
            if width:
                result |= _written(self.adapter.layers[index], width, self.kinds[index])
        return result

    def metadata(self, widths: Sequence[int], threshold: float | None, error: float = 0.0) -> dict[str, str]:
        """The metadata of the file; its length does not depend on `error`."""
        return metadata.shrunk(
            self.adapter.store.metadata,
            recipe=self.recipe,
            threshold=threshold,
            origin=self.origin,
            ranks=self._ranks(widths),
            old_rank=max((layer.rank for layer in self.adapter.layers), default=0),
            error=error,
            settings=self.settings(widths),
        )

    def settings(self, widths: Sequence[int]) -> peft.Settings:
        """PEFT's settings for these ranks."""
        magnitudes = {layer.keys.get("magnitude") for layer in self.adapter.layers}
        return peft.with_ranks(self.adapter.settings, self._ranks(widths), self.verbatim.keys() - magnitudes)

    def _ranks(self, widths: Sequence[int]) -> dict[str, int]:
        return {self.adapter.layers[i].name: width for i, width in zip(self.shrunk, widths, strict=True) if width}


def _output_dtype(layer: Layer, asked: str) -> str:
    if asked != "same":
        return OUTPUT_DTYPES[asked]
    return layer.dtype if layer.dtype in _SHRINKABLE_DTYPES else "F16"


def _written(layer: Layer, width: int, dtype: str) -> dict[str, TensorInfo]:
    infos = {}
    for role, shape in layer.family.written(layer.infos, width).items():
        # A half precision alpha could not hold every whole number.
        kind = "F32" if role == "alpha" else dtype
        infos[layer.keys[role]] = TensorInfo(kind, shape, math.prod(shape) * DTYPES[kind][0])
    return infos


def _nothing_left(adapter: Adapter, recipe: Recipe, facts: Sequence[LayerFacts]) -> str:
    if not facts:
        return f"{adapter.path}: every layer is zero; there is nothing to shrink."
    best = max(float(score(recipe, each).max()) for each in facts)
    return (
        f"{adapter.path}: recipe '{recipe}' keeps nothing: the best dimension scores {best:.2f}. "
        "Use a lower threshold or a larger size, or min_rank=1."
    )


def shown(output: Path) -> Path:
    """What a user calls an output: the file, or the folder that is loaded as a whole."""
    return output.parent if output.name == peft.WEIGHTS_FILE else output


def result(each: Plan, output: Path, *, started: float, quantiles: bool = False) -> FileResult:
    """The report on one output."""
    adapter = each.decomposed.adapter
    return FileResult(
        source=str(adapter.path),
        output=str(shown(output)),
        recipe=str(each.recipe),
        threshold=each.selection.threshold,
        bytes_before=sum(path.stat().st_size for path in adapter.store.files),
        bytes_after=each.size,
        relative_error=each.relative_error,
        seconds=time.perf_counter() - started,
        layers=each.layer_results(),
        verbatim=tuple(Verbatim(key, reason) for key, reason in each.verbatim.items()),
        removed=tuple(Removed(name, reason) for name, reason in each.removed.items()),
        warnings=tuple(each.warnings),
        quantiles={f"{k:g}": v for k, v in score_quantiles(each.recipe, each.facts).items()} if quantiles else {},
    )


def aligned(
    adapter: Adapter, views: Sequence[Views], spectra: Sequence[Spectrum], base: Base, index: int
) -> Tensor | None:
    """The alignment of a layer's singular pairs with its base weight, None without one."""
    if not views[index] or not spectra[index].rank:
        return None
    return alignment(adapter.layers[index].delta, spectra[index], base.weight(views[index]))
