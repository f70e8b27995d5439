"""Files of statistics, which calibrated recipes read: how large inputs are, and how much outputs matter."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from lorashrink.bases import FAMILIES, Base, View, Views, views_id
from lorashrink.engine.delta import Delta
from lorashrink.engine.gram import Grams
from lorashrink.engine.rounding import Energy
from lorashrink.errors import InputError
from lorashrink.files.disk import sha256_file
from lorashrink.files.reading import open_tensors
from lorashrink.files.store import TensorStore
from lorashrink.files.writing import save_tensors
from lorashrink.linking.matching import match
from lorashrink.linking.rows import Common, RowMap, Rows, row_intervals

if TYPE_CHECKING:
    from lorashrink.adapters import Adapter

FORMAT = "lorashrink-statistics"
VERSION = 1
_HASH_DIGITS = 32  # of an adapter's hash, which stands before the names of its layers


class Noise(NamedTuple):
    """What errors without direction do in a layer: energy per squared length of rows of `down` and columns of `up`.

    `remaining` is the part of it that the choice of the best rounding leaves.
    """

    down: float
    up: float
    remaining: float = 1.0


@dataclass(frozen=True, eq=False, slots=True)
class Side:
    """A covariance D + L·Lᵀ with D diagonal; for a convolution's inputs (D + L·Lᵀ) ⊗ the covariance of its taps."""

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
        mixed = wide.reshape(len(wide), len(self.diagonal), len(root)) @ root  # [r, n, kh·kw]
        return sum((self._gram(tap) for tap in mixed.unbind(2)), torch.zeros(len(wide), len(wide), dtype=mixed.dtype))

    def energy(self, errors: Tensor) -> Tensor:
        """[k]: the diagonal of `gram` for errors [k, n] or [k, n·kh·kw] float32, in their precision."""
        if self.taps is None or len(self.taps) == 1:
            return self._energy(errors)
        values, vectors = torch.linalg.eigh(self.taps)
        mixed = errors.reshape(len(errors), len(self.diagonal), len(vectors)) @ (vectors * values.clamp(min=0).sqrt())
        return self._energy(mixed.mT.flatten(0, 1)).reshape(len(errors), -1).sum(1)

    def _energy(self, errors: Tensor) -> Tensor:
        return (errors * errors) @ self.diagonal + ((errors @ self.low) ** 2).sum(1)

    @property
    def trace(self) -> float:
        """The trace of the covariance: how much noise of variance 1 in all variables adds."""
        own = float(self.diagonal.double().sum()) + float(self.low.double().square().sum())
        return own if self.taps is None else own * float(self.taps.double().trace())

    @property
    def mean(self) -> float:
        """The mean of its diagonal."""
        return self.trace / (len(self.diagonal) * (1 if self.taps is None else len(self.taps)))

    def _gram(self, wide: Tensor) -> Tensor:
        low = wide @ self.low.double()
        return (wide * self.diagonal.double()) @ wide.mT + low @ low.mT


class Sides(NamedTuple):
    """The statistics of one weight."""

    inputs: Side  # C
    outputs: Side  # G


class _OfRows(NamedTuple):
    """The statistics of some rows of a layer."""

    inputs: Side
    outputs: Side
    rows: slice


# --- one layer ----------------------------------------------------------------------------------

# What the best of 16 roundings leaves of the error's energy, where the main directions of statistics decide.
_BEST_ROUNDING = 0.45


@dataclass(frozen=True, eq=False, slots=True)
class LayerStatistics:
    """The statistics of one layer: Gram matrices of its factors, or covariances of the weights that it changes."""

    stored: Callable[[Delta], Grams] | None = None
    weights: Callable[[], Sequence[_OfRows]] = tuple

    def grams(self, delta: Delta) -> Grams:
        """The Gram matrices of a layer's factors."""
        if self.stored:
            return self.stored(delta)
        return stacked_grams(
            [
                Grams(piece.inputs.gram(delta.down), piece.outputs.gram(delta.up[piece.rows].mT))
                for piece in self.weights()
            ]
        )

    def noise(self) -> Noise | None:
        """What rounding errors do in this layer, None where only Gram matrices are known."""
        if self.stored:
            return None
        pieces = self.weights()
        out = sum(len(piece.outputs.diagonal) for piece in pieces)
        return Noise(
            sum(piece.inputs.mean for piece in pieces) / len(pieces),
            sum(piece.outputs.mean * len(piece.outputs.diagonal) for piece in pieces) / out,
            _BEST_ROUNDING,
        )

    def energies(self) -> tuple[Energy, Energy] | None:
        """What errors do: of columns of `up`, given as rows [k, out], and of rows of `down` [k, in·kh·kw]."""
        if self.stored:
            return None
        pieces = self.weights()

        def of_up(errors: Tensor) -> Tensor:
            return torch.stack([piece.outputs.energy(errors[:, piece.rows]) for piece in pieces]).sum(0)

        def of_down(errors: Tensor) -> Tensor:
            return torch.stack([piece.inputs.energy(errors) for piece in pieces]).mean(0)

        return of_up, of_down


# --- the two kinds of files ---------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Statistics:
    """An open statistics file. Use it as a context manager."""

    path: Path
    kind: str  # "adapters" or "base"
    store: TensorStore = field(repr=False)
    base: Base = field(repr=False)  # has names and shapes of the model's weights, not the weights
    fingerprint: str  # sha256 of the file
    pixels: float | None = None  # of the pictures that were drawn, on average; None for texts, and in older files

    def of_layers(self, adapter: Adapter) -> list[LayerStatistics | None]:
        """The statistics of each layer; None for a layer that has none.

        Raises:
            InputError: the statistics are for other adapters.
            FamilyMismatch, ShapeError: they are for another base.
        """
        if self.kind == "base":
            return [self.of_views(views) if views else None for views in match(adapter, self.base)]
        prefix = adapter_key(adapter)
        stored = {key for key in self.store.tensors if key.startswith(f"{prefix}/")}
        if not stored:
            names = ", ".join(json.loads(self.store.metadata["adapters"]).values())
            raise InputError(
                f"{self.path}: holds statistics of {names}, not of {adapter.path} as it is now. Run calibrate with "
                "this adapter, or make a table of its base: lorashrink calibrate MODEL -o table.safetensors"
            )
        keys = [f"{prefix}/{layer.name}" for layer in adapter.layers]

        def read(key: str, delta: Delta) -> Grams:
            down, up = (self.store.read(f"{key}.{side}").double() for side in ("down", "up"))
            if down.shape != (delta.rank, delta.rank) or up.shape != down.shape:
                raise InputError(f"{self.path}: {key} is {list(down.shape)}, and the layer has rank {delta.rank}.")
            return Grams(down, up)

        return [LayerStatistics(partial(read, key)) if f"{key}.down" in stored else None for key in keys]

    def sides(self, name: str) -> Sides:
        """The statistics of the weight that has this name in the table."""

        def side(label: str) -> Side:
            diagonal, low = (self.store.read(f"{name}|{label}.{part}").float() for part in ("diagonal", "low"))
            taps = f"{name}|{label}.taps"
            return Side(diagonal, low, self.store.read(taps).float() if taps in self.store.tensors else None)

        return Sides(side("in"), side("out"))

    def of_views(self, views: Views) -> LayerStatistics | None:
        """The statistics of a layer that changes these views, None if some rows have no statistics."""
        parts: list[Common[str]] = []
        for interval in row_intervals(views):
            stored = sorted(self._stored_rows.common([interval]))
            if sum(part.rows.size for part in stored) < interval.size:
                return None
            parts += stored

        def read() -> list[_OfRows]:
            weights = [(part, self.sides(part.owner)) for part in parts]
            return [
                _OfRows(sides.inputs, sides.outputs.rows(*part.own.in_layer), slice(*part.rows.in_layer))
                for part, sides in weights
            ]

        return LayerStatistics(weights=read)

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


def stacked_grams(pieces: Sequence[Grams]) -> Grams:
    """The Gram matrices of a layer whose rows lie in several weights with the same inputs."""
    downs, ups = zip(*pieces, strict=True)
    return Grams(torch.stack(downs).mean(0), torch.stack(ups).sum(0))


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
        entry = json.loads(entries["base"])
        family = next(family for family in FAMILIES if family.name == entry["family"])
        shapes = {str(key): tuple(map(int, shape)) for key, shape in entry["tensors"].items()}
        no_norms: dict[str, dict[str, float]] = {str(weight): {} for weight in entry["weights"]}
        base = Base(path, "statistics", family, shapes, str(entry["fingerprint"]), norms=no_norms)
        pixels = json.loads(entries.get("settings", "{}")).get("pixels")
        return Statistics(path, entries["kind"], store, base, sha256_file(path), float(pixels) if pixels else None)
    except (KeyError, ValueError, TypeError, AttributeError, StopIteration, ArithmeticError, RecursionError) as error:
        store.close()
        raise InputError(f"{path}: damaged statistics ({error!r}); run calibrate again.") from error
    except InputError:
        store.close()
        raise


def adapter_key(adapter: Adapter) -> str:
    """The name of an adapter in a statistics file: a hash of its contents."""
    return sha256_file(adapter.store.files[0])[:_HASH_DIGITS]


# --- writing ------------------------------------------------------------------------------------


def write_adapters(
    path: Path, layers: Mapping[str, Grams], names: Mapping[str, str], base: Base, settings: Mapping[str, Any]
) -> int:
    """Write the Gram matrices of layers, `adapter_key/layer` -> [r, r] twice; `names` maps adapter keys to file names.

    Returns the bytes written. Raises OutputError.
    """
    tensors: dict[str, Tensor] = {}
    for key, grams in layers.items():
        tensors |= {f"{key}.down": grams.down.float(), f"{key}.up": grams.up.float()}
    return _write(path, tensors, {"kind": "adapters", "adapters": json.dumps(dict(names))}, base, settings)


def write_table(path: Path, statistics: Mapping[View, Sides], base: Base, settings: Mapping[str, Any]) -> int:
    """Write a base's statistics, diagonals and columns in bfloat16. Returns the bytes written. Raises OutputError."""
    tensors: dict[str, Tensor] = {}
    for view, sides in statistics.items():
        for label, side in (("in", sides.inputs), ("out", sides.outputs)):
            tensors[f"{view}|{label}.diagonal"] = side.diagonal.bfloat16()
            tensors[f"{view}|{label}.low"] = side.low.bfloat16()
            if side.taps is not None:
                tensors[f"{view}|{label}.taps"] = side.taps.float()
    rows = {str(view): view.span for view in statistics}
    return _write(path, tensors, {"kind": "base", "rows": json.dumps(rows)}, base, settings)


def _write(
    path: Path, tensors: Mapping[str, Tensor], entries: Mapping[str, str], base: Base, settings: Mapping[str, Any]
) -> int:
    used = {view.key for views in base.all_views for view in views}
    base_without_weights = {
        "family": base.family.name,
        "name": base.path.name,
        "fingerprint": base.fingerprint,
        "tensors": {key: shape for key, shape in base.shapes.items() if key in used},
        "weights": [views_id(views) for views in base.all_views],
    }
    metadata = {
        "format": FORMAT,
        "version": str(VERSION),
        "base": json.dumps(base_without_weights),
        "settings": json.dumps(dict(settings), sort_keys=True),
        **entries,
    }
    save_tensors(path, tensors, metadata)
    return path.stat().st_size
