"""From the vectors of kept dimensions to an index and a code: the counterpart of `files.packed`."""

from __future__ import annotations

import math
import zlib
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from lorashrink.errors import InputError
from lorashrink.files.packed import (
    CLASSES,
    ESCAPE_BITS,
    FREQUENCY_BITS,
    MOST,
    MOST_NUMBERS,
    MOST_SIDES,
    NUMBERS_PER_BYTE,
    SCALES,
    Form,
    Index,
    Section,
    coder,
    little_endian,
    low_bits,
    steps_of,
    table_model,
    uniform_model,
)

if TYPE_CHECKING:
    from torch import Tensor

    Whole = np.ndarray[Any, np.dtype[np.signedinteger[Any]]]
    Values = np.ndarray[Any, np.dtype[np.floating[Any]]]

_SECTION_NUMBERS = 1 << 20

# From here on float16 has only infinity.
_BEYOND_HALF = 65520.0

# Root mean square of a dimension's numbers down to which float16 keeps three digits of them.
_SMALL = 2.0**-12

# Sums of squares in float32 that are in this range have not lost what matters of their terms.
_SAFE = (1e-30, 1e30)

# Of a class's numbers at most this part is coded as escapes; each costs about two bytes more than in the table.
_ESCAPED = 2.0**-13


@dataclass(eq=False, slots=True)
class _Section:
    """The numbers of some layers, which are coded together."""

    layers: int = 0
    numbers: int = 0
    by_class: dict[int, list[Whole]] = field(default_factory=lambda: defaultdict(list))
    crc32: int = 0

    def encode(self, tables: Mapping[int, Sequence[int]]) -> Any:
        """The words of the code. What is decoded last is encoded first."""
        ans = coder().stack.AnsCoder()
        for class_ in sorted(self.by_class, reverse=True):
            high, low = _split(np.concatenate(self.by_class[class_]), class_)
            escape, *sides = tables[class_]
            last = len(sides) - 1  # the largest magnitude of the table
            if low is not None:
                ans.encode_reverse(low, uniform_model(low_bits(class_)))
            symbols = high + (last + 1)
            if escape:
                escaped = np.abs(high) > last
                if escaped.any():
                    ans.encode_reverse(high[escaped] + (1 << (ESCAPE_BITS - 1)), uniform_model(ESCAPE_BITS))
                symbols[escaped] = 0
            ans.encode_reverse(symbols, table_model(tuple(tables[class_])))
        words = ans.get_compressed()
        least = -(-self.numbers // (4 * NUMBERS_PER_BYTE))
        return np.pad(words, (max(0, least - len(words)), 0))  # in front, where the decoder does not get to


@dataclass(frozen=True, eq=False, slots=True)
class Rounded:
    """The factors of one layer in whole numbers."""

    name: str
    form: Form
    scales: Whole  # [k]
    classes: Sequence[Whole]  # [k] for each factor
    numbers: Sequence[Whole]  # [k, count] for each factor
    values: Sequence[Tensor]  # [k, count] float16 for each factor: what they unpack to
    error: float  # Σ over dimensions of ‖u vᵀ - u' v'ᵀ‖²
    coding: float = 0.0  # of this what the whole numbers change; 0 if float16 changes next to nothing
    narrowing: float = 0.0  # the same sum for float16 alone, 0 if next to nothing, infinity if its numbers end before


def rounded(name: str, form: Form, factors: Sequence[Tensor], classes: Whole) -> Rounded:
    """Round the two factors of a layer, [k, count] float32 each, with a class for each dimension of both, [k, 2].

    Where a class would need larger numbers than the format has, a coarser one is used.
    """
    exact = [factor.contiguous().numpy() for factor in factors]
    sizes = np.stack([np.sqrt(_dots(factor, factor) / factor.shape[1]) for factor in exact])
    common = np.sqrt(sizes[0] * sizes[1])  # of both sides, when they are balanced
    with np.errstate(divide="ignore", invalid="ignore"):  # numbers that are too large are noticed below
        quarters = np.round(4 * np.log2(common))  # of powers of 2
        balances = np.divide(common, sizes, out=np.zeros_like(sizes), where=sizes > 0)
    scales = np.clip(quarters, SCALES.start, SCALES.stop - 1).astype(np.int64)
    numbers, values, used, errors, fits = [], [], [], [], True
    for factor, balance, requested in zip(exact, balances, classes.T, strict=True):
        largest = balance * np.maximum(factor.max(1), -factor.min(1))
        fitting = _fitting(scales, requested, largest)
        steps = steps_of(scales, fitting)
        fits &= bool((np.maximum(largest, np.minimum(np.rint(largest / steps), MOST) * steps) < _BEYOND_HALF).all())
        # One buffer is worked on in place: large new ones cost more than the arithmetic.
        buffer = factor * (balance / steps).astype(np.float32)[:, None]
        np.rint(buffer, out=buffer)
        if (largest > MOST * steps).any():
            np.clip(buffer, -MOST, MOST, out=buffer)
        whole = buffer.astype(np.int16)
        np.add(buffer, 0.0, out=buffer)  # 0 for -0, as integers have it
        buffer *= steps.astype(np.float32)[:, None]
        half = torch.from_numpy(buffer).half()
        numbers.append(whole)
        values.append(half)
        used.append(fitting)
        if fits:
            errors.append(_error(factor, balance, half, buffer))
    if not fits:
        return Rounded(name, form, scales, used, numbers, values, error=math.inf, narrowing=math.inf)
    lengths = np.stack([factor.shape[1] * common**2 for factor in exact])
    layer = Rounded(name, form, scales, used, numbers, values, _product_error(lengths, errors))
    return layer if (common[common > 0] > _SMALL).all() else _with_narrowing(layer, exact, balances)


def _with_narrowing(layer: Rounded, factors: Sequence[Values], balances: Values) -> Rounded:
    """The same with what the whole numbers change, and what float16 alone does."""
    exact = [factor * balance[:, None] for factor, balance in zip(factors, balances, strict=True)]  # float64
    steps = [steps_of(layer.scales, classes) for classes in layer.classes]
    coded = [whole * step[:, None] for whole, step in zip(layer.numbers, steps, strict=True)]
    halves = [factor.astype(np.float16).astype(np.float64) for factor in exact]
    lengths = np.stack([_dots(factor, factor) for factor in exact])

    def error(stored: Sequence[Values]) -> float:
        changes = [new - factor for new, factor in zip(stored, exact, strict=True)]
        roundings = [(_dots(change, change), _dots(change, new)) for change, new in zip(changes, stored, strict=True)]
        return _product_error(lengths, roundings)

    return replace(layer, coding=error(coded), narrowing=error(halves))


def _dots(first: Values, second: Values) -> Values:
    """[k] float64: the dot products of the rows of two arrays, [k, count] float32 or float64."""
    dots: Values = np.einsum("ij,ij->i", first, second).astype(np.float64)
    outside = ~((np.abs(dots) > _SAFE[0]) & (np.abs(dots) < _SAFE[1]))
    if outside.any():
        wide = [rows[outside].astype(np.float64) for rows in (first, second)]
        dots[outside] = np.einsum("ij,ij->i", *wide)
    return dots


def _fitting(scales: Whole, classes: Whole, largest: Values) -> Whole:
    """[k] the finest class up to the requested one in which `largest`, [k], is no more than MOST steps."""
    fitting = classes.copy()
    while (wide := (fitting > CLASSES.start) & (largest > MOST * steps_of(scales, fitting))).any():
        fitting[wide] -= 1
    return fitting


def _error(factor: Values, balance: Values, half: Tensor, buffer: Values) -> tuple[Values, Values]:
    """([k] ‖δ‖², [k] δ·x') of the rounding δ = x' - x, x the balanced rows and x' the stored ones.

    The buffer is overwritten.
    """
    stored = half.float().numpy()
    np.multiply(factor, balance.astype(np.float32)[:, None], out=buffer)
    np.subtract(stored, buffer, out=buffer)
    return _dots(buffer, buffer), _dots(buffer, stored)


def _product_error(lengths: Values, rounding: Sequence[tuple[Values, Values]]) -> float:
    """‖u vᵀ - u' v'ᵀ‖² of all dimensions, from the differences, so that small errors are exact.

    lengths: [2, k] ‖u‖² and ‖v‖². rounding: of u and of v, as from `_error`.
    """
    (u, v), ((du, du_u), (dv, dv_v)) = lengths, rounding  # ‖δ‖² and δ·x' of each side
    squares = du * v + (u + 2 * du_u - du) * dv + 2 * du_u * (dv_v - dv)
    return max(0.0, float(squares.sum()))


class Encoder:
    """Layers one after the other, then their index and code."""

    def __init__(self) -> None:
        self._forms: dict[Form, int] = {}
        self._rows: list[tuple[str, int, int]] = []  # name, form, rank
        self._scales: list[int] = []
        self._classes: list[int] = []
        self._sections: list[_Section] = []

    def add(self, layer: Rounded) -> None:
        """Take a layer, whose name is that of no other. Raises InputError if it is too large for the format."""
        if sum(numbers.size for numbers in layer.numbers) > MOST_NUMBERS:
            raise InputError(f"{layer.name}: has too many numbers to be packed. Shrink the file first.")
        if not self._sections or self._sections[-1].numbers >= _SECTION_NUMBERS:
            self._sections.append(_Section())
        section = self._sections[-1]
        section.layers += 1
        self._rows.append((layer.name, self._forms.setdefault(layer.form, len(self._forms)), len(layer.scales)))
        self._scales += layer.scales.tolist()
        for classes, numbers, values in zip(layer.classes, layer.numbers, layer.values, strict=True):
            self._classes += classes.tolist()
            section.numbers += numbers.size
            section.crc32 = zlib.crc32(little_endian(values), section.crc32)
            for class_ in np.unique(classes).tolist():
                section.by_class[class_].append(numbers[classes == class_].ravel())

    def finish(self) -> tuple[Index, bytes]:
        """(index, code)."""
        # pooled over the file
        counts: dict[int, Whole] = defaultdict(lambda: np.zeros(2 * MOST + 1, dtype=np.int64))
        for section in self._sections:
            for class_, blocks in section.by_class.items():
                for block in blocks:
                    counts[class_] += _counts(block)
        tables = {class_: _frequencies(_magnitudes(of_class, class_)) for class_, of_class in counts.items()}
        codes = [section.encode(tables) for section in self._sections]
        index = Index(
            forms=tuple(self._forms),
            names=tuple(name for name, _, _ in self._rows),
            kinds=tuple(form for _, form, _ in self._rows),
            ranks=tuple(rank for _, _, rank in self._rows),
            scales=tuple(self._scales),
            classes=tuple(self._classes),
            tables={str(class_): table for class_, table in sorted(tables.items())},
            sections=tuple(
                Section(section.layers, len(words), section.crc32)
                for section, words in zip(self._sections, codes, strict=True)
            ),
        )
        return index, b"".join(words.astype("<u4", copy=False).tobytes() for words in codes)


def _split(numbers: Whole, class_: int) -> tuple[Whole, Whole | None]:
    """(what a table codes, the low bits or None), int32."""
    bits = low_bits(class_)
    wide = numbers.astype(np.int32)
    if not bits:
        return wide, None
    wide += 1 << (bits - 1)
    return wide >> bits, wide & ((1 << bits) - 1)


def _counts(numbers: Whole) -> Whole:
    """How often each number from -MOST to MOST occurs."""
    # torch counts 16-bit numbers as they are; numpy would make them 64 bits wide first.
    counts: Whole = torch.bincount(torch.from_numpy(numbers + MOST), minlength=2 * MOST + 1).numpy()
    return counts


def _magnitudes(counts: Whole, class_: int) -> Whole:
    """How often a table has to code each magnitude; counts are those of the numbers from -MOST to MOST."""
    high, _ = _split(np.arange(-MOST, MOST + 1), class_)
    magnitudes = np.zeros(MOST + 2, dtype=np.int64)
    np.add.at(magnitudes, np.abs(high), counts)
    return magnitudes


def _frequencies(counts: Any) -> tuple[int, ...]:
    """A table from how often each magnitude occurs: frequencies of an escape, of 0, and of each sign of 1, 2, ..."""
    total, full = int(counts.sum()), 1 << FREQUENCY_BITS
    tails = total - counts.cumsum()  # numbers beyond each magnitude
    last = min(int(np.argmax(tails <= _ESCAPED * total)), MOST_SIDES)
    escape = min(max(1, round(full * tails[last] / total)), full // 2) if tails[last] else 0
    sides = [max(1, round(full * int(count) / total / 2)) for count in counts[1 : last + 1]]
    zero = full - escape - 2 * sum(sides)
    while zero < 1:
        sides[sides.index(max(sides))] -= 1
        zero += 2
    return (escape, zero, *sides)
