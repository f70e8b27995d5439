"""How far one adapter is from another, in what they add to the base: per layer, per block, and over the whole.

Everything is taken of ΔW, never of factors, so that it does not matter how an adapter was factored, named or scaled.
Where both sides are factors, ΔW is not formed: with the factors of A and B side by side, U = [up_a, up_b] and
V = [down_a; down_b], all norms and products are sums over the blocks of UᵀU ∘ VVᵀ. Sums lose digits where A and B are
nearly the same; there R factors of U and Vᵀ replace the Gram matrices, and A − B is taken before it is squared.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from lorashrink._version import __version__
from lorashrink.adapters import Adapter, adapter_family, layer_name, open_adapter, peft
from lorashrink.bases import Base, open_base
from lorashrink.delta import AnyDelta, Delta, Dense, Kronecker, fan_in
from lorashrink.errors import UsageError
from lorashrink.inputs import find_adapters
from lorashrink.machine import pick_device, worker_pool
from lorashrink.matching import bind
from lorashrink.names import address, block, naming
from lorashrink.pairing import Piece, Unit, in_base, matched, stacked_up, units, wide
from lorashrink.results import BaseInfo
from lorashrink.spectrum import core_device, grams

Progress = Callable[[str, int, int], None]

# Sums of squares that cancel to less than this part of what was added have lost more than 9 of their 16 digits.
_CANCELLED = 2.0**-20
_BLOCK = 1 << 20  # numbers of a ΔW that is no product of factors, at a time
_A, _B = 0, 1


@dataclass(frozen=True, slots=True)
class Side:
    """One of the two adapters."""

    path: str
    bytes: int
    family: str | None
    algo: str
    naming: str
    dtype: str
    layers: int
    ranks: tuple[int, ...]  # lowest and highest; () without layers


@dataclass(frozen=True, slots=True)
class LayerDifference:
    """One weight of the base, and what both adapters add to it.

    Several layers of one side belong together where it splits what the other fuses. Numbers are None where they mean
    nothing (a quotient by zero) or cannot be had (NaN, or a layer that needs a base); then `flags` tells.
    """

    name: str
    names_a: tuple[str, ...]
    names_b: tuple[str, ...]
    block: str
    shape: tuple[int, ...]
    algo_a: str | None
    algo_b: str | None
    rank_a: int | None  # the highest, of several layers
    rank_b: int | None
    dtype_a: str | None
    dtype_b: str | None
    fro_a: float | None = None  # ‖A‖_F
    fro_b: float | None = None
    difference: float | None = None  # ‖A − B‖_F
    cosine: float | None = None  # <A, B> / (‖A‖·‖B‖)
    relative_difference: float | None = None  # ‖A − B‖ / ‖A‖
    energy_kept: float | None = None  # 1 − relative_difference²
    flags: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class BlockDifference:
    """Layers together, as if they were one long vector; `left_out` of them have no numbers, and do not count."""

    block: str
    layers: int
    left_out: int
    fro_a: float | None = None
    fro_b: float | None = None
    difference: float | None = None
    cosine: float | None = None
    relative_difference: float | None = None
    energy_kept: float | None = None


@dataclass(frozen=True, slots=True)
class OtherDifference:
    """A tensor outside of all ΔW that the other side has not, or has with other numbers."""

    a: str | None  # key
    b: str | None
    reason: str  # why it belongs to no ΔW
    relative_difference: float | None  # None where only one side has it, or it is zero, or the shapes differ


@dataclass(frozen=True, slots=True)
class MetadataDifference:
    """An entry of the header, or of PEFT's settings, that is not the same on both sides."""

    key: str
    a: str | None
    b: str | None


@dataclass(frozen=True, slots=True)
class Comparison:
    """B against A. Layers that only one side has count in blocks and total, with a zero on the other side."""

    version: str
    base: BaseInfo | None
    a: Side
    b: Side
    total: BlockDifference
    blocks: tuple[BlockDifference, ...]
    layers: tuple[LayerDifference, ...]
    only_a: tuple[LayerDifference, ...]
    only_b: tuple[LayerDifference, ...]
    others: tuple[OtherDifference, ...]
    others_equal: int  # tensors outside of all ΔW that are the same
    metadata: tuple[MetadataDifference, ...]


def compare(
    a: str | Path,
    b: str | Path,
    *,
    base: str | Path | None = None,
    device: str = "auto",
    jobs: int | None = None,
    progress: Progress | None = None,
) -> Comparison:
    """Compare what two adapters add to the base. The base, or its norm table, tells which layers belong together.

    Without one, equal names do, and names of two programs where one of them writes dots. Layers that multiply the base
    weight need the base itself. Raises InputError if a file cannot be used, FamilyMismatch or ShapeError if the
    adapters were made for different models, and UsageError if only a base could tell which layers are the same.
    """
    device = pick_device(device)
    with ExitStack() as stack:
        sides = [stack.enter_context(open_adapter(_only_one(each))) for each in (a, b)]
        opened = stack.enter_context(open_base(base)) if base is not None else None
        names, views = matched(sides, opened)
        bound = [bind(side, in_base(side, each), opened) for side, each in zip(sides, views, strict=True)]
        found = units(bound, views)
        pool = stack.enter_context(worker_pool(jobs))
        rows, sums = [], []
        for unit, each in zip(found, pool.map(partial(_sums, device=core_device(device)), found), strict=True):
            rows.append(_row(unit, each))
            sums.append(each)
            if progress:
                progress("comparing", len(rows), len(found))
        if sums and not any(sums):
            raise UsageError(
                f"{a} and {b}: {rows[0].algo_a or rows[0].algo_b} exists only together with the base weight. Give the "
                "checkpoint with --base; a norm table is not enough."
            )
        others, equal = _others(bound, names)
        return Comparison(
            version=__version__,
            base=opened.info if opened else None,
            a=_side(bound[_A]),
            b=_side(bound[_B]),
            total=_together("total", sums),
            blocks=_blocks(rows, sums),
            layers=tuple(row for row in rows if row.names_a and row.names_b),
            only_a=tuple(row for row in rows if not row.names_b),
            only_b=tuple(row for row in rows if not row.names_a),
            others=tuple(others),
            others_equal=equal,
            metadata=_metadata(*bound),
        )


def _only_one(path: str | Path) -> Path:
    found = find_adapters([path])
    if len(found) != 1:
        raise UsageError(f"{path}: stands for {len(found)} adapters, and two are compared, one by one. Name one file.")
    return found[0]


# --- numbers ------------------------------------------------------------------------------------


class _Sums(NamedTuple):
    """‖A‖², ‖B‖², <A, B> and ‖A − B‖² of one weight."""

    a: float
    b: float
    product: float
    difference: float

    @property
    def finite(self) -> bool:
        return all(map(math.isfinite, self))


def _sums(unit: Unit, device: torch.device) -> _Sums | None:
    """None if a layer needs a base weight that is not there."""
    if not all(layer.bound for _, layer in unit.members):
        return None
    deltas = [layer.delta for _, layer in unit.members]
    sides = [side for side, _ in unit.members]
    pair = sides == [_A, _B] and len(unit.pieces) == 1
    if pair and _equal(*deltas):
        alone = _sums_of(deltas[:1], [_A], [Piece(unit.rows, (0,))], device).a
        return _Sums(alone, alone, alone, 0.0)
    one, other = deltas[0], deltas[-1]
    if pair and isinstance(one, Kronecker) and isinstance(other, Kronecker):
        factors = [_matrix(part, device) for part in (one.first, one.second, other.first, other.second)]
        if factors[0].shape == factors[2].shape and factors[1].shape == factors[3].shape:
            return _of_kronecker(*factors)
    return _sums_of(deltas, sides, unit.pieces, device)


def _sums_of(deltas: Sequence[AnyDelta], sides: Sequence[int], pieces: Sequence[Piece], device: torch.device) -> _Sums:
    factored = [delta for delta in deltas if isinstance(delta, Delta)]
    small = min(sum(piece.size for piece in pieces), fan_in(deltas[0].shape))
    if len(factored) == len(deltas) and sum(delta.rank for delta in factored) <= small:
        return _of_factors(factored, sides, pieces, device)
    return _of_rows(deltas, sides, pieces, device)


def _equal(one: AnyDelta, other: AnyDelta) -> bool:
    """Whether both are made of the same numbers."""
    if isinstance(one, Delta) and isinstance(other, Delta):
        return one.scale == other.scale and _same(one.up, other.up) and _same(one.down, other.down)
    if isinstance(one, Dense) and isinstance(other, Dense):
        return one.scale == other.scale and _same(one.matrix, other.matrix)
    if isinstance(one, Kronecker) and isinstance(other, Kronecker):
        return _equal(one.first, other.first) and _equal(one.second, other.second)
    return False


def _same(one: Tensor, other: Tensor) -> bool:
    """Bit by bit, which is several times as fast as torch.equal for half precision."""
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    bits = [each.contiguous().flatten().view(torch.uint8).numpy() for each in (one, other)]
    return bool((bits[0] == bits[1]).all())


def _of_factors(deltas: Sequence[Delta], sides: Sequence[int], pieces: Sequence[Piece], device: torch.device) -> _Sums:
    up, down = stacked_up(deltas, pieces), torch.cat([wide(delta.down) for delta in deltas])
    ranks = torch.tensor([delta.rank for delta in deltas])
    # B with a minus, so that the sum over everything is ‖A − B‖²
    signed = [delta.scale if side == _A else -delta.scale for delta, side in zip(deltas, sides, strict=True)]
    scales = torch.tensor(signed, dtype=torch.float64).repeat_interleave(ranks).to(device)
    of_a = torch.tensor([side == _A for side in sides]).repeat_interleave(ranks).to(device)
    both = grams([Delta(up, down, 1.0, (up.shape[0], down.shape[1]))], device)
    terms = both.up[0] * both.down[0] * scales[:, None] * scales
    blocks = terms[of_a][:, of_a], terms[~of_a][:, ~of_a], terms
    product = -float(terms[of_a][:, ~of_a].sum())
    a, b, difference = (float(each.sum()) for each in blocks)
    if math.isfinite(difference) and any(each.sum() < _CANCELLED * each.abs().sum() for each in blocks):
        left, right = (torch.linalg.qr(factor.to(device, torch.float64), mode="r").R for factor in (up, down.mT))
        left = left * scales
        whole_a, whole_b = left[:, of_a] @ right[:, of_a].mT, left[:, ~of_a] @ right[:, ~of_a].mT
        a, b, difference = (float(each.square().sum()) for each in (whole_a, whole_b, left @ right.mT))
        product = -float((whole_a * whole_b).sum())
    return _Sums(a, b, product, difference)


def _of_kronecker(first_a: Tensor, second_a: Tensor, first_b: Tensor, second_b: Tensor) -> _Sums:
    """Of A = first_a ⊗ second_a and B, whose factors have the same shapes.

    With B = (c·first_b) ⊗ (second_b / c) so that first_a − c·first_b is orthogonal to first_b, A − B is the sum of
    (first_a − c·first_b) ⊗ second_a and c·first_b ⊗ (second_a − second_b / c), which are orthogonal, too.
    """
    a, b = _square(first_a) * _square(second_a), _square(first_b) * _square(second_b)
    overlap = float((first_a * first_b).sum())
    product = overlap * float((second_a * second_b).sum())
    if not overlap:
        return _Sums(a, b, product, a + b)
    share = overlap / _square(first_b)
    near = share * first_b
    difference = _square(first_a - near) * _square(second_a) + _square(near) * _square(second_a - second_b / share)
    return _Sums(a, b, product, difference)


def _square(matrix: Tensor) -> float:
    return float(matrix.square().sum())


def _of_rows(deltas: Sequence[AnyDelta], sides: Sequence[int], pieces: Sequence[Piece], device: torch.device) -> _Sums:
    """From ΔW itself, some rows at a time."""
    readers = [_reader(delta, device) for delta in deltas]
    width = fan_in(deltas[0].shape)
    step = max(1, _BLOCK // width)
    total = torch.zeros(4, dtype=torch.float64, device=device)
    for size, starts in pieces:
        for low in range(0, size, step):
            high = min(low + step, size)
            rows = torch.zeros(2, high - low, width, dtype=torch.float64, device=device)
            for read, side, start in zip(readers, sides, starts, strict=True):
                if start is not None:
                    rows[side] += read(start + low, start + high)
            a, b = rows.flatten(1)
            apart = a - b
            total += torch.stack([a @ a, b @ b, a @ b, apart @ apart])
    return _Sums(*total.tolist())


def _reader(delta: AnyDelta, device: torch.device) -> Callable[[int, int], Tensor]:
    """A function that gives rows of ΔW, float64."""
    if isinstance(delta, Delta):
        up, down = delta.up.to(device).double() * delta.scale, delta.down.to(device).double()
        return lambda low, high: up[low:high] @ down
    if isinstance(delta, Dense):
        matrix, scale = delta.matrix, delta.scale
        return lambda low, high: matrix[low:high].to(device).double() * scale
    first, second = _matrix(delta.first, device), _matrix(delta.second, device)

    def read(low: int, high: int) -> Tensor:
        rows = torch.arange(low, high, device=device)
        left, right = first[rows // len(second)], second[rows % len(second)]
        return (left[:, :, None] * right[:, None, :]).flatten(1)

    return read


def _matrix(delta: Delta | Dense, device: torch.device) -> Tensor:
    """All of ΔW, float64; for the small factors of a Kronecker product."""
    rows = (delta.up if isinstance(delta, Delta) else delta.matrix).shape[0]
    return _reader(delta, device)(0, rows)


def _numbers(sums: _Sums) -> dict[str, float | None]:
    a, b, difference = (math.sqrt(max(0.0, each)) for each in (sums.a, sums.b, sums.difference))
    relative = difference / a if a else None
    cosine = max(-1.0, min(1.0, sums.product / a / b)) if a and b else None
    return {
        "fro_a": a,
        "fro_b": b,
        "difference": difference,
        "cosine": 1.0 if cosine is not None and difference == 0 else cosine,
        "relative_difference": relative,
        "energy_kept": None if relative is None else 1 - relative**2,
    }


# --- tables -------------------------------------------------------------------------------------


def _row(unit: Unit, sums: _Sums | None) -> LayerDifference:
    a, b = unit.of(_A), unit.of(_B)
    fewest = min((each for each in (a, b) if each), key=len)
    return LayerDifference(
        name=fewest[0].name,
        names_a=tuple(layer.name for layer in a),
        names_b=tuple(layer.name for layer in b),
        block=block((a or b)[0].name),
        shape=(unit.rows, *fewest[0].shape[1:]),
        algo_a=_joined(layer.algo for layer in a),
        algo_b=_joined(layer.algo for layer in b),
        rank_a=max((layer.rank for layer in a), default=None),
        rank_b=max((layer.rank for layer in b), default=None),
        dtype_a=_joined(layer.dtype for layer in a),
        dtype_b=_joined(layer.dtype for layer in b),
        flags=_flags(sums, bool(a), bool(b)),
        **(_numbers(sums) if sums and sums.finite else {}),
    )


def _joined(words: Iterable[str]) -> str | None:
    return "+".join(sorted(set(words))) or None


def _flags(sums: _Sums | None, in_a: bool, in_b: bool) -> tuple[str, ...]:
    if sums is None:
        return ("needs_base",)
    tests = {
        "nan_a": not math.isfinite(sums.a),
        "nan_b": not math.isfinite(sums.b),
        "zero_a": in_a and sums.a == 0,
        "zero_b": in_b and sums.b == 0,
    }
    return tuple(flag for flag, present in tests.items() if present)


def _together(name: str, sums: Sequence[_Sums | None]) -> BlockDifference:
    known = [each for each in sums if each and each.finite]
    if sums and not known:
        return BlockDifference(name, len(sums), len(sums))
    whole = _Sums(*(math.fsum(each[place] for each in known) for place in range(4)))
    return BlockDifference(name, len(sums), len(sums) - len(known), **_numbers(whole))


def _blocks(rows: Sequence[LayerDifference], sums: Sequence[_Sums | None]) -> tuple[BlockDifference, ...]:
    members: dict[str, list[_Sums | None]] = {}
    for row, each in zip(rows, sums, strict=True):
        members.setdefault(row.block, []).append(each)
    return tuple(_together(name, each) for name, each in sorted(members.items()))


def _side(adapter: Adapter) -> Side:
    ranks = [layer.rank for layer in adapter]
    return Side(
        path=str(adapter.path),
        bytes=sum(path.stat().st_size for path in adapter.store.files),
        family=adapter_family(adapter),
        algo=_joined(layer.algo for layer in adapter) or "none",
        naming=naming([layer.name for layer in adapter]),
        dtype=_joined(layer.dtype for layer in adapter) or "none",
        layers=len(adapter),
        ranks=(min(ranks), max(ranks)) if ranks else (),
    )


# --- what is not ΔW -----------------------------------------------------------------------------


@dataclass(frozen=True, eq=False, slots=True)
class _Other:
    key: str
    reason: str
    scale: float = 1.0


# Parts of a layer that are no part of its ΔW.
_BESIDE = {"magnitude": "DoRA's magnitude", "bias": "a bias beside the factors"}


def _others(sides: Sequence[Adapter], names: Base | None) -> tuple[list[OtherDifference], int]:
    """(tensors outside of all ΔW that differ, how many do not)."""
    one, other = (_beside(side, names) for side in sides)
    found, equal = [], 0
    for place in {**one, **other}:
        a, b = one.get(place), other.get(place)
        if a and b:
            differs, relative = _apart(*(_numbers_of(*each) for each in zip(sides, (a, b), strict=True)))
            if not differs:
                equal += 1
                continue
        else:
            relative = None
        reason = (a or b).reason  # type: ignore[union-attr]  # one of them is there
        found.append(OtherDifference(a.key if a else None, b.key if b else None, reason, relative))
    return found, equal


def _beside(side: Adapter, names: Base | None) -> dict[tuple[object, str], _Other]:
    """(what it belongs to, what it is) -> tensor."""
    found: dict[tuple[object, str], _Other] = {}
    for layer in side:
        for role, reason in _BESIDE.items():
            if role in layer.keys:
                # PEFT multiplies a bias as it multiplies the factors
                scale = layer.scale if role == "bias" else 1.0
                found[_owner(layer.name, names), role] = _Other(layer.keys[role], reason, scale)
    for key, reason in side.others.items():
        name = layer_name(key)
        ending = key[len(name) :]
        found[_owner(name, names), "bias" if ending == ".diff_b" else ending] = _Other(key, reason)
    return found


def _owner(name: str, names: Base | None) -> object:
    return (names.find(name) if names else ()) or address(name)


def _numbers_of(side: Adapter, other: _Other) -> Tensor:
    tensor = side.store.read(other.key)
    return tensor.to(torch.complex128 if tensor.is_complex() else torch.float64) * other.scale


def _apart(a: Tensor, b: Tensor) -> tuple[bool, float | None]:
    """(whether they differ, ‖a − b‖ / ‖a‖)."""
    if a.numel() != b.numel():
        return True, None
    size, difference = float(a.norm()), float((a.flatten() - b.flatten()).norm())
    return difference != 0, difference / size if size and math.isfinite(difference / size) else None


def _metadata(a: Adapter, b: Adapter) -> tuple[MetadataDifference, ...]:
    one, other = _entries(a), _entries(b)
    return tuple(
        MetadataDifference(key, one.get(key), other.get(key))
        for key in sorted(one.keys() | other.keys())
        if one.get(key) != other.get(key)
    )


def _entries(adapter: Adapter) -> dict[str, str]:
    settings: Mapping[str, object] = adapter.settings.get("", {}) if adapter.as_folder else {}
    texts = {f"{peft.CONFIG_FILE}: {key}": json.dumps(value, sort_keys=True) for key, value in settings.items()}
    return {**adapter.store.metadata, **texts}
