"""Bases: which weight of a checkpoint an adapter layer changes.

`FAMILIES` is the registry. A base is a single file, a sharded checkpoint, a diffusers folder, or a norm
table; of all of them only headers are read until a weight is asked for.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorashrink.bases import clip, stable_diffusion, unet
from lorashrink.bases.family import BaseFamily
from lorashrink.errors import InputError, NotABase
from lorashrink.files import TensorStore, content_fingerprint, join_stores, open_tensors, weights_file
from lorashrink.names import address

if TYPE_CHECKING:
    from torch import Tensor

FAMILIES: tuple[BaseFamily, ...] = stable_diffusion.FAMILIES

# Not part of what adapters change, though their names may look so.
_IGNORED = ("first_stage_model.", "vae.", "model_ema.")
_NO_WEIGHTS = ("bias", "position_ids")
_PART_FOLDERS = ("unet", "text_encoder", "text_encoder_2")


@dataclass(frozen=True, slots=True)
class View:
    """A weight of the base as adapters see it: a tensor, or a range of its rows, perhaps transposed."""

    key: str
    shape: tuple[int, ...]  # of the view, [out, in, ...]
    rows: tuple[int, int] | None = None
    transposed: bool = False

    def __str__(self) -> str:
        return self.key if self.rows is None else f"{self.key}[{self.rows[0]}:{self.rows[1]}]"


# Views in row order; several where the adapter's weight is fused and the base's is split.
Views = tuple[View, ...]


def views_shape(views: Views) -> tuple[int, ...]:
    """Shape of the stacked views."""
    return (sum(view.shape[0] for view in views), *views[0].shape[1:])


def views_id(views: Views) -> str:
    """A name for the stacked views, unique within their base."""
    return " + ".join(map(str, views))


@dataclass(frozen=True, eq=False)
class Base:
    """An open base. `norms` is filled only if the base is a norm table, and then no weight can be read."""

    path: Path
    kind: str  # "file", "shards", "folder" or "norms"
    family: BaseFamily
    weights: Mapping[tuple[str, str], Views]  # (part, flattened module name) -> views
    fingerprint: str
    store: TensorStore | None = field(default=None, repr=False)
    norms: Mapping[str, Mapping[str, float]] = field(default_factory=dict, repr=False)

    def find(self, layer_name: str) -> Views:
        """The weight that an adapter layer of this name changes; () if the base has none such."""
        return self.weights.get(address(layer_name), ())

    def weight(self, views: Views) -> Tensor:
        """The weight itself, float32 [out, in·kh·kw]. Raises NotABase for a norm table."""
        import torch

        if self.store is None:
            raise NotABase(f"{self.path}: a norm table holds no weights, which this recipe needs. Give the checkpoint.")
        parts = []
        for view in views:
            tensor = self.store.read(view.key, view.rows)
            parts.append((tensor.T if view.transposed else tensor).float().flatten(1))
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    @cached_property
    def all_views(self) -> tuple[Views, ...]:
        """Every weight once, in the order of the file."""
        return tuple({views_id(views): views for views in self.weights.values()}.values())

    def close(self) -> None:
        """Close the files."""
        if self.store is not None:
            self.store.close()

    def __enter__(self) -> Base:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def open_base(path: str | Path) -> Base:
    """Open a checkpoint, a diffusers folder, or a norm table; reads headers only.

    Raises InputError (unreadable) and NotABase (no family recognised).
    """
    path = Path(path)
    if path.suffix == ".json" and ".index." not in path.name:
        return _open_table(path)
    store, kind = _open_store(path)
    try:
        shapes = {name: info.shape for name, info in store.tensors.items() if not name.startswith(_IGNORED)}
        family = recognise(shapes)
        if family is None:
            known = ", ".join(family.title for family in FAMILIES)
            raise NotABase(f"{path}: no checkpoint of a known family ({known}) among its {len(shapes)} tensors.")
        return Base(path, kind, family, _weights(shapes, family), content_fingerprint(store), store)
    except BaseException:
        store.close()
        raise


def recognise(shapes: Mapping[str, tuple[int, ...]]) -> BaseFamily | None:
    """The family of a checkpoint, from its tensor names and shapes."""
    return next((family for family in FAMILIES if family.recognise(shapes)), None)


def _open_store(path: Path) -> tuple[TensorStore, str]:
    if not path.is_dir():
        if not path.is_file():
            raise InputError(f"{path}: no such file or folder.")
        return open_tensors(path), "shards" if path.suffix == ".json" else "file"
    parts = {f"{name}.": found for name in _PART_FOLDERS if (found := weights_file(path / name))}
    if parts:
        return join_stores(path, {prefix: open_tensors(found) for prefix, found in parts.items()}), "folder"
    if found := weights_file(path):
        return open_tensors(found), "folder"
    raise NotABase(f"{path}: no unet/ or text_encoder/ with safetensors weights in this folder, and no weights either.")


def _weights(shapes: Mapping[str, tuple[int, ...]], family: BaseFamily) -> dict[tuple[str, str], Views]:
    """All names of all weights. A name that the file itself uses is never taken by another weight's alias."""
    own: dict[tuple[str, str], Views] = {}
    aliases: dict[tuple[str, str], Views] = {}
    prefixes = sorted(family.containers, key=len, reverse=True)
    for key, shape in shapes.items():
        container = next((prefix for prefix in prefixes if key.startswith(prefix)), None)
        if container is None or key.endswith(_NO_WEIGHTS) or len(shape) < 2 or min(shape) == 0:
            continue
        module = key[len(container) :].removesuffix(".weight").removesuffix("_weight")
        part = family.containers[container]
        for name, views in _names(part, module, key, shape, shapes):
            table = own if name == module else aliases
            table.setdefault((part, name.replace(".", "_")), views)
    return aliases | own


def _names(
    part: str, module: str, key: str, shape: tuple[int, ...], shapes: Mapping[str, tuple[int, ...]]
) -> Iterator[tuple[str, Views]]:
    if part == "unet":
        for name in unet.aliases(module):
            yield name, (View(key, shape),)
        return
    # open_clip keeps its projection as a bare matrix that multiplies from the right
    transposed = module == "text_projection" and not key.endswith(".weight")
    whole = View(key, shape[::-1] if transposed else shape, transposed=transposed)
    for name in clip.aliases(module):
        yield name, (whole,)
    third = shape[0] // 3
    for number, name in clip.thirds(module):
        yield name, (View(key, (third, *shape[1:]), (number * third, (number + 1) * third)),)
    if whole_name := clip.fused(module):
        keys = [key.replace("q_proj", f"{letter}_proj") for letter in "qkv"]
        if all(other in shapes for other in keys):
            yield whole_name, tuple(View(other, shapes[other]) for other in keys)


# --- norm tables --------------------------------------------------------------------------------

TABLE_FORMAT = "lorashrink-norms"


def table_bytes(base: Base, norms: Mapping[str, Mapping[str, float]]) -> bytes:
    """A norm table: one JSON object that stands in for the base wherever norms are enough.

    `norms` maps each `views_id` to {"fro": ‖W‖_F, "spn": ‖W‖₂}.
    """
    weights: dict[str, dict[str, Any]] = {}
    for (part, name), views in base.weights.items():
        entry = weights.setdefault(
            views_id(views),
            {
                "views": [[view.key, view.shape, view.rows, view.transposed] for view in views],
                **norms[views_id(views)],
                "names": [],
            },
        )
        entry["names"].append(f"{part}:{name}")
    table = {
        "format": TABLE_FORMAT,
        "version": 1,
        "family": base.family.name,
        "base": base.path.name,
        "fingerprint": base.fingerprint,
        "weights": weights,
    }
    return (json.dumps(table, separators=(",", ":")) + "\n").encode()


def _open_table(path: Path) -> Base:
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
        if table["format"] != TABLE_FORMAT or table["version"] != 1:
            raise KeyError(TABLE_FORMAT)
        family = next(family for family in FAMILIES if family.name == table["family"])
        weights: dict[tuple[str, str], Views] = {}
        norms: dict[str, Mapping[str, float]] = {}
        for entry in table["weights"].values():
            views = tuple(
                View(key, tuple(shape), tuple(rows) if rows else None, transposed)
                for key, shape, rows, transposed in entry["views"]
            )
            norms[views_id(views)] = {name: float(entry[name]) for name in ("fro", "spn")}
            if not all(math.isfinite(value) and value >= 0 for value in norms[views_id(views)].values()):
                raise ValueError("a norm is not a finite number")
            for name in entry["names"]:
                part, _, module = name.partition(":")
                weights[part, module] = views
        return Base(path, "norms", family, weights, str(table["fingerprint"]), norms=norms)
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error}).") from error
    except (ValueError, KeyError, TypeError, AttributeError, StopIteration, RecursionError) as error:
        raise NotABase(
            f"{path}: not a norm table of this version ({error}). Make one with: lorashrink norms BASE -o {path.name}"
        ) from error
