"""Bases: which weight of a checkpoint an adapter layer changes.

Read `family.py` first (the row), `stable_diffusion.py` and its like (the families), `families.py` (the registry);
`rules.py`, `views.py` and `weights.py` (every name of every weight); `containers.py`, `quantised.py` and `gguf_file.py`
(what lies on the disk); `norms.py` and `norm_table.py` (norms that are kept).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from lorashrink.bases import norm_table
from lorashrink.bases.containers import open_store
from lorashrink.bases.families import FAMILIES, family_named, recognise
from lorashrink.bases.family import BaseFamily
from lorashrink.bases.quantised import unpacked
from lorashrink.bases.views import BaseInfo, View, Views, views_id, views_shape
from lorashrink.bases.weights import Weights, name_weights, relevant
from lorashrink.errors import NotABase
from lorashrink.files.disk import content_fingerprint
from lorashrink.files.in_memory import MemoryStore
from lorashrink.files.store import FLOATS, TensorStore
from lorashrink.names import SECOND_DENOISER, address

if TYPE_CHECKING:
    from torch import Tensor

__all__ = [
    "FAMILIES",
    "Base",
    "BaseFamily",
    "View",
    "Views",
    "family_named",
    "joined",
    "open_base",
    "recognise",
    "table_bytes",
    "use_base",
    "views_id",
    "views_shape",
]


@dataclass(frozen=True, eq=False)
class Base:
    """An open base. `norms` are those of a norm table, which holds no weights, or of weights in memory."""

    path: Path
    kind: str  # "file", "shards", "folder", "memory" or "norms"
    family: BaseFamily
    shapes: Mapping[str, tuple[int, ...]] = field(repr=False)  # of the tensors that hold weights
    fingerprint: str
    store: TensorStore | None = field(default=None, repr=False)
    norms: dict[str, dict[str, float]] = field(default_factory=dict, repr=False)

    @property
    def info(self) -> BaseInfo:
        """What reports say of the base."""
        return BaseInfo(str(self.path), self.family.name, self.kind)

    @property
    def weights(self) -> Mapping[tuple[str, str], Views]:
        """(part, flattened module name) -> views, for every name of every weight."""
        return self._named.by_name

    def modules(self, layout: str) -> Mapping[tuple[str, str], Views]:
        """(part, module name) -> views, each weight once, under the names of one layout: "native" or "diffusers"."""
        return self._named.layouts[layout]

    def find(self, layer_name: str) -> Views:
        """The weight that an adapter layer of this name changes; () if the base has none such.

        A name without a part is enough if only one weight in all parts together has it; a second transformer of the
        same names is not meant.
        """
        part, module = address(layer_name)
        if part:
            parts = (part, self.family.instead.get(part, part))
            return next((views for part in parts if (views := self.weights.get((part, module)))), ())
        candidates = {
            views for part in self._parts if part != SECOND_DENOISER and (views := self.weights.get((part, module)))
        }
        return candidates.pop() if len(candidates) == 1 else ()

    def weight(self, views: Views) -> Tensor:
        """The weight itself, float32 [out, in·kh·kw]. Raises NotABase for a norm table."""
        return joined(self.parts(views))

    def parts(self, views: Views) -> list[Tensor]:
        """What the views show of their tensors, as stored, [rows, ...]. Raises NotABase for a norm table."""
        if self.store is None:
            raise NotABase(f"{self.path}: a norm table holds no weights, which this recipe needs. Give the checkpoint.")
        tensors = ((self.store.read(view.key, view.rows), view.transposed) for view in views)
        return [tensor.T if transposed else tensor for tensor, transposed in tensors]

    @cached_property
    def all_views(self) -> tuple[Views, ...]:
        """Every weight once, in the order of the file."""
        return tuple({views_id(views): views for views in self.weights.values()}.values())

    @cached_property
    def _named(self) -> Weights:
        named = name_weights(self.shapes, self.family)
        return named if self.store is not None else named.limited(self.norms)

    @cached_property
    def _parts(self) -> tuple[str, ...]:
        return tuple({part: None for part, _ in self.weights})

    def close(self) -> None:
        """Close the files."""
        if self.store is not None:
            self.store.close()

    def __enter__(self) -> Base:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def joined(parts: Sequence[Tensor]) -> Tensor:
    """Parts of a weight as one matrix, float32 [out, in·kh·kw]."""
    import torch

    matrices = [part.float().flatten(1) for part in parts]
    return matrices[0] if len(matrices) == 1 else torch.cat(matrices)


def open_base(source: str | Path | Mapping[str, Tensor]) -> Base:
    """Open a checkpoint, a folder of a model, or a norm table, of which headers only are read; or a mapping of tensors.

    Raises InputError (unreadable) and NotABase (no weights in it, or an adapter).
    """
    if isinstance(source, Mapping):
        path = Path("model in memory")
        return _base_of(path, unpacked(MemoryStore(str(path), source, {})), "memory")
    path = Path(source)
    if path.suffix == ".json" and ".index." not in path.name:
        table = norm_table.read(path)
        norms = {key: dict(values) for key, values in table.norms.items()}
        return Base(path, "norms", table.family, table.shapes, table.fingerprint, norms=norms)
    return _base_of(path, *open_store(path))


def _base_of(path: Path, store: TensorStore, kind: str) -> Base:
    try:
        shapes = relevant({name: info.shape for name, info in store.tensors.items() if info.dtype in FLOATS})
        family = recognise(shapes)
        if not store.tensors:
            raise NotABase(f"{path}: holds no tensors. Download or export it again.")
        if family is None:
            raise NotABase(
                f"{path}: no checkpoint of a known family among its {len(store.tensors)} tensors. "
                "If it is an adapter, name it behind its base."
            )
        return Base(path, kind, family, shapes, content_fingerprint(store), store)
    except BaseException:
        store.close()
        raise


@contextmanager
def use_base(source: str | Path | Mapping[str, Tensor] | Base) -> Iterator[Base]:
    """A base for one call: one that is open already stays open. Raises as `open_base`."""
    if isinstance(source, Base):
        yield source
    else:
        with open_base(source) as base:
            yield base


def table_bytes(base: Base, norms: norm_table.Norms) -> bytes:
    """A norm table of the base; `norms` maps each `views_id` to {"fro": ‖W‖_F, "spn": ‖W‖₂}."""
    used = {view.key for views in base.all_views for view in views}
    shapes = {key: shape for key, shape in base.shapes.items() if key in used}
    return norm_table.to_bytes(base.family, base.path.name, base.fingerprint, shapes, norms)
