"""Statistics of activations and sensitivities as files, for calibrated recipes."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from lorashrink.bases import FAMILIES, Base, View, Views, views_id
from lorashrink.engine.delta import Delta
from lorashrink.engine.gram import Grams
from lorashrink.errors import InputError
from lorashrink.files.disk import sha256_file
from lorashrink.files.reading import open_tensors
from lorashrink.files.store import TensorStore, tensor_info
from lorashrink.files.writing import SafetensorsWriter
from lorashrink.linking.matching import match
from lorashrink.linking.rows import RowMap, Rows, row_intervals

if TYPE_CHECKING:
    from lorashrink.adapters import Adapter

FORMAT = "lorashrink-statistics"

VERSION = 1

_HASH_DIGITS = 32  # of an adapter's hash, before the names of its layers

OfLayer = Callable[[Delta], Grams]


@dataclass(frozen=True, eq=False, slots=True)
class Side:
    """A covariance D + L·Lᵀ with D diagonal; of a convolution's inputs that of channels ⊗ that of taps."""

    diagonal: Tensor  # [n] float32, not negative
    low: Tensor  # [n, k] float32
    taps: Tensor | None = None  # [kh·kw, kh·kw] float32

    def rows(self, start: int, stop: int) -> Side:
        """The covariance of some of the variables."""
        return Side(self.diagonal[start:stop], self.low[start:stop], self.taps)

    def gram(self, factor: Tensor) -> Tensor:
        """[r, r] float64: factor · covariance · factorᵀ for a factor [r, n] or [r, n·kh·kw]."""
        wide = factor.double()
        if self.taps is None or len(self.taps) == 1:
            return self._gram(wide)
        values, vectors = torch.linalg.eigh(self.taps.double())
        root = vectors * values.clamp(min=0).sqrt()
        each = wide.reshape(len(wide), len(self.diagonal), len(root)) @ root  # [r, n, kh·kw]
        return sum((self._gram(part) for part in each.unbind(2)), torch.zeros(len(wide), len(wide), dtype=each.dtype))

    def _gram(self, wide: Tensor) -> Tensor:
        low = wide @ self.low.double()
        return (wide * self.diagonal.double()) @ wide.mT + low @ low.mT


class Sides(NamedTuple):
    """The statistics of one weight."""

    inputs: Side  # C
    outputs: Side  # G


# --- the two kinds of files ---------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Statistics:
    """An open statistics file. Use it as a context manager."""

    path: Path
    kind: str  # "adapters" or "base"
    store: TensorStore = field(repr=False)
    base: Base = field(repr=False)  # names and shapes of the model's weights
    fingerprint: str  # sha256 of the file

    def of_layers(self, adapter: Adapter) -> list[OfLayer | None]:
        """For each layer what makes the Gram matrices of its factors; None without statistics.

        Raises:
            InputError: the statistics are for other adapters.
            FamilyMismatch, ShapeError: they are for another base.
        """
        return self._of_base(adapter) if self.kind == "base" else self._of_adapter(adapter)

    def _of_adapter(self, adapter: Adapter) -> list[OfLayer | None]:
        prefix = adapter_key(adapter)
        names = {key for key in self.store.tensors if key.startswith(f"{prefix}/")}
        if not names:
            known = ", ".join(json.loads(self.store.metadata["adapters"]).values())
            raise InputError(
                f"{self.path}: holds statistics of {known}, not of {adapter.path} as it is now. Run calibrate with "
                "this adapter, or make a table of its base with calibrate --base-table."
            )
        keys = [f"{prefix}/{layer.name}" for layer in adapter.layers]
        return [partial(self._stored, key) if f"{key}.down" in names else None for key in keys]

    def _stored(self, key: str, delta: Delta) -> Grams:
        down, up = (self.store.read(f"{key}.{side}").double() for side in ("down", "up"))
        if down.shape != (delta.rank, delta.rank) or up.shape != down.shape:
            raise InputError(f"{self.path}: {key} is {list(down.shape)}, and the layer has rank {delta.rank}.")
        return Grams(down, up)

    def _of_base(self, adapter: Adapter) -> list[OfLayer | None]:
        found = [self._cover(views) if views else None for views in match(adapter, self.base)]
        return [partial(self._projected, pieces) if pieces else None for pieces in found]

    def _projected(self, pieces: Sequence[_Piece], delta: Delta) -> Grams:
        sides = [self.sides(piece.name) for piece in pieces]
        down = [each.inputs.gram(delta.down) for each in sides]
        up = [
            each.outputs.rows(*piece.stored).gram(delta.up[slice(*piece.rows)].mT)
            for piece, each in zip(pieces, sides, strict=True)
        ]
        return Grams(torch.stack(down).mean(0), torch.stack(up).sum(0))

    def sides(self, name: str) -> Sides:
        """The statistics of the weight that has this name in the table."""
        stored = self.store.tensors
        both = []
        for side in ("in", "out"):
            taps = self.store.read(f"{name}|{side}.taps").float() if f"{name}|{side}.taps" in stored else None
            diagonal, low = (self.store.read(f"{name}|{side}.{part}").float() for part in ("diagonal", "low"))
            both.append(Side(diagonal, low, taps))
        return Sides(*both)

    def _cover(self, views: Views) -> list[_Piece] | None:
        """The stored weights that together are these views, None if some rows have no statistics."""
        pieces = []
        for interval in row_intervals(views):
            parts = sorted(self._stored_rows.common([interval]))
            if sum(part.rows.size for part in parts) < interval.size:
                return None
            pieces += [_Piece(part.owner, part.own.in_layer, part.rows.in_layer) for part in parts]
        return pieces

    @cached_property
    def _stored_rows(self) -> RowMap[str]:
        """Rows of the base -> name of their statistics in the table."""
        names = RowMap[str]()
        for name, (start, stop) in json.loads(self.store.metadata["rows"]).items():
            names.add([Rows(name.partition("[")[0], start, stop, 0)], name)
        return names

    def close(self) -> None:
        """Close the file."""
        self.store.close()

    def __enter__(self) -> Statistics:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


class _Piece(NamedTuple):
    """Rows of a layer, and where their statistics are."""

    name: str
    stored: tuple[int, int]  # rows of what is stored
    rows: tuple[int, int]  # of the layer


def open_statistics(path: str | Path) -> Statistics:
    """Open what `calibrate` wrote. Raises InputError."""
    path = Path(path)
    store = open_tensors(path)
    entries = store.metadata
    try:
        if entries.get("format") != FORMAT:
            raise InputError(f"{path}: no calibration statistics; make some with: lorashrink calibrate")
        if entries["version"] != str(VERSION):
            raise InputError(f"{path}: has version {entries['version']}, this program reads {VERSION}.")
        base = base_of(path, json.loads(entries["base"]))
        return Statistics(path, entries["kind"], store, base, sha256_file(path))
    except (KeyError, ValueError, TypeError, AttributeError, StopIteration) as error:
        store.close()
        raise InputError(f"{path}: damaged statistics ({error!r}); run calibrate again.") from error
    except InputError:
        store.close()
        raise


def adapter_key(adapter: Adapter) -> str:
    """What an adapter's contents are called in a statistics file."""
    return sha256_file(adapter.store.files[0])[:_HASH_DIGITS]


def base_entry(base: Base) -> dict[str, Any]:
    """What a statistics file says of a base: enough to name its weights."""
    used = {view.key for views in base.all_views for view in views}
    shapes = {key: shape for key, shape in base.shapes.items() if key in used}
    return {
        "family": base.family.name,
        "name": base.path.name,
        "fingerprint": base.fingerprint,
        "tensors": shapes,
        "weights": [views_id(views) for views in base.all_views],
    }


def base_of(path: Path, entry: Mapping[str, Any]) -> Base:
    """The base that a statistics file speaks of, with names and shapes and without weights."""
    family = next(family for family in FAMILIES if family.name == entry["family"])
    shapes = {str(key): tuple(map(int, shape)) for key, shape in entry["tensors"].items()}
    named: dict[str, dict[str, float]] = {str(weight): {} for weight in entry["weights"]}
    return Base(path, "statistics", family, shapes, str(entry["fingerprint"]), norms=named)


# --- writing ------------------------------------------------------------------------------------


def write_adapters(
    path: Path, found: Mapping[str, Grams], names: Mapping[str, str], base: Base, settings: Mapping[str, Any]
) -> int:
    """Write Gram matrices, `adapter_key/layer` -> [r, r] each; `names` maps adapter keys to file names.

    Returns the bytes written. Raises OutputError.
    """
    tensors: dict[str, Tensor] = {}
    for key, grams in found.items():
        tensors |= {f"{key}.down": grams.down.float(), f"{key}.up": grams.up.float()}
    return _write(path, tensors, {"kind": "adapters", "adapters": json.dumps(dict(names))}, base, settings)


def write_table(path: Path, found: Mapping[View, Sides], base: Base, settings: Mapping[str, Any]) -> int:
    """Write a base's statistics, diagonals and columns in bfloat16. Returns the bytes written. Raises OutputError."""
    tensors = {key: tensor for view, sides in found.items() for key, tensor in _stored_sides(str(view), sides)}
    rows = {str(view): view.span for view in found}
    return _write(path, tensors, {"kind": "base", "rows": json.dumps(rows)}, base, settings)


def _stored_sides(name: str, sides: Sides) -> Iterator[tuple[str, Tensor]]:
    for label, side in (("in", sides.inputs), ("out", sides.outputs)):
        yield f"{name}|{label}.diagonal", side.diagonal.bfloat16()
        yield f"{name}|{label}.low", side.low.bfloat16()
        if side.taps is not None:
            yield f"{name}|{label}.taps", side.taps.float()


def _write(
    path: Path, tensors: Mapping[str, Tensor], entries: Mapping[str, str], base: Base, settings: Mapping[str, Any]
) -> int:
    kinds = {torch.float32: "F32", torch.bfloat16: "BF16"}
    infos = {key: tensor_info(kinds[tensor.dtype], tuple(tensor.shape)) for key, tensor in tensors.items()}
    metadata = {
        "format": FORMAT,
        "version": str(VERSION),
        "base": json.dumps(base_entry(base)),
        "settings": json.dumps(dict(settings), sort_keys=True),
        **entries,
    }
    with SafetensorsWriter(path, infos, metadata) as writer:
        for key, tensor in tensors.items():
            writer.write(key, tensor.contiguous())
        writer.commit()
    return path.stat().st_size
