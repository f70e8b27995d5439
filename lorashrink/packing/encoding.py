"""From the vectors of kept dimensions to an index and a code: the counterpart of `files.packed`."""

from __future__ import annotations

import math
import zlib
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
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
    step,
    table_model,
    uniform_model,
)

if TYPE_CHECKING:
    from torch import Tensor

    Whole = np.ndarray[Any, np.dtype[np.signedinteger[Any]]]

_SECTION_NUMBERS = 1 << 20

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
            table = tables[class_]
            sides = len(table) - 2
            if len(low):
                ans.encode_reverse(low, uniform_model(low_bits(class_)))
            escaped = np.abs(high) > sides
            if escaped.any():
                ans.encode_reverse(high[escaped] + (1 << (ESCAPE_BITS - 1)), uniform_model(ESCAPE_BITS))
            ans.encode_reverse(np.where(escaped, 0, high + sides + 1).astype(np.int32), table_model(table))
        words = ans.get_compressed()
        least = -(-self.numbers // (4 * NUMBERS_PER_BYTE))
        return np.pad(words, (max(0, least - len(words)), 0))  # in front, where the decoder does not get to


@dataclass(frozen=True, eq=False, slots=True)
class Rounded:
    """The factors of one layer in whole numbers."""

    name: str
    form: Form
    scales: Sequence[int]  # [k]
    classes: Sequence[Sequence[int]]  # [k] for each factor
    numbers: Sequence[Whole]  # [k, count] for each factor
    values: Sequence[Tensor]  # [k, count] float16 for each factor: what they unpack to
    error: float  # Σ over dimensions of ‖u vᵀ - u' v'ᵀ‖²
    coding: float  # of this what the whole numbers change
    narrowing: float  # the same sum for float16 alone; infinity if its numbers end before these


def rounded(name: str, form: Form, factors: Sequence[Tensor], classes: Sequence[Sequence[int]]) -> Rounded:
    """Round the two factors of a layer, [k, count] float32 each, with a class for each dimension of both.

    Where a class would need larger numbers than the format has, a coarser one is used.
    """
    sizes = [
        torch.linalg.vector_norm(factor, dim=1, dtype=torch.float64) / math.sqrt(factor.shape[1]) for factor in factors
    ]
    common = (sizes[0] * sizes[1]).sqrt()  # of both sides, when they are balanced
    quarters = [round(4 * math.log2(size)) if size > 0 else SCALES.start for size in common.tolist()]  # of powers of 2
    scales = [min(max(scale, SCALES.start), SCALES.stop - 1) for scale in quarters]
    balanced = [
        factor * torch.where(size > 0, common / size, 0).float()[:, None]
        for factor, size in zip(factors, sizes, strict=True)
    ]
    numbers, coded, used = [], [], []
    for factor, requested in zip(balanced, classes, strict=True):
        fitting = [
            next(
                (fine for fine in range(class_, CLASSES.start, -1) if largest <= MOST * step(scale, fine)),
                CLASSES.start,
            )
            for scale, class_, largest in zip(scales, requested, factor.abs().amax(1).tolist(), strict=True)
        ]
        steps = torch.tensor([step(*pair) for pair in zip(scales, fitting, strict=True)], dtype=torch.float32)
        integers = torch.round(factor / steps[:, None]).clamp_(-MOST, MOST).short()
        numbers.append(integers.numpy())
        coded.append(integers.float() * steps[:, None])  # from integers, which have no -0
        used.append(fitting)
    values, halves = [factor.half() for factor in coded], [factor.half() for factor in balanced]
    fits = all(bool(half.isfinite().all()) for half in (*values, *halves))
    return Rounded(
        *(name, form, scales, used, numbers, values),
        error=_product_error(balanced, values, common) if fits else math.inf,
        coding=_product_error(balanced, coded, common) if fits else 0.0,
        narrowing=_product_error(balanced, halves, common) if fits else math.inf,
    )


def _product_error(exact: Sequence[Tensor], stored: Sequence[Tensor], common: Tensor) -> float:
    """‖u vᵀ - u' v'ᵀ‖² of all dimensions, from the differences, so that small errors are exact.

    common [k] float64: the size of the numbers of each dimension, by which they are divided, so that squares fit.
    """
    unit = torch.where(common > 0, 1 / common, 0).clamp(max=1e38).float()[:, None]
    (u, v), (new_u, new_v) = ([factor.float() * unit for factor in factors] for factors in (exact, stored))
    du, dv = new_u - u, new_v - v

    def dots(first: Tensor, second: Tensor) -> Tensor:
        return (first * second).sum(1).double()

    squares = dots(du, du) * dots(v, v) + dots(new_u, new_u) * dots(dv, dv) + 2 * dots(du, new_u) * dots(v, dv)
    return max(0.0, float((squares * common**4).sum()))


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
        self._scales += layer.scales
        for classes, numbers, values in zip(layer.classes, layer.numbers, layer.values, strict=True):
            self._classes += classes
            section.numbers += numbers.size
            section.crc32 = zlib.crc32(little_endian(values), section.crc32)
            for class_, row in zip(classes, numbers, strict=True):
                section.by_class[class_].append(row)

    def finish(self) -> tuple[Index, bytes]:
        """(index, code)."""
        counts: dict[int, Any] = defaultdict(lambda: np.zeros(MOST + 2, dtype=np.int64))  # pooled over the file
        for section in self._sections:
            for class_, rows in section.by_class.items():
                high, _ = _split(np.concatenate(rows), class_)
                counts[class_] += np.bincount(np.abs(high), minlength=MOST + 2)
        tables = {class_: _frequencies(of_class) for class_, of_class in counts.items()}
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
        return index, b"".join(words.astype("<u4").tobytes() for words in codes)


def _split(numbers: Whole, class_: int) -> tuple[Whole, Whole]:
    """(what a table codes, the low bits)."""
    bits = low_bits(class_)
    wide = numbers.astype(np.int32)
    if not bits:
        return wide, np.empty(0, dtype=np.int32)
    shifted = wide + (1 << (bits - 1))
    return shifted >> bits, shifted & ((1 << bits) - 1)


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
