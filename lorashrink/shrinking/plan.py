"""From a decomposed adapter and a recipe to the plan of an output, to the last byte."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from lorashrink.adapters import Adapter, Layer, peft
from lorashrink.calibration.statistics import LayerStatistics
from lorashrink.engine.rounding import Energy
from lorashrink.engine.spectrum import Spectrum
from lorashrink.errors import InputError, RecipeError
from lorashrink.files.header import Arrangement
from lorashrink.files.store import TensorInfo, dtype_word
from lorashrink.recipes.choice import Selection, caps, quantiles, score
from lorashrink.recipes.grammar import Recipe
from lorashrink.recipes.pricing import Offer, fine_enough, select_in_dtypes
from lorashrink.recipes.quality import anchor_of, distortion, predicted_db
from lorashrink.recipes.terms import LayerFacts
from lorashrink.results.shrinking import Capped, FileResult, LayerResult, Removed, Verbatim
from lorashrink.shrinking import metadata
from lorashrink.shrinking.decomposed import Decomposed, more_than_delta
from lorashrink.shrinking.encoders import Anchor, anchors, readable
from lorashrink.shrinking.layout import Form, Layout
from lorashrink.shrinking.outputs import shown
from lorashrink.shrinking.remarks import (
    above_limits,
    grown,
    kept_for_diffusers,
    output_warnings,
    uncapped,
    unreadable_encoders,
)

if TYPE_CHECKING:
    from torch import Tensor

    from lorashrink.recipes.terms import Values

UNMAPPED = ("keep", "drop", "error")


@dataclass(frozen=True, eq=False)
class Outline:
    """One output before its ranks are chosen. It holds no factors and can wait for others."""

    recipe: Recipe
    judged: Sequence[int]  # indices of the layers that the recipe can judge
    offers: Sequence[Offer]  # of these: what is known of them in each dtype that they may be written in
    scores: Sequence[Values]  # of these, in the dtype that comes first
    verbatim: Mapping[str, str]  # key -> reason
    removed: Mapping[str, str]  # layer or key -> reason
    layout: Layout
    anchors: Sequence[Anchor]  # layers that keep text encoders readable

    def of(self, recipe: Recipe) -> Outline:
        """The outline of a recipe that differs from this one's in its selection alone."""
        return replace(self, recipe=recipe, layout=self.layout.of(recipe))

    @cached_property
    def facts(self) -> list[LayerFacts]:
        """What is known of the judged layers in the dtype that comes first."""
        return [next(iter(offer.values())) for offer in self.offers]

    def select(self, anchor: float | None = None) -> Selection:
        """What the recipe keeps, before `chosen`. anchor: see `recipes.quality`. Raises RecipeError."""
        return select_in_dtypes(
            self.recipe,
            self.offers,
            self.layout.dtype,
            self.size,
            anchor_of(anchor),
            scores=self.scores,
        )

    def as_selected(self, selection: Selection) -> tuple[Layout, list[LayerFacts]]:
        """The layout, and what is known of the layers, in the dtypes of a selection."""
        if not selection.dtypes:
            return self.layout, self.facts
        facts = [offer[dtype] for offer, dtype in zip(self.offers, selection.dtypes, strict=True)]
        return self.layout.in_dtypes(selection.dtypes), facts

    def size(self, widths: Sequence[int], threshold: float | None, dtypes: Sequence[str] = ()) -> int:
        """Bytes of the file for what a selection keeps."""
        layout = self.layout.in_dtypes(dtypes) if dtypes else self.layout
        return layout.size(readable(self.recipe, self.anchors, widths), threshold)

    def chosen(self, selection: Selection) -> Selection:
        """The selection with the dimensions that keep text encoders readable."""
        widths = readable(self.recipe, self.anchors, selection.widths)
        kept = list(selection.kept)
        for position, (old, new) in enumerate(zip(selection.widths, widths, strict=True)):
            if new != old:
                order = (-self.scores[position]).argsort(kind="stable")
                kept[position] = tuple(order[: min(new, self.facts[position].rank)].tolist())
        return replace(selection, kept=tuple(kept), widths=tuple(widths))


@dataclass(frozen=True, eq=False)
class LayerPlan:
    """The fate of one layer that the recipe judged."""

    index: int  # in the adapter
    layer: Layer
    spectrum: Spectrum
    facts: LayerFacts
    form: Form  # how it is written
    kept: Sequence[int]  # dimensions, best first; () = removed
    width: int  # the rank to write
    dtype: str  # of its factors, the format's name
    states_alpha: bool  # whether readers multiply it with alpha / rank
    statistics: LayerStatistics | None  # by which its spectrum is calibrated
    stays: bool  # it is copied, because its own form is the smaller one
    limits: Tensor | None  # [kept]: what the recipe's limits multiply the kept dimensions with, if they do

    @property
    def written(self) -> bool:
        """Whether it is written anew."""
        return bool(self.width) and not self.stays

    def energies(self) -> tuple[Energy, Energy] | None:
        """What errors of its factors do, None if nothing but their length tells."""
        return self.statistics.energies() if self.statistics else None

    @property
    def caps(self) -> Tensor | None:
        """`limits`, but None for a layer that is copied."""
        return None if self.stays else self.limits

    @cached_property
    def total(self) -> float:
        """‖ΔW‖_F²."""
        return self.spectrum.total

    @cached_property
    def loss(self) -> float:
        """‖ΔW - ΔW'‖_F before `rescale`."""
        return 0.0 if self.stays else self.spectrum.lost(self.kept, self.caps)

    @cached_property
    def norm(self) -> float:
        """‖ΔW'‖_F before `rescale`."""
        return math.sqrt(self.total) if self.stays else self.spectrum.norm(self.kept, self.caps)

    @cached_property
    def remaining(self) -> float:
        """`norm`, from the input's own norm where that is known beside the spectrum."""
        square = self.spectrum.square
        if square is None or self.caps is not None or self.spectrum.plain:
            return self.norm
        return math.sqrt(max(0.0, square - self.loss**2))

    def result(self, rescale: float) -> LayerResult:
        """Its row in the report."""
        total, base = self.total, self.facts.base_fro
        lost = self.loss / math.sqrt(total) if total else 0.0  # squares of numbers such as 1e-300 are 0
        return LayerResult(
            name=self.layer.name,
            shape=self.layer.shape,
            algo=self.layer.algo,
            rank_before=self.layer.rank,
            rank_after=self.layer.rank if self.stays else self.width,
            energy=1 - lost**2 if self.caps is None or not total else self.norm**2 / total,
            rle_lora=lost,
            rle_ckpt=abs(rescale) * self.loss / base if base else None,
        )

    def capped(self, rescale: float) -> Capped | None:
        """Norms before and after the limits, None if the limits change nothing."""
        if self.caps is None:
            return None
        before = abs(rescale) * self.spectrum.sigma[list(self.kept)]
        after = before * self.caps
        return Capped(self.layer.name, *map(float, (before.max(), after.max(), before.norm(), after.norm())))


def relative_error(layers: Sequence[LayerPlan]) -> float:
    """sqrt(Σ‖lost‖² / Σ‖ΔW‖²)."""
    total = sum(layer.total for layer in layers)
    return math.sqrt(sum(layer.loss**2 for layer in layers) / total) if total else 0.0


def kept_energy(recipe: Recipe, layers: Sequence[LayerPlan]) -> float | None:
    """Σ‖ΔW'‖² / Σ‖ΔW‖² of what a recipe with limits leaves; without limits None, for then it follows from the error."""
    total = sum(layer.total for layer in layers)
    return sum(layer.norm**2 for layer in layers) / total if recipe.caps and total else None


@dataclass(frozen=True, eq=False)
class Plan:
    """Everything about one output before its numbers are computed."""

    adapter: Adapter
    recipe: Recipe
    threshold: float | None  # lowest kept score
    layers: Sequence[LayerPlan]
    tensors: Mapping[str, TensorInfo]  # of the output
    metadata: Mapping[str, str]
    verbatim: Mapping[str, str]  # key -> reason
    removed: Mapping[str, str]  # layer or key -> reason
    warnings: Sequence[str]
    settings: peft.Settings  # PEFT's, for the new ranks
    form_sizes: Mapping[str, int]  # see FileResult.forms
    alpha: int  # of every layer of the output that states one
    lost: float | None  # what it does to pictures, in the unit of `recipes.quality`; None where nothing tells
    predicted_db: float | None  # PSNR of pictures

    @cached_property
    def arrangement(self) -> Arrangement:
        """`tensors` in the order of the file."""
        return Arrangement(self.tensors)

    @property
    def nbytes(self) -> int:
        """Size of the output."""
        return len(self.arrangement.header(self.metadata)) + self.arrangement.nbytes

    @cached_property
    def written(self) -> Mapping[int, LayerPlan]:
        """Index in the adapter -> plan, of the layers that are written anew."""
        return {layer.index: layer for layer in self.layers if layer.written}

    @property
    def dtype(self) -> str:
        """The user's word for the dtype of the layers that are written anew; "mixed" if there are several."""
        return dtype_word({layer.dtype for layer in self.written.values()})

    @cached_property
    def norm(self) -> float:
        """‖ΔW'‖_F of all layers before `rescale`."""
        return math.sqrt(sum(layer.norm**2 for layer in self.layers))

    def baked(self, layer: LayerPlan) -> float:
        """Scale of a layer's factors relative to its truncated ΔW; the reader multiplies by alpha / rank."""
        return self.recipe.rescale * (layer.width / self.alpha if layer.states_alpha else 1.0)


def outline(
    decomposed: Decomposed,
    recipe: Recipe,
    *,
    dtype: str,
    unmapped: str,
    form: str,
    family: str | None,
    origin: metadata.Origin,
) -> Outline:
    """Sort the layers into judged, copied and removed ones. Raises InputError (`unmapped="error"`).

    family: of models that the adapter is for, if that is known.
    """
    adapter = decomposed.adapter
    judged: list[int] = []
    verbatim, removed = dict(adapter.others), dict(adapter.dropped)
    for index, layer in enumerate(adapter.layers):
        spectrum = decomposed.spectra[index]
        stays = ""  # why
        if recipe.judges_by_base and not decomposed.views[index]:
            if unmapped == "error":
                raise InputError(
                    f"{adapter.path}: layer {layer.name} changes no weight of the base, and recipe '{recipe}' "
                    "needs one. Use --unmapped keep or drop."
                )
            misfit = decomposed.misfits.get(layer.name)
            if unmapped == "drop":
                removed[layer.name] = misfit or "changes no weight of the base"
            else:
                stays = misfit or "its layer changes no weight of the base"
        elif recipe.calibrated and not decomposed.statistics[index]:
            stays = "the calibration has no statistics of its weight"
        elif spectrum.rank == 0 and more_than_delta(layer):
            stays = "its ΔW is zero, but its other tensors change the model"
        elif spectrum.rank == 0:
            zero = "it does not change the model's output" if spectrum.total else "ΔW is zero"
            removed[layer.name] = "its alpha is 0, which means strength 0" if layer.off else zero
        else:
            judged.append(index)
            if "magnitude" in layer.keys:
                verbatim[layer.keys["magnitude"]] = "DoRA's magnitude, which belongs to the factors beside it"
        if stays:
            verbatim |= dict.fromkeys(layer.keys.values(), stays)
    layout = Layout(adapter, recipe, origin, judged, verbatim, dtype, form, family)
    offers = [
        fine_enough({kind: decomposed.facts(index, kind, with_alpha=layout.states_alpha(position)) for kind in options})
        for position, (index, options) in enumerate(zip(judged, layout.options, strict=True))
    ]
    layout = layout.in_dtypes([next(iter(offer)) for offer in offers])
    scores = [score(recipe, next(iter(offer.values()))) for offer in offers]
    best = [float(values.max()) for values in scores]
    return Outline(recipe, judged, offers, scores, verbatim, removed, layout, anchors(layout.layers, best, verbatim))


def plan(
    decomposed: Decomposed, outlined: Outline, selection: Selection | None = None, *, anchor: float | None = None
) -> Plan:
    """Decide what is kept, what is removed, and what the output looks like to the last byte.

    selection: what was chosen already, together with other files. anchor: see `recipes.quality`. Raises RecipeError
    (nothing would be left, or `size=` or `quality=` cannot be met).
    """
    adapter, recipe = decomposed.adapter, outlined.recipe
    selected = selection or outlined.select(anchor)
    selection = outlined.chosen(selected)
    layout, facts = outlined.as_selected(selection)
    widths = selection.widths
    layers = layer_plans(decomposed, outlined, selection)
    lost, quality = prediction(recipe, layers, anchor)
    tensors = layout.tensors(widths)
    verbatim, removed = dict(outlined.verbatim), dict(outlined.removed)
    for layer in layers:
        _sort_tensors(layer, tensors, verbatim, removed)
    uncut = [planned.layer.name for planned in layers if planned.stays and planned.limits is not None]
    for key in adapter.common:
        (verbatim if key in tensors else removed)[key] = "shared by layers"
    return Plan(
        adapter=adapter,
        recipe=recipe,
        threshold=selection.threshold,
        layers=layers,
        tensors=tensors,
        metadata=layout.metadata(widths, selection.threshold, relative_error(layers), kept_energy(recipe, layers)),
        verbatim=verbatim,
        removed=removed,
        warnings=[
            *output_warnings(decomposed, layout, widths),
            *unreadable_encoders(adapter.layers, removed),
            *kept_for_diffusers(anchor for anchor in outlined.anchors if anchor.missing(selected.widths)),
            *uncapped(recipe, layout, facts, widths),
            *above_limits(recipe, uncut),
            *grown(layout, tensors),
        ],
        settings=layout.settings(widths),
        form_sizes=layout.form_sizes(widths, selection.threshold),
        alpha=layout.alpha(widths),
        lost=lost,
        predicted_db=quality,
    )


def layer_plans(decomposed: Decomposed, outlined: Outline, selection: Selection) -> list[LayerPlan]:
    """What becomes of each judged layer. Raises RecipeError if nothing would be left of the file."""
    adapter, recipe = decomposed.adapter, outlined.recipe
    layout, facts = outlined.as_selected(selection)
    if adapter.layers and not outlined.verbatim and not any(selection.widths):
        if not facts:
            raise RecipeError(f"{adapter.path}: every layer is zero; there is nothing to shrink.")
        best = max(float(score(recipe, of_layer).max()) for of_layer in facts)
        raise RecipeError(
            f"{adapter.path}: recipe '{recipe}' keeps nothing: the best dimension scores {best:.2f}. "
            "Use a lower threshold or a larger size, or min_rank=1."
        )
    stays = layout.stays(selection.widths)
    limits: list[Tensor | None] = [None] * len(facts)
    if recipe.caps:
        factors = (caps(recipe, *judged) for judged in zip(facts, selection.kept, strict=True))
        limits = [None if array is None else torch.from_numpy(array) for array in factors]
    return [
        LayerPlan(
            index=index,
            layer=layout.layers[position],
            spectrum=decomposed.spectra[index],
            facts=facts[position],
            form=layout.forms[position],
            kept=selection.kept[position],
            width=selection.widths[position],
            dtype=layout.dtypes[position],
            states_alpha=layout.states_alpha(position),
            statistics=decomposed.statistics[index] if decomposed.statistics else None,
            stays=position in stays,
            limits=limits[position],
        )
        for position, index in enumerate(outlined.judged)
    ]


def prediction(
    recipe: Recipe, layers: Sequence[LayerPlan], anchor: float | None = None
) -> tuple[float | None, float | None]:
    """(What an output does to pictures in the unit of `recipes.quality`, the PSNR in dB that follows).

    Both are None without statistics, and the PSNR if nothing is lost.
    """
    if not recipe.calibrated:
        return None, None
    dropped = rounding = 0.0  # in the unit of calibrated σ²
    for layer in layers:
        if not layer.stays:
            squares = layer.facts.sigma**2
            kept = list(layer.kept)
            dropped += layer.facts.total - float(squares[kept].sum())
            if layer.facts.noise is not None:
                rounding += float((layer.facts.noise * squares)[kept].sum())
    lost = distortion(max(0.0, dropped), rounding)
    return lost, predicted_db(lost, anchor_of(anchor))


def _sort_tensors(
    planned: LayerPlan, tensors: Mapping[str, TensorInfo], verbatim: dict[str, str], removed: dict[str, str]
) -> None:
    """Say why a layer's tensors are copied, or are not in the output."""
    layer = planned.layer
    if planned.stays:
        own = "with its core" if layer.family.written else f"as {layer.algo}"
        reason = f"smaller {own} than as a LoRA of rank {planned.width}"
        verbatim |= dict.fromkeys(layer.keys.values(), reason)
    elif not planned.width:
        removed[layer.name] = "no dimension passes the recipe"
    elif layer.family.written:
        folded = {role: key for role, key in layer.keys.items() if key not in tensors}
        if alpha := folded.pop("alpha", None):
            removed[alpha] = "its scale is in the factors: not every loader multiplies 8-bit floats with it"
        removed |= dict.fromkeys(folded.values(), "folded into the factors, which every loader reads")


def file_result(
    planned: Plan, output: Path, *, started: float, with_quantiles: bool = False, warnings: Sequence[str] = ()
) -> FileResult:
    """The report on one output. `warnings` are those from writing it."""
    recipe, layers = planned.recipe, planned.layers
    capped = [layer.capped(recipe.rescale) for layer in layers]
    at = quantiles(recipe, [layer.facts for layer in layers]) if with_quantiles else {}
    return FileResult(
        source=str(planned.adapter.path),
        output=str(shown(output)),
        recipe=str(recipe),
        threshold=planned.threshold,
        bytes_before=planned.adapter.store.nbytes,
        bytes_after=planned.nbytes,
        relative_error=relative_error(layers),
        seconds=time.perf_counter() - started,
        layers=tuple(layer.result(recipe.rescale) for layer in layers),
        verbatim=tuple(Verbatim(key, reason) for key, reason in planned.verbatim.items()),
        removed=tuple(Removed(name, reason) for name, reason in planned.removed.items()),
        warnings=(*planned.warnings, *warnings),
        forms=planned.form_sizes,
        capped=tuple(row for row in capped if row),
        kept_energy=kept_energy(recipe, layers),
        quantiles={f"{share:g}": value for share, value in at.items()},
        predicted_db=planned.predicted_db,
        distortion=planned.lost,
        dtype=planned.dtype,
    )
