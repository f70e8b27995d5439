"""How the shrunk layers are laid out as tensors of a file, and how many bytes they take."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from lorashrink.adapters import Adapter, Layer, lora_form, peft
from lorashrink.adapters.family import Family, Infos
from lorashrink.files.header import header_bytes
from lorashrink.files.store import FACTOR_DTYPES, OUTPUT_DTYPES, TensorInfo, tensor_info
from lorashrink.recipes.grammar import Recipe
from lorashrink.shrinking import metadata


class Form(NamedTuple):
    """How a layer is written."""

    name: str
    family: Family
    keys: Mapping[str, str]  # role -> key
    infos: Infos


def _form(layer: Layer) -> Form:
    """The layer's own form if it can have any rank, else that of a LoRA."""
    return Form(layer.name, layer.family, layer.keys, layer.infos) if layer.family.written else Form(*lora_form(layer))


def file_size(tensors: Mapping[str, TensorInfo], entries: Mapping[str, str]) -> int:
    """Bytes of a safetensors file with these tensors and metadata."""
    return len(header_bytes(tensors, entries)) + sum(info.nbytes for info in tensors.values())


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
    return layer.dtype if layer.dtype in FACTOR_DTYPES else "F16"
