"""How the shrunk layers are laid out as tensors of a file, and how many bytes they take."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import copy
from dataclasses import replace
from typing import NamedTuple

from lorashrink.adapters import Adapter, Layer, lora_form, peft
from lorashrink.adapters.family import Family, Infos
from lorashrink.files.header import Sizes
from lorashrink.files.store import DTYPES, FACTOR_DTYPES, MIXTURES, OUTPUT_DTYPES, TensorInfo, tensor_info
from lorashrink.linking.loaders import hinders_8_bits
from lorashrink.recipes.grammar import Recipe
from lorashrink.shrinking import metadata

# Families of models with kohya's names, for which diffusers reads 8-bit floats beside an alpha, one for all layers.
READ_WITH_ALPHA = frozenset({"sd15", "sd2", "sdxl", "sdxl-refiner"})

FP8, FP16 = "F8_E4M3", "F16"

# Bytes of a tensor's header entry beside its name: dtype, shape, two offsets.
_ENTRY_BYTES = 64


class Form(NamedTuple):
    """How a layer is written."""

    name: str
    family: Family
    keys: Mapping[str, str]  # role -> key
    infos: Infos

    @classmethod
    def of(cls, layer: Layer) -> Form:
        """The layer's own form if it can have any rank, else the form of a LoRA."""
        if layer.family.written:
            return cls(layer.name, layer.family, layer.keys, layer.infos)
        return cls(*lora_form(layer))

    def tensors(self, rank: int, dtype: str) -> dict[str, TensorInfo]:
        """The tensors of the layer at a rank."""
        assert self.family.written
        tensors = {}
        for role, shape in self.family.written(self.infos, rank).items():
            # A half precision alpha could not hold every whole number.
            tensors[self.keys[role]] = tensor_info("F32" if role == "alpha" else dtype, shape)
        if "bias" in self.keys:  # a vector, which gains nothing from 8 bits
            tensors[self.keys["bias"]] = tensor_info(FP16 if dtype == FP8 else dtype, self.infos["bias"].shape)
        return tensors

    def without_alpha(self) -> Form:
        """The same form with all scale in the factors."""
        keys = {role: key for role, key in self.keys.items() if role != "alpha"}
        return self._replace(keys=keys, infos={role: info for role, info in self.infos.items() if role != "alpha"})


class Layout:
    """The output as a function of the ranks that are written, to the last byte.

    A position is an index into the layers that the recipe judges; `widths` are the ranks of these layers.
    """

    def __init__(
        self,
        adapter: Adapter,
        recipe: Recipe,
        origin: metadata.Origin,
        judged: Sequence[int],
        verbatim: Mapping[str, str],
        dtype: str,
        form: str,
        family: str | None,
    ) -> None:
        self.adapter, self.recipe, self.origin = adapter, recipe, origin
        self.verbatim, self.dtype, self.form = verbatim, dtype, form
        self.layers = [adapter.layers[index] for index in judged]
        self.forms = [Form.of(layer) for layer in self.layers]
        # Why "auto" is fp16. What is in 8 bits already stays so, or the file would grow.
        in_8_bits = all(layer.dtype.startswith("F8") for layer in self.layers)
        self.no_fp8 = hinders_8_bits(adapter, family) if dtype == "auto" and not in_8_bits else ""
        # Per layer the dtypes that it may be written in, the preferred one first.
        self.options = [dtypes_for("fp16" if self.no_fp8 else dtype, layer.dtype) for layer in self.layers]
        self.dtypes: Sequence[str] = [options[0] for options in self.options]
        self.small = any(FP8 in options for options in self.options)
        if self.small and family not in READ_WITH_ALPHA:
            self.forms = [form.without_alpha() for form in self.forms]
        self._copied = {key: adapter.store.tensors[key] for key in verbatim}
        # Layers whose own form cannot have any rank.
        self._converted = frozenset(position for position, layer in enumerate(self.layers) if not layer.family.written)
        # Layers whose core is multiplied into a factor, which may become larger than both.
        self._folded = frozenset(position for position, layer in enumerate(self.layers) if "mid" in layer.keys)
        # Both are filled when they are needed, once for this layout and all that are made of it.
        self._sizes: list[Sizes] = []  # at most one: every tensor in every dtype and form that its layer may have
        self._groups: dict[tuple[int, int, str], Sizes.Group] = {}  # (position, rank, dtype) -> its tensors

    def of(self, recipe: Recipe) -> Layout:
        """The layout for a recipe that differs from this one's in its selection alone."""
        layout = copy(self)
        layout.recipe, layout.origin = recipe, replace(self.origin, recipe=str(recipe))
        return layout

    def in_dtypes(self, dtypes: Sequence[str]) -> Layout:
        """The layout with the layers in other dtypes."""
        layout = copy(self)
        layout.dtypes = dtypes
        return layout

    def states_alpha(self, position: int) -> bool:
        """Whether readers of the output multiply a layer with alpha / rank, beside what is in its factors."""
        return "alpha" in self.forms[position].keys or (self.small and self.adapter.as_folder)

    def alpha(self, widths: Sequence[int]) -> int:
        """The alpha of all layers that state one.

        One number, because diffusers (0.42) gives the most frequent alpha of a kohya file to all of its layers. It is
        the largest rank; a layer of a lower rank has factors that are smaller by √(rank/alpha) to make up for it. In
        8-bit floats it is 1, so that numbers are as large as can be, and not among those with few digits.
        """
        return 1 if self.small else max((widths[position] for position in self.written(widths)), default=0)

    def size(self, widths: Sequence[int], threshold: float | None, form: str | None = None) -> int:
        """Bytes of the file."""
        if not self._sizes:
            tables = [self._copied]
            for position, options in enumerate(self.options):
                tables += [self.forms[position].tensors(1, dtype) for dtype in options]
                if position in self._converted or position in self._folded:  # only these may stay as they are
                    tables.append(self._of_layer(position, 0))
            self._sizes.append(Sizes(item for table in tables for item in table.items()))
        (sizes,) = self._sizes
        groups = [sizes.group(self._copied)]
        for position, width in self._parts(widths, form):
            key = position, width, self.dtypes[position]
            if key not in self._groups:
                self._groups[key] = sizes.group(self._of_layer(position, width))
            groups.append(self._groups[key])
        return sizes.size(groups, self.metadata(widths, threshold, form=form))

    def form_sizes(self, widths: Sequence[int], threshold: float | None) -> dict[str, int]:
        """Bytes of the file with all layers that are no LoRA left as they are, or all written as LoRA."""
        return {form: self.size(widths, threshold, form) for form in ("same", "lora")} if self._converted else {}

    def stays(self, widths: Sequence[int], form: str | None = None) -> frozenset[int]:
        """Positions of the layers that stay in their own form, because they are larger as LoRA."""
        form = form or self.form
        if form == "lora" or (form == "auto" and self.recipe.rescale != 1):  # what is copied keeps its strength
            return frozenset()
        candidates = [
            position
            for position in self._converted
            if widths[position] and not self.layers[position].family.becomes_lora
        ]
        cores = [position for position in self._folded if widths[position] and not self.recipe.uniform]
        if form == "same":
            return frozenset(candidates) | self._smaller(cores, widths)
        smaller = self._smaller([*candidates, *cores], widths)
        if not candidates:
            return smaller
        if not self.adapter.as_folder and not any(layer.family.changed_base for layer in self.layers):
            return smaller
        # A folder's configuration knows one kind of adapter, and a changed base is that of all layers.
        own, lora = zip(*(self._two_sizes(position, widths) for position in candidates), strict=True)
        return (smaller - self._converted) | frozenset(candidates if sum(own) <= sum(lora) else ())

    def _smaller(self, positions: Sequence[int], widths: Sequence[int]) -> frozenset[int]:
        """Those of the layers that are no larger in their own form."""
        sizes = {position: self._two_sizes(position, widths) for position in positions}
        return frozenset(position for position, (own, lora) in sizes.items() if own <= lora)

    def _two_sizes(self, position: int, widths: Sequence[int]) -> tuple[int, int]:
        """About the bytes of a layer (in its own form, as a LoRA)."""
        stored = self.adapter.store.tensors
        own = {key: stored[key] for key in self.layers[position].keys.values()}
        return _about_bytes(own), _about_bytes(self.forms[position].tensors(widths[position], self.dtypes[position]))

    def written(self, widths: Sequence[int], form: str | None = None) -> list[int]:
        """Positions of the layers that are written anew."""
        stays = self.stays(widths, form)
        return [position for position, width in enumerate(widths) if width and position not in stays]

    def tensors(self, widths: Sequence[int], form: str | None = None) -> dict[str, TensorInfo]:
        """All tensors of the file."""
        tensors = dict(self._copied)
        for position, width in self._parts(widths, form):
            tensors |= self._of_layer(position, width)
        return tensors

    def _parts(self, widths: Sequence[int], form: str | None) -> list[tuple[int, int]]:
        """(position, rank to write) of each layer that is in the file; 0 where it stays in its own form."""
        stays = self.stays(widths, form)
        return [
            (position, 0 if position in stays else width)
            for position, width in enumerate(widths)
            if width or position in stays
        ]

    def _of_layer(self, position: int, width: int) -> dict[str, TensorInfo]:
        """The tensors of a layer at a rank, or with 0 in its own form."""
        if width:
            return self.forms[position].tensors(width, self.dtypes[position])
        layer = self.layers[position]
        keys = [*layer.keys.values(), *layer.common.values()]
        return {key: self.adapter.store.tensors[key] for key in keys}

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
            self._updated_metadata(str(self.recipe), widths, form),
            recipe=self.recipe,
            threshold=threshold,
            origin=self.origin,
            error=error,
            energy=energy,
        )

    def packed_metadata(self, widths: Sequence[int], label: str) -> dict[str, str]:
        """The metadata of the file that a packed one unpacks to. label: what it was packed to."""
        how = f"pack,{label}"
        return metadata.packed(self._updated_metadata(how, widths, None), origin=self.origin, how=how)

    def _updated_metadata(self, how: str, widths: Sequence[int], form: str | None) -> dict[str, str]:
        return metadata.updated(
            self.adapter.store.metadata,
            how=how,
            ranks=self._ranks(widths, form),
            old_rank=max((layer.rank for layer in self.adapter.layers), default=0),
            settings=self.settings(widths, form),
            became_lora=self._became_lora(widths, form),
            alpha=1 if self.small and any("alpha" in form.keys for form in self.forms) else None,
        )

    def settings(self, widths: Sequence[int], form: str | None = None) -> peft.Settings:
        """PEFT's settings for these ranks."""
        settings = self.adapter.settings
        if not settings:
            return settings
        if self._became_lora(widths, form):
            settings = peft.as_lora(settings)
        magnitudes = {layer.keys.get("magnitude") for layer in self.adapter.layers}
        names = {self.forms[position].name for position in self.stays(widths, form)}
        return peft.with_ranks(
            settings,
            self._ranks(widths, form),
            (self.verbatim.keys() - magnitudes) | names,
            alpha=1 if self.small and self.adapter.as_folder else None,
        )

    def _became_lora(self, widths: Sequence[int], form: str | None) -> bool:
        return not self._converted.isdisjoint(self.written(widths, form))

    def _ranks(self, widths: Sequence[int], form: str | None) -> dict[str, int]:
        return {self.forms[position].name: widths[position] for position in self.written(widths, form)}


def dtypes_for(dtype: str, own: str) -> tuple[str, ...]:
    """The dtypes of the format that a layer of this dtype may be written in, by the user's word for it."""
    if dtype in MIXTURES:
        return FP8, FP16
    chosen = OUTPUT_DTYPES[dtype] or (own if own in FACTOR_DTYPES else FP8 if DTYPES[own][0] == 1 else FP16)
    return (FP8, FP16) if chosen == FP8 else (chosen,)


def _about_bytes(tensors: Mapping[str, TensorInfo]) -> int:
    """About what these tensors take in a file."""
    return sum(info.nbytes + len(key) + _ENTRY_BYTES for key, info in tensors.items())
