"""A reader of packed files that follows docs/pack.md alone: whole numbers of Python, and nothing of lorashrink."""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

QUARTERS = (2048, 2435, 2896, 3444)


def read_file(path: Path) -> tuple[dict[str, Any], dict[str, str], bytes]:
    """(tensors of the header, metadata, data)."""
    raw = path.read_bytes()
    length = struct.unpack("<Q", raw[:8])[0]
    header = json.loads(raw[8 : 8 + length])
    metadata = header.pop("__metadata__", {})
    return header, metadata, raw[8 + length :]


def unpacked(path: Path) -> dict[str, tuple[str, list[int], bytes]]:
    """Name -> (dtype, shape, bytes) of every tensor."""
    header, metadata, data = read_file(path)
    assert json.loads(metadata["lorashrink.packed"])["version"] == 1
    parts = {name: data[slice(*entry["data_offsets"])] for name, entry in header.items()}
    index = json.loads(zlib.decompress(parts["lorashrink.packed.index"]))
    tensors = {
        name: (entry["dtype"], entry["shape"], parts[name])
        for name, entry in header.items()
        if not name.startswith("lorashrink.packed.")
    }
    code = parts["lorashrink.packed.code"]
    words = list(struct.unpack(f"<{len(code) // 4}I", code))
    layer, word = 0, 0
    for section in index["sections"]:
        layers = range(layer, layer + section["layers"])
        values = section_values(index, layers, words[word : word + section["words"]])
        assert zlib.crc32(b"".join(number for run in values for number in run)) == section["crc32"]
        remaining = iter(values)
        for number in layers:
            tensors |= layer_tensors(index, number, remaining)
        layer, word = layer + section["layers"], word + section["words"]
    return tensors


def layer_tensors(
    index: dict[str, Any], layer: int, runs: Iterator[list[bytes]]
) -> dict[str, tuple[str, list[int], bytes]]:
    name, form, rank = index["names"][layer], index["forms"][index["kinds"][layer]], index["ranks"][layer]
    tensors = {}
    for end, axis, rest in form["factors"]:
        rows = [next(runs) for _ in range(rank)]
        outer, inner = product(rest[:axis]), product(rest[axis:])
        ordered = [rows[k][o * inner + i] for o in range(outer) for k in range(rank) for i in range(inner)]
        tensors[name + end] = ("F16", [*rest[:axis], rank, *rest[axis:]], b"".join(ordered))
    for end, dtype, shape, text in form["constants"]:
        tensors[name + end] = (dtype, shape, bytes.fromhex(text))
    return tensors


def section_values(index: dict[str, Any], layers: range, words: list[int]) -> list[list[bytes]]:
    """The float16 numbers of each run, as bytes."""
    runs = []  # (class, scale, count)
    scale = sum(index["ranks"][: layers.start])
    class_ = sum(
        rank * len(index["forms"][kind]["factors"])
        for rank, kind in zip(index["ranks"][: layers.start], index["kinds"], strict=False)
    )
    for layer in layers:
        rank = index["ranks"][layer]
        for _, _, rest in index["forms"][index["kinds"][layer]]["factors"]:
            for dimension in range(rank):
                runs.append((index["classes"][class_], index["scales"][scale + dimension], product(rest)))
                class_ += 1
        scale += rank
    stack = Stack(words)
    values: list[list[bytes]] = [[] for _ in runs]
    for precision in sorted({run[0] for run in runs}):
        chosen = [number for number, run in enumerate(runs) if run[0] == precision]
        integers = iter(class_numbers(stack, precision, sum(runs[number][2] for number in chosen), index["tables"]))
        for number in chosen:
            step = step_of(runs[number][1], precision)
            values[number] = [float16(next(integers) * step) for _ in range(runs[number][2])]
    return values


def class_numbers(stack: Stack, class_: int, count: int, tables: dict[str, list[int]]) -> list[int]:
    escape, *sides = tables[str(class_)]
    frequencies = [escape, *reversed(sides[1:]), *sides]
    free, total, starts = 2**24 - len(frequencies), 0, []
    for number, frequency in enumerate(frequencies):
        starts.append(total * free // 4096 + number)
        total += frequency
    assert total == 4096
    starts.append(2**24)
    symbols = [stack.pop(starts) - len(sides) for _ in range(count)]
    numbers = [stack.pop_bits(13) - 4096 if symbol == -len(sides) else symbol for symbol in symbols]
    bits = max(0, (class_ - 6) // 2)
    return [number * 2**bits + stack.pop_bits(bits) - 2 ** (bits - 1) for number in numbers] if bits else numbers


class Stack:
    """The state of the decoder."""

    def __init__(self, words: list[int]) -> None:
        self.words, self.state = list(words), 0
        while self.state < 2**32 and self.words:
            self.state = self.state * 2**32 + self.words.pop()

    def pop(self, starts: list[int]) -> int:
        low = self.state % 2**24
        symbol = next(number for number in range(len(starts) - 1) if starts[number] <= low < starts[number + 1])
        self._take(low, starts[symbol], starts[symbol + 1] - starts[symbol])
        return symbol

    def pop_bits(self, bits: int) -> int:
        width = 2 ** (24 - bits)
        low = self.state % 2**24
        self._take(low, low // width * width, width)
        return low // width

    def _take(self, low: int, start: int, width: int) -> None:
        self.state = self.state // 2**24 * width + low - start
        if self.state < 2**32 and self.words:
            self.state = self.state * 2**32 + self.words.pop()


def step_of(scale: int, class_: int) -> Fraction:
    quarters = scale - 2 * class_
    return QUARTERS[quarters % 4] * Fraction(2) ** (quarters // 4 - 11)


def float16(value: Fraction) -> bytes:
    """The nearest float16, ties to even, by whole numbers."""
    size = abs(value)
    exponent = -24  # of the last bit: that of the smallest numbers at least
    while size >= 2**11 * Fraction(2) ** exponent:
        exponent += 1
    digits = round(size / Fraction(2) ** exponent)  # of a Fraction: ties to even
    if digits == 2**11:
        digits, exponent = 2**10, exponent + 1
    bits = digits if digits < 2**10 else ((exponent + 25) << 10) | (digits & (2**10 - 1))
    sign = 0x8000 if value < 0 else 0
    return struct.pack("<H", bits | sign)


def product(numbers: list[int]) -> int:
    total = 1
    for number in numbers:
        total *= number
    return total
