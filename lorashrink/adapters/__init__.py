"""Adapters: which tensors of a file form a layer, and what that layer adds to the base.

Read `family.py` first (the row), then `lora.py` (the plainest family), `families.py` (the registry), `sorting.py`
(from keys to layers) and `layer.py` (an open adapter).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from lorashrink.adapters import peft
from lorashrink.adapters.families import FAMILIES
from lorashrink.adapters.in_memory import Tensors, in_memory
from lorashrink.adapters.layer import Adapter, Layer
from lorashrink.adapters.lora import lora_form
from lorashrink.adapters.model_family import family_of
from lorashrink.adapters.peft_keys import check_keys
from lorashrink.adapters.sorting import UNKNOWN, layer_name, looks_like_adapter, sort_keys
from lorashrink.errors import NotAnAdapter
from lorashrink.files.in_memory import MemoryStore
from lorashrink.files.packed import is_packed, open_packed
from lorashrink.files.reading import open_tensors
from lorashrink.files.store import TensorStore

__all__ = [
    "FAMILIES",
    "UNKNOWN",
    "Adapter",
    "Layer",
    "Source",
    "Tensors",
    "adapter_family",
    "adapter_of",
    "in_memory",
    "layer_name",
    "looks_like_adapter",
    "lora_form",
    "open_adapter",
]

# An adapter to open: a path, or one that is in memory (see `in_memory`).
Source = str | Path | Mapping[str, Any] | Tensors | Any


def open_adapter(source: Source) -> Adapter:
    """Open an adapter and sort its keys into layers, of a file or PEFT folder from the header alone.

    source: a path, a mapping of names to tensors, `Tensors`, a PeftModel, or a diffusers pipeline with one adapter.

    A packed file is as the file that it unpacks to.
    Raises InputError or DamagedFile (unreadable, or a setting of unknown meaning), NotAnAdapter (no key looks like an
    adapter's), and ShapeError (a factor is missing, or the factors of a layer do not fit each other).
    """
    held = in_memory(source)
    if held is not None:
        settings = held.settings or peft.from_metadata(held.metadata)
        return adapter_of(Path(held.name), MemoryStore(held.name, held.tensors, held.metadata), settings)
    path = Path(source)  # type: ignore[arg-type]  # what is not in memory is a path
    folder = path if peft.is_folder(path) else path.parent
    # A file that PEFT saved is half an adapter: its scale is in the file beside it.
    as_folder = peft.is_folder(folder) and path in (folder, *(folder / name for name in peft.WEIGHTS_FILES))
    store = open_tensors(peft.weights_in(folder) if as_folder else path)
    try:
        if is_packed(store):
            store = open_packed(store)
        settings = peft.from_folder(folder) if as_folder else peft.beside(path) or peft.from_metadata(store.metadata)
        return replace(adapter_of(path, store, settings), as_folder=as_folder)
    except BaseException:
        store.close()
        raise


def adapter_of(path: Path, store: TensorStore, settings: peft.Settings) -> Adapter:
    """The adapter that these tensors make. Raises as `open_adapter`."""
    layers, others = sort_keys(store, settings)
    is_adapter = bool(layers) or looks_like_adapter(others)
    if layers or not is_adapter:  # settings may tell that it is an adapter of a kind that is not known
        check_keys(settings, path)
    if not is_adapter:
        if not store.tensors:
            raise NotAnAdapter(f"{path}: holds no tensors. Download or export it again.")
        raise NotAnAdapter(
            f"{path}: no adapter layer found among its {len(store.tensors)} tensors. "
            "If this is the base model, give it first or with --base."
        )
    return Adapter(path, store, layers, others, settings)


def adapter_family(adapter: Adapter) -> str | None:
    """The family of models that the adapter's own names and widths point to, or None if they do not tell."""
    return family_of((layer.name, layer.shape) for layer in adapter.layers)
