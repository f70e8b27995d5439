"""What becomes of one adapter: its layers judged by recipes and laid out as files."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch

from lorashrink import metadata
from lorashrink.adapters import Adapter, Layer, lora_form, peft
from lorashrink.adapters.family import Family, Infos
from lorashrink.base_norms import Norms
from lorashrink.bases import Base, Views, views_id
from lorashrink.delta import fan_in
from lorashrink.errors import InputError, NonFinite, RecipeError
from lorashrink.files import DTYPES, OUTPUT_DTYPES, TensorInfo, header_bytes, tensor_info
from lorashrink.outputs import shown
from lorashrink.recipe import CAPS, LayerFacts, Recipe, Selection, caps, score, select
from lorashrink.recipe import quantiles as score_quantiles
from lorashrink.results import Capped, FileResult, LayerResult, Removed, Verbatim
from lorashrink.spectrum import Spectrum, alignment

if TYPE_CHECKING:
    from torch import Tensor

_SHRINKABLE_DTYPES = frozenset({"F16", "BF16", "F32", "F64"})
UNMAPPED = ("keep", "drop", "error")

# A text encoder's layers in kohya's names.
_ENCODER = re.compile(r"lora_te\d?(?=_text_model_encoder_layers_)")


@dataclass(frozen=True, eq=False)
class Decomposed:
    """An adapter with everything that recipes ask about its layers."""

    adapter: Adapter
    views: Sequence[Views]  # per layer; () without a base weight
    spectra: Sequence[Spectrum]
    norms: Norms
    alignments: Sequence[Tensor | None]
    # Per layer whether its spectrum is calibrated, where the recipe needs that; else ().
    calibrated: Sequence[bool] = ()

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
            removable=not _more_than_delta(layer),
            base_fro=norms.get("fro"),
            base_spn=norms.get("spn"),
            base_alignment=None if aligned is None else aligned.abs().numpy(),
            tail=self.spectra[index].tail,
            whole=self._whole,
        )

    @cached_property
    def _whole(self) -> float | None:
        if not self.calibrated:
            return None
        known = zip(self.spectra, self.calibrated, strict=True)
        return math.sqrt(sum(float((spectrum.sigma**2).sum()) for spectrum, calibrated in known if calibrated))


def _more_than_delta(layer: Layer) -> bool:
    """Whether the layer would change the model even with a ΔW of zero."""
    return bool({"magnitude", "bias"} & layer.keys.keys())


def _culprit(layer: Layer) -> str:
    for role, key in {**layer.keys, **layer.common}.items():
        if role != "alpha" and not torch.isfinite(layer.store.read(key).float()).all():
            return f" (in {key})"
    return ""


class Form(NamedTuple):
    """How a layer is written."""

    name: str
    family: Family
    keys: Mapping[str, str]  # role -> key
    infos: Infos


def _form(layer: Layer) -> Form:
    """The layer's own form if it can have any rank, else that of a LoRA."""
    return Form(layer.name, layer.family, layer.keys, layer.infos) if layer.family.written else Form(*lora_form(layer))


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


def file_size(tensors: Mapping[str, TensorInfo], entries: Mapping[str, str]) -> int:
    """Bytes of a safetensors file with these tensors and metadata."""
    return len(header_bytes(tensors, entries)) + sum(info.nbytes for info in tensors.values())


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
            *_warnings(decomposed, layout, widths),
            *_unreadable_encoders(adapter.layers, removed),
            *_uncapped(recipe, layout, facts, widths),
            *_above_limits(recipe, layout, [place for place in stays if limits[place] is not None]),
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
        elif decomposed.spectra[index].rank == 0 and _more_than_delta(layer):
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


def _warnings(decomposed: Decomposed, layout: Layout, widths: Sequence[int]) -> list[str]:
    """What a user should know though nothing went wrong."""
    warnings = []
    layers = decomposed.adapter.layers
    if not layout.written(widths):
        warnings.append(
            "no layer is smaller as a LoRA of these ranks, or can be one; the output is a copy of the input"
        )
    off = [layer.name for layer in layers if layer.off]
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


def _uncapped(recipe: Recipe, layout: Layout, facts: Sequence[LayerFacts], widths: Sequence[int]) -> list[str]:
    warnings = []
    for key in recipe.caps:
        judged = zip(layout.layers, facts, widths, strict=True)
        names = [layer.name for layer, each, width in judged if width and not each.base_norm(CAPS[key])]
        if names:
            why = "they change no weight of the base, or one that is zero"
            warnings.append(f"{key}= does not limit {len(names)} layers, first {names[0]}: {why}")
    return warnings


def _above_limits(recipe: Recipe, layout: Layout, places: Sequence[int]) -> list[str]:
    if not places:
        return []
    first = layout.layers[min(places)].name
    return [
        f"{len(places)} layers, first {first}, are above {' and '.join(f'{key}=' for key in recipe.caps)} but stay in "
        "their own form, where nothing can be limited; use --as lora"
    ]


def _unreadable_encoders(layers: Sequence[Layer], removed: Collection[str]) -> list[str]:
    """diffusers tells the kind of a text encoder's keys by those of its out_proj, and refuses files without any."""
    encoders: dict[str, list[str]] = {}
    for layer in layers:
        if found := _ENCODER.match(layer.name):
            encoders.setdefault(found[0], []).append(layer.name)
    return [
        f"{encoder} keeps other layers but no self_attn_out_proj, and diffusers 0.42 cannot load such a file; "
        "min_rank=1 in the recipe helps, or --naming diffusers"
        for encoder, names in encoders.items()
        if any(name not in removed for name in names)
        and all(name in removed for name in names if name.endswith("out_proj"))
    ]


class Layout:
    """The output as a function of the ranks that are written, to the last byte."""

    def __init__(
        self,
        adapter: Adapter,
        recipe: Recipe,
        origin: metadata.Origin,
        shrunk: Sequence[int],
        verbatim: Mapping[str, str],
        dtype: str,
        form: str,
    ) -> None:
        self.adapter, self.recipe, self.origin, self.dtype = adapter, recipe, origin, dtype
        self.form = form
        self.layers = [self.adapter.layers[index] for index in shrunk]
        self.forms = [_form(layer) for layer in self.layers]
        self.verbatim = verbatim
        self.kinds = {index: _output_dtype(self.adapter.layers[index], dtype) for index in shrunk}
        self._dtypes = list(self.kinds.values())
        self._as_is = {key: self.adapter.store.tensors[key] for key in verbatim}
        self._converted = frozenset(place for place, layer in enumerate(self.layers) if not layer.family.written)

    def size(self, widths: Sequence[int], threshold: float | None, form: str | None = None) -> int:
        """Bytes of the file."""
        return file_size(self.tensors(widths, form), self.metadata(widths, threshold, form=form))

    def form_sizes(self, widths: Sequence[int], threshold: float | None) -> dict[str, int]:
        """Bytes of the file with all layers that are no LoRA left as they are, or all written as LoRA."""
        return {form: self.size(widths, threshold, form) for form in ("same", "lora")} if self._converted else {}

    def stays(self, widths: Sequence[int], form: str | None = None) -> frozenset[int]:
        """Places of the layers that stay in their own form, because they are larger as LoRA."""
        form = form or self.form
        candidates = [place for place in self._converted if widths[place]]
        if form == "lora":
            return frozenset()
        if form == "same":
            return frozenset(candidates)
        stored = self.adapter.store.tensors
        own = {place: _bytes({key: stored[key] for key in self.layers[place].keys.values()}) for place in candidates}
        lora = {place: _bytes(self._written(place, widths[place])) for place in candidates}
        if self.adapter.as_folder:  # whose configuration knows one kind of adapter
            return frozenset(candidates if sum(own.values()) <= sum(lora.values()) else ())
        return frozenset(place for place in candidates if own[place] <= lora[place])

    def written(self, widths: Sequence[int], form: str | None = None) -> list[int]:
        """Places of the layers that are written anew."""
        stays = self.stays(widths, form)
        return [place for place, width in enumerate(widths) if width and place not in stays]

    def tensors(self, widths: Sequence[int], form: str | None = None) -> dict[str, TensorInfo]:
        """All tensors of the file."""
        result = dict(self._as_is)
        stays = self.stays(widths, form)
        for place, width in enumerate(widths):
            if place in stays:
                layer = self.layers[place]
                keys = [*layer.keys.values(), *layer.common.values()]
                result |= {key: self.adapter.store.tensors[key] for key in keys}
            elif width:
                result |= self._written(place, width)
        return result

    def _written(self, place: int, width: int) -> dict[str, TensorInfo]:
        _, family, keys, known = self.forms[place]
        assert family.written
        infos = {}
        for role, shape in family.written(known, width).items():
            # A half precision alpha could not hold every whole number.
            kind = "F32" if role == "alpha" else self._dtypes[place]
            infos[keys[role]] = tensor_info(kind, shape)
        if "bias" in keys:
            infos[keys["bias"]] = tensor_info(self._dtypes[place], known["bias"].shape)
        return infos

    def metadata(
        self,
        widths: Sequence[int],
        threshold: float | None,
        error: float = 0.0,
        energy: float | None = None,
        form: str | None = None,
    ) -> dict[str, str]:
        """The metadata of the file; its length does not depend on `error` and `energy`."""
        return metadata.shrunk(
            self.adapter.store.metadata,
            recipe=self.recipe,
            threshold=threshold,
            origin=self.origin,
            ranks=self._ranks(widths, form),
            old_rank=max((layer.rank for layer in self.adapter.layers), default=0),
            error=error,
            settings=self.settings(widths, form),
            became_lora=any(place in self._converted for place in self.written(widths, form)),
            energy=energy,
        )

    def settings(self, widths: Sequence[int], form: str | None = None) -> peft.Settings:
        """PEFT's settings for these ranks."""
        settings = self.adapter.settings
        if any(place in self._converted for place in self.written(widths, form)):
            settings = peft.as_lora(settings)
        magnitudes = {layer.keys.get("magnitude") for layer in self.adapter.layers}
        others = {*(self.verbatim.keys() - magnitudes), *(self.forms[place].name for place in self.stays(widths, form))}
        return peft.with_ranks(settings, self._ranks(widths, form), others)

    def _ranks(self, widths: Sequence[int], form: str | None) -> dict[str, int]:
        return {self.forms[place].name: widths[place] for place in self.written(widths, form)}


# What the header says of a tensor beside its name: dtype, shape, two offsets.
_ENTRY_BYTES = 64


def _bytes(tensors: Mapping[str, TensorInfo]) -> int:
    """About what these tensors take in a file."""
    return sum(info.nbytes + len(key) + _ENTRY_BYTES for key, info in tensors.items())


def _output_dtype(layer: Layer, asked: str) -> str:
    if wanted := OUTPUT_DTYPES[asked]:
        return wanted
    return layer.dtype if layer.dtype in _SHRINKABLE_DTYPES else "F16"


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


def aligned(
    adapter: Adapter, views: Sequence[Views], spectra: Sequence[Spectrum], base: Base, index: int
) -> Tensor | None:
    """The alignment of a layer's singular pairs with its base weight, None without one."""
    if not views[index] or not spectra[index].rank:
        return None
    return alignment(adapter.layers[index].delta, spectra[index], base.weight(views[index]))
