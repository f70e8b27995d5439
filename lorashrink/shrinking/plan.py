"""What becomes of one adapter: its layers judged by recipes and laid out as files."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from lorashrink.adapters import Adapter, Layer, peft
from lorashrink.engine.spectrum import Spectrum
from lorashrink.errors import InputError, RecipeError
from lorashrink.files.store import TensorInfo
from lorashrink.recipes.choice import Selection, caps, score, select
from lorashrink.recipes.choice import quantiles as score_quantiles
from lorashrink.recipes.grammar import Recipe
from lorashrink.recipes.terms import LayerFacts
from lorashrink.results.shrinking import Capped, FileResult, LayerResult, Removed, Verbatim
from lorashrink.shrinking import metadata
from lorashrink.shrinking.decomposed import Decomposed, more_than_delta
from lorashrink.shrinking.layout import Form, Layout, file_size
from lorashrink.shrinking.outputs import shown
from lorashrink.shrinking.remarks import above_limits, output_warnings, uncapped, unreadable_encoders

if TYPE_CHECKING:
    from torch import Tensor

UNMAPPED = ("keep", "drop", "error")


@dataclass(frozen=True, eq=False)
class Plan:
    """Everything about one output before its numbers are computed."""

    decomposed: Decomposed
    recipe: Recipe
    shrunk: Sequence[int]  # indices of the layers that the recipe judged
    facts: Sequence[LayerFacts]  # of these
    selection: Selection  # of these
    caps: Sequence[Tensor | None]  # of these: what the recipe's limits multiply the kept dimensions with, if they do
    losses: Sequence[float]  # of these: ‖ΔW - ΔW'‖_F before `rescale`
    norms: Sequence[float]  # of these: ‖ΔW'‖_F before `rescale`
    totals: Sequence[float]  # of these: ‖ΔW‖_F²
    forms: Sequence[Form]  # of these
    stays: frozenset[int]  # places among these whose own form is the smaller one
    tensors: Mapping[str, TensorInfo]  # of the output
    metadata: Mapping[str, str]
    verbatim: Mapping[str, str]  # key -> reason
    removed: Mapping[str, str]  # layer or key -> reason
    warnings: Sequence[str]
    settings: peft.Settings  # PEFT's, for the new ranks
    form_sizes: Mapping[str, int]  # see FileResult.forms

    @cached_property
    def places(self) -> Mapping[int, int]:
        """Index in the adapter -> place in `shrunk`, of the layers that are written anew."""
        return {
            index: place
            for place, index in enumerate(self.shrunk)
            if self.selection.widths[place] and place not in self.stays
        }

    @cached_property
    def alpha(self) -> int:
        """The alpha of every layer of the output.

        One number, because diffusers (0.42) gives the most frequent alpha of a kohya file to all of its layers. It is
        the largest rank; a layer of a lower rank has factors that are smaller by √(rank/alpha) to make up for it.
        """
        return max((self.selection.widths[place] for place in self.places.values()), default=0)

    def baked(self, place: int) -> float:
        """What a layer's factors hold, relative to its truncated ΔW; the reader's alpha / rank does the rest."""
        share = self.selection.widths[place] / self.alpha if "alpha" in self.forms[place].keys else 1.0
        return self.recipe.rescale * share

    @cached_property
    def size(self) -> int:
        """Bytes of the output."""
        return file_size(self.tensors, self.metadata)

    @cached_property
    def relative_error(self) -> float:
        """See `relative_error`."""
        return relative_error(self.totals, self.losses)

    @property
    def kept_energy(self) -> float | None:
        """See `kept_energy`."""
        return kept_energy(self.recipe, self.totals, self.norms)

    def capped(self) -> tuple[Capped, ...]:
        """The layers that the recipe's limits changed."""
        found = []
        for place, factors in enumerate(self.caps):
            if factors is not None:
                index = self.shrunk[place]
                kept = self.decomposed.spectra[index].sigma[list(self.selection.kept[place])]
                before = abs(self.recipe.rescale) * kept
                after = before * factors
                norms = [float(norm) for norm in (before.max(), after.max(), before.norm(), after.norm())]
                found.append(Capped(self.decomposed.adapter.layers[index].name, *norms))
        return tuple(found)

    def layer_results(self) -> tuple[LayerResult, ...]:
        """One row per layer that the recipe judged."""
        rows = []
        judged = zip(self.shrunk, self.facts, self.losses, self.totals, strict=True)
        for place, (index, facts, lost, total) in enumerate(judged):
            layer = self.decomposed.adapter.layers[index]
            whole = math.sqrt(total)
            rows.append(
                LayerResult(
                    name=layer.name,
                    shape=layer.shape,
                    algo=layer.algo,
                    rank_before=layer.rank,
                    rank_after=layer.rank if place in self.stays else self.selection.widths[place],
                    energy=1 - (lost / whole) ** 2 if self.caps[place] is None else self.norms[place] ** 2 / total,
                    rle_lora=lost / whole,
                    rle_ckpt=abs(self.recipe.rescale) * lost / facts.base_fro if facts.base_fro else None,
                )
            )
        return tuple(rows)


def relative_error(totals: Sequence[float], losses: Sequence[float]) -> float:
    """sqrt(Σ‖lost‖² / Σ‖ΔW‖²) over layers of these squared norms that lose these norms."""
    total = sum(totals)
    return math.sqrt(sum(lost**2 for lost in losses) / total) if total else 0.0


def kept_energy(recipe: Recipe, totals: Sequence[float], norms: Sequence[float]) -> float | None:
    """Σ‖ΔW'‖² / Σ‖ΔW‖² of what a recipe with limits leaves; without limits None, for then it follows from the error."""
    total = sum(totals)
    return sum(norm**2 for norm in norms) / total if recipe.caps and total else None


@dataclass(frozen=True, eq=False)
class Outline:
    """One output before its ranks are chosen. It holds no factors and can wait for others."""

    recipe: Recipe
    shrunk: Sequence[int]  # indices of the layers that the recipe can judge
    facts: Sequence[LayerFacts]  # of these
    verbatim: Mapping[str, str]
    removed: Mapping[str, str]
    layout: Layout


def outline(
    decomposed: Decomposed,
    recipe: Recipe,
    *,
    dtype: str = "same",
    unmapped: str = "keep",
    form: str = "auto",
    origin: metadata.Origin,
) -> Outline:
    """What a recipe has to choose from, and how large its choices are. Raises InputError (`unmapped="error"`)."""
    shrunk, verbatim, removed = _sorted_layers(decomposed, recipe, unmapped)
    layout = Layout(decomposed.adapter, recipe, origin, shrunk, verbatim, dtype, form)
    facts = [decomposed.facts(index, layout.kinds[index]) for index in shrunk]
    return Outline(recipe, shrunk, facts, verbatim, removed, layout)


def plan(decomposed: Decomposed, outlined: Outline, selection: Selection | None = None) -> Plan:
    """Decide what is kept, what is removed, and what the output looks like to the last byte.

    selection: what was chosen already, together with other files. Raises RecipeError (nothing would be left, or `size=`
    cannot be met).
    """
    adapter, recipe, layout = decomposed.adapter, outlined.recipe, outlined.layout
    shrunk, facts = outlined.shrunk, outlined.facts
    verbatim, removed = dict(outlined.verbatim), dict(outlined.removed)
    selection = selection or select(recipe, facts, layout.size)
    widths = selection.widths
    if adapter.layers and not verbatim and not any(widths):
        raise RecipeError(_nothing_left(adapter, recipe, facts))
    stays = layout.stays(widths)
    spectra = [decomposed.spectra[index] for index in shrunk]
    limits = [_limits(recipe, each, kept) for each, kept in zip(facts, selection.kept, strict=True)]
    factors = [None if place in stays else each for place, each in enumerate(limits)]
    totals = [each.total for each in spectra]
    judged = list(zip(spectra, selection.kept, factors, strict=True))
    losses = [0.0 if place in stays else each.lost(kept, cap) for place, (each, kept, cap) in enumerate(judged)]
    norms = [
        math.sqrt(totals[place]) if place in stays else each.norm(kept, cap)
        for place, (each, kept, cap) in enumerate(judged)
    ]
    tensors = layout.tensors(widths)
    for place, index in enumerate(shrunk):
        layer = adapter.layers[index]
        if place in stays:
            why = f"smaller as {layer.algo} than as a LoRA of rank {widths[place]}"
            verbatim |= dict.fromkeys(layer.keys.values(), why)
        elif not widths[place]:
            removed[layer.name] = "no dimension passes the recipe"
        elif layer.family.written:
            gone = [key for key in layer.keys.values() if key not in tensors]
            removed |= dict.fromkeys(gone, "folded into the factors, which every loader reads")
    for key in adapter.common:
        (verbatim if key in tensors else removed)[key] = "shared by layers"
    return Plan(
        decomposed=decomposed,
        recipe=recipe,
        shrunk=shrunk,
        facts=facts,
        selection=selection,
        caps=factors,
        losses=losses,
        norms=norms,
        totals=totals,
        forms=layout.forms,
        stays=stays,
        tensors=tensors,
        metadata=layout.metadata(
            widths, selection.threshold, relative_error(totals, losses), kept_energy(recipe, totals, norms)
        ),
        verbatim=verbatim,
        removed=removed,
        warnings=[
            *output_warnings(decomposed, layout, widths),
            *unreadable_encoders(adapter.layers, removed),
            *uncapped(recipe, layout, facts, widths),
            *above_limits(recipe, layout, [place for place in stays if limits[place] is not None]),
        ],
        settings=layout.settings(widths),
        form_sizes=layout.form_sizes(widths, selection.threshold),
    )


def _limits(recipe: Recipe, facts: LayerFacts, kept: Sequence[int]) -> Tensor | None:
    found = caps(recipe, facts, kept) if recipe.caps else None
    return None if found is None else torch.from_numpy(found)


def _sorted_layers(
    decomposed: Decomposed, recipe: Recipe, unmapped: str
) -> tuple[list[int], dict[str, str], dict[str, str]]:
    """(indices of the layers that the recipe can judge, key -> why verbatim, layer -> why removed)."""
    adapter = decomposed.adapter
    shrunk: list[int] = []
    verbatim, removed = dict(adapter.others), dict(adapter.dropped)
    for index, layer in enumerate(adapter.layers):
        if recipe.judges_by_base and not decomposed.views[index]:
            if unmapped == "error":
                raise InputError(
                    f"{adapter.path}: layer {layer.name} changes no weight of the base, and recipe '{recipe}' "
                    "needs one. Use --unmapped keep or drop."
                )
            if unmapped == "drop":
                removed[layer.name] = "changes no weight of the base"
            else:
                verbatim |= dict.fromkeys(layer.keys.values(), "its layer changes no weight of the base")
        elif recipe.calibrated and not decomposed.calibrated[index]:
            verbatim |= dict.fromkeys(layer.keys.values(), "the calibration has no statistics of its weight")
        elif decomposed.spectra[index].rank == 0 and more_than_delta(layer):
            verbatim |= dict.fromkeys(layer.keys.values(), "its ΔW is zero, but its other tensors change the model")
        elif decomposed.spectra[index].rank == 0:
            removed[layer.name] = _why_zero(layer, decomposed.spectra[index])
        else:
            shrunk.append(index)
            if "magnitude" in layer.keys:
                verbatim[layer.keys["magnitude"]] = "DoRA's magnitude, which belongs to the factors beside it"
    return shrunk, verbatim, removed


def _why_zero(layer: Layer, spectrum: Spectrum) -> str:
    if layer.off:
        return "its alpha is 0, which means strength 0"
    return "it does not change the model's output" if spectrum.total else "ΔW is zero"


def _nothing_left(adapter: Adapter, recipe: Recipe, facts: Sequence[LayerFacts]) -> str:
    if not facts:
        return f"{adapter.path}: every layer is zero; there is nothing to shrink."
    best = max(float(score(recipe, each).max()) for each in facts)
    return (
        f"{adapter.path}: recipe '{recipe}' keeps nothing: the best dimension scores {best:.2f}. "
        "Use a lower threshold or a larger size, or min_rank=1."
    )


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
        forms=each.form_sizes,
        capped=each.capped(),
        kept_energy=each.kept_energy,
        quantiles={f"{k:g}": v for k, v in score_quantiles(each.recipe, each.facts).items()} if quantiles else {},
    )
