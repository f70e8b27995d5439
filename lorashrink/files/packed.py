"""The packed form of an adapter, and how it is unpacked. `docs/pack.md` describes it for other programs.

A packed file is a safetensors file with two tensors of its own, an index and a code. The code holds the factors of the
layers as whole numbers, entropy-coded; all other tensors of the adapter lie beside it as they are. Unpacking is integer
arithmetic, one exact product in float32 and one rounding to float16, so that it gives the same bits everywhere.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import threading
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from functools import lru_cache, partial
from typing import TYPE_CHECKING, Any, NamedTuple

from lorashrink.errors import DamagedFile, InputError, UsageError
from lorashrink.files.header import Arrangement
from lorashrink.files.metadata_keys import PACKED
from lorashrink.files.store import DTYPES, MAX_TEXT_BYTES, ComputedStore, TensorInfo, TensorStore, tensor_info

if TYPE_CHECKING:
    from types import ModuleType

    import numpy as np
    from torch import Tensor

    Whole = np.ndarray[Any, np.dtype[np.signedinteger[Any]]]
    Steps = np.ndarray[Any, np.dtype[np.float64]]

VERSION = 1

PREFIX = "lorashrink.packed."
INDEX, CODE = f"{PREFIX}index", f"{PREFIX}code"

# Classes of precision: a dimension of class j has steps of 2^(-j/2) of its scale.
CLASSES = range(-2, 17)

# Scales and steps are quarters of a power of two: 2^(i/4) in 12 bits.
_QUARTERS = (2048, 2435, 2896, 3444)
_QUARTER_BITS = 11

MOST = 4095  # the largest whole number: with 12 bits of the step it fits into the 24 bits of float32
SCALES = range(-200, 121)  # in quarters: from far below the smallest float16 to above the largest

FREQUENCY_BITS = 12
MOST_SIDES = 127  # magnitudes in a table
ESCAPE_BITS = 13

# A file cannot claim more than it can hold: a writer fills up a code of less than half a bit per number.
NUMBERS_PER_BYTE = 16
_NUMBERS_SLACK = 1 << 12
MOST_NUMBERS = 1 << 27  # of a section, which are decoded at once
_INDEX_RATIO, _INDEX_SLACK = 100, 1 << 20
_MOST_CONSTANT = 256  # bytes of a tensor in the index


def low_bits(class_: int) -> int:
    """How many bits of a class's numbers are coded without a table: the others are at most some dozens."""
    return max(0, (class_ - 6) // 2)


def steps_of(scales: Whole, classes: Whole) -> Steps:
    """The distances between neighbouring values, float64 of 12 bits, for scales and classes of equal shape."""
    import numpy as np

    quarters = scales - 2 * classes
    steps: Steps = np.ldexp(np.array(_QUARTERS, dtype=np.float64)[quarters % 4], quarters // 4 - _QUARTER_BITS)
    return steps


@dataclass(frozen=True, slots=True)
class Form:
    """The tensors of layers of one kind and size, without their rank."""

    factors: tuple[tuple[str, int, tuple[int, ...]], ...]  # (end of the name, axis of the rank, the other axes)
    constants: tuple[tuple[str, str, tuple[int, ...], str], ...]  # (end of the name, dtype, shape, bytes as hex)

    @property
    def counts(self) -> tuple[int, ...]:
        """Numbers of a dimension in each factor."""
        return tuple(math.prod(rest) for _, _, rest in self.factors)


@dataclass(frozen=True, slots=True)
class Section:
    """Neighbouring layers that are decoded together."""

    layers: int
    words: int  # of 32 bits
    crc32: int  # of the decoded float16 numbers


@dataclass(frozen=True, slots=True)
class Index:
    """What the code holds, in the order of the layers."""

    forms: tuple[Form, ...]
    names: tuple[str, ...]  # per layer
    kinds: tuple[int, ...]  # per layer the number of its form
    ranks: tuple[int, ...]
    scales: tuple[int, ...]  # per layer and dimension
    classes: tuple[int, ...]  # per layer, factor and dimension
    tables: Mapping[str, tuple[int, ...]]  # class -> frequencies of an escape, and of the magnitudes from 0 on
    sections: tuple[Section, ...]

    def to_bytes(self) -> bytes:
        """The index as it is stored."""
        entries = {field.name: getattr(self, field.name) for field in fields(self)}
        return zlib.compress(json.dumps(entries, separators=(",", ":"), default=asdict).encode(), 9)

    @classmethod
    def from_bytes(cls, data: bytes) -> Index:
        """Raises ValueError, KeyError, TypeError or zlib.error for what is no index."""
        inflater = zlib.decompressobj()
        text = inflater.decompress(data, min(_INDEX_RATIO * len(data) + _INDEX_SLACK, MAX_TEXT_BYTES))
        if not inflater.eof:
            raise ValueError("it is cut short, or far larger than an index")
        entries = json.loads(text)
        forms = tuple(
            Form(
                tuple((str(end), _whole(axis), _shape(rest)) for end, axis, rest in form["factors"]),
                tuple(
                    (str(end), str(dtype), _shape(shape), str(text)) for end, dtype, shape, text in form["constants"]
                ),
            )
            for form in entries["forms"]
        )
        index = cls(
            forms=forms,
            names=tuple(map(str, entries["names"])),
            kinds=_shape(entries["kinds"]),
            ranks=_shape(entries["ranks"]),
            scales=tuple(map(_whole, entries["scales"])),
            classes=tuple(map(_whole, entries["classes"])),
            tables={str(key): _shape(table) for key, table in entries["tables"].items()},
            sections=tuple(
                Section(*(_whole(part[key]) for key in ("layers", "words", "crc32"))) for part in entries["sections"]
            ),
        )
        index.check()
        return index

    def form(self, layer: int) -> Form:
        """The form of a layer."""
        return self.forms[self.kinds[layer]]

    @property
    def numbers(self) -> int:
        """How many numbers are coded."""
        return self._count(range(len(self.ranks)))

    def _count(self, layers: range) -> int:
        return sum(self.ranks[layer] * sum(self.form(layer).counts) for layer in layers)

    def infos(self) -> Iterator[tuple[str, TensorInfo]]:
        """Names of the tensors of all layers, and what the header of the unpacked file says of them."""
        for layer, (name, rank) in enumerate(zip(self.names, self.ranks, strict=True)):
            form = self.form(layer)
            for end, axis, rest in form.factors:
                yield name + end, tensor_info("F16", (*rest[:axis], rank, *rest[axis:]))
            for end, dtype, shape, _ in form.constants:
                yield name + end, tensor_info(dtype, shape)

    def check(self) -> None:
        """Raises ValueError for what contradicts itself."""
        for form in self.forms:
            if not form.factors or any(not 0 <= axis <= len(rest) or 0 in rest for _, axis, rest in form.factors):
                raise ValueError("a factor has no such shape")
            for _, dtype, shape, text in form.constants:
                size = math.prod(shape) * DTYPES[dtype][0]
                if size > _MOST_CONSTANT or len(bytes.fromhex(text)) != size:
                    raise ValueError("a constant does not fill its shape")
        if not len(self.names) == len(self.kinds) == len(self.ranks):
            raise ValueError("lists of layers differ in length")
        if any(kind >= len(self.forms) for kind in self.kinds) or 0 in self.ranks:
            raise ValueError("a layer has no form, or no rank")
        dimensions = sum(self.ranks)
        runs = sum(rank * len(self.form(layer).factors) for layer, rank in enumerate(self.ranks))
        if len(self.scales) != dimensions or len(self.classes) != runs:
            raise ValueError("lists of dimensions do not fit the ranks")
        if not all(scale in SCALES for scale in self.scales):
            raise ValueError("a scale is out of range")
        for class_ in set(self.classes):
            if class_ not in CLASSES:
                raise ValueError("a class is out of range")
            escape, *sides = self.tables[str(class_)]
            if not 1 <= len(sides) <= MOST_SIDES + 1 or escape + 2 * sum(sides) - sides[0] != 1 << FREQUENCY_BITS:
                raise ValueError("the frequencies of a table do not add up")
        if sum(section.layers for section in self.sections) != len(self.names):
            raise ValueError("sections do not fit the layers")
        first = 0
        for section in self.sections:
            if self._count(range(first, first + section.layers)) > MOST_NUMBERS:
                raise ValueError("a section has too many numbers")
            first += section.layers


def _whole(value: object) -> int:
    if type(value) is not int:
        raise TypeError("a whole number was expected")
    return value


def _shape(values: Sequence[object]) -> tuple[int, ...]:
    """Whole numbers that are not negative, and no larger than any file."""
    numbers = tuple(map(_whole, values))
    if not all(0 <= number < 1 << 40 for number in numbers):
        raise ValueError("a size is out of range")
    return numbers


# --- reading ------------------------------------------------------------------------------------


def is_packed(store: TensorStore) -> bool:
    """Whether these are the tensors of a packed file."""
    return INDEX in store.tensors or PACKED in store.metadata


def open_packed(stored: TensorStore) -> PackedStore:
    """What an open packed file unpacks to. Raises DamagedFile, or InputError for a newer version of the format."""
    try:
        entry: dict[str, Any] = json.loads(stored.metadata[PACKED])
        version = _whole(entry["version"])
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise DamagedFile(
            f"{stored.path}: a packed file without its metadata, which some program has removed. Take the original."
        ) from error
    if version > VERSION:
        raise InputError(
            f"{stored.path}: is packed in version {version} of the format, this program reads {VERSION}. "
            "Update lorashrink."
        )
    try:
        index = Index.from_bytes(b"".join(map(bytes, stored.chunks(INDEX))))
        nbytes = stored.tensors[CODE].nbytes
        if index.numbers > NUMBERS_PER_BYTE * nbytes + _NUMBERS_SLACK:
            raise ValueError(f"it claims {index.numbers} numbers in {nbytes} bytes")
        if 4 * sum(section.words for section in index.sections) != nbytes:
            raise ValueError("sections do not fill the code")
    except (
        *(ValueError, KeyError, TypeError, IndexError, AttributeError, OverflowError),
        *(RecursionError, zlib.error),
    ) as error:
        raise DamagedFile(
            f"{stored.path}: the index of the packed file is broken ({str(error)[:200]}). Download or copy it again."
        ) from error
    names = [name for name, _ in index.infos()]
    if len({*names, *stored.tensors}) != len(names) + len(stored.tensors):
        raise DamagedFile(f"{stored.path}: a name is in the packed file twice. Download or copy it again.")
    return PackedStore(stored, index, str(entry.get("sha256", "")), as_folder=entry.get("folder") is True)


class PackedStore(ComputedStore):
    """The tensors that a packed file unpacks to. They are decoded once, when one of them is read, and then kept."""

    def __init__(self, stored: TensorStore, index: Index, sha256: str, *, as_folder: bool) -> None:
        """sha256: of the contents, as the file says. as_folder: whether it unpacks to a folder of PEFT."""
        computed: dict[str, tuple[TensorInfo, Callable[[], Tensor]]] = {
            name: (info, partial(stored.read, name))
            for name, info in stored.tensors.items()
            if not name.startswith(PREFIX)
        }
        computed |= {name: (info, partial(self._read_packed, name)) for name, info in index.infos()}
        metadata = {key: text for key, text in stored.metadata.items() if key != PACKED}
        super().__init__(stored.path, computed, metadata, stored.files, stored.headers)
        self.index, self.sha256, self.as_folder = index, sha256, as_folder
        self._stored = stored
        self._sections: dict[str, int] = {}  # name -> number of its section
        layers = iter(range(len(index.names)))
        for number, section in enumerate(index.sections):
            for layer in itertools.islice(layers, section.layers):
                form = index.form(layer)
                ends = [factor[0] for factor in form.factors] + [constant[0] for constant in form.constants]
                self._sections |= dict.fromkeys([index.names[layer] + end for end in ends], number)
        ranks = index.ranks
        self._dimensions = [0, *itertools.accumulate(ranks)]  # per layer: how many are before it
        self._first_runs = [
            0,
            *itertools.accumulate(rank * len(index.form(layer).factors) for layer, rank in enumerate(ranks)),
        ]
        self._starts = [0, *itertools.accumulate(section.words for section in index.sections)]
        self._decoding = threading.Lock()
        self._decoded: dict[int, dict[str, Tensor]] = {}

    def _read_packed(self, name: str) -> Tensor:
        return self._section(self._sections[name])[name]

    def _section(self, number: int) -> Mapping[str, Tensor]:
        with self._decoding:
            if number not in self._decoded:
                self._decoded[number] = self._decode(number)
            return self._decoded[number]

    def _decode(self, number: int) -> dict[str, Tensor]:
        """The tensors of a section. Raises DamagedFile, or UsageError if the decoder is not installed."""
        import torch

        tensors = {}
        for layer, factors in self._factors(number):
            name, form = self.index.names[layer], self.index.form(layer)
            for (end, axis, rest), factor in zip(form.factors, factors, strict=True):
                tensors[name + end] = factor.reshape(-1, *rest).movedim(0, axis).contiguous()
            for end, dtype, shape, text in form.constants:
                data = torch.frombuffer(bytearray.fromhex(text), dtype=torch.uint8)
                tensors[name + end] = data.view(getattr(torch, DTYPES[dtype][1])).reshape(shape)
        return tensors

    def _factors(self, number: int) -> list[tuple[int, list[Tensor]]]:
        """(layer, the numbers of its factors, float16) for the layers of a section. Raises as `_decode`."""
        import numpy as np
        import torch

        section = self.index.sections[number]
        first = sum(part.layers for part in self.index.sections[:number])
        layers = range(first, first + section.layers)
        raw = self._stored.read(CODE, (4 * self._starts[number], 4 * self._starts[number + 1])).numpy()
        values = decode(raw.view("<u4").astype(np.uint32), self._runs(layers), self.index.tables, self._stored.path)
        sizes = [self.index.ranks[layer] * count for layer in layers for count in self.index.form(layer).counts]
        factors = list(torch.split(values, sizes))
        crc = 0
        for factor in factors:
            crc = zlib.crc32(little_endian(factor), crc)
        if crc != section.crc32:
            raise DamagedFile(f"{self.path}: the code of the packed file is damaged. Download or copy it again.")
        remaining = iter(factors)
        return [(layer, list(itertools.islice(remaining, len(self.index.form(layer).factors)))) for layer in layers]

    def _runs(self, layers: range) -> Runs:
        """The runs of these layers: factor by factor, dimension by dimension."""
        import numpy as np

        ranks = [self.index.ranks[layer] for layer in layers]
        forms = [self.index.form(layer) for layer in layers]
        start = self._dimensions[layers.start]
        ends = list(itertools.accumulate(ranks, initial=start))
        scales = [
            scale
            for form, (low, high) in zip(forms, itertools.pairwise(ends), strict=True)
            for _ in form.factors
            for scale in self.index.scales[low:high]
        ]
        first = self._first_runs[layers.start]
        return Runs(
            np.array(scales, dtype=np.int64),
            np.array(self.index.classes[first : first + len(scales)], dtype=np.int64),
            np.array(
                [count for form, rank in zip(forms, ranks, strict=True) for count in form.counts for _ in range(rank)],
                dtype=np.int64,
            ),
        )

    def check_code(self) -> None:
        """Unpack all that is coded, and keep nothing of it. Raises DamagedFile."""
        for number in range(len(self.index.sections)):
            self._factors(number)

    def check_contents(self) -> None:
        """Unpack everything and compare its hash. Raises DamagedFile."""
        arrangement = Arrangement(self.tensors)
        digest = contents_sha256(arrangement, self.chunks)
        if digest != self.sha256:
            raise DamagedFile(
                f"{self.path}: unpacks to other numbers than were packed: their SHA-256 is {digest[:16]}…, and in it "
                f"is written {self.sha256[:16]}…. Download or copy it again."
            )

    def close(self) -> None:
        """Close the file."""
        super().close()
        self._stored.close()


def little_endian(numbers: Tensor) -> bytes:
    """The bytes of float16 numbers, in the order of the format on every machine."""
    return numbers.contiguous().numpy().astype("<f2", copy=False).tobytes()


def contents_sha256(arrangement: Arrangement, chunks: Callable[[str], Iterator[memoryview]]) -> str:
    """SHA-256 of all bytes behind the header of a file with this arrangement."""
    digest = hashlib.sha256()
    for name in arrangement.offsets:
        for chunk in chunks(name):
            digest.update(chunk)
    return digest.hexdigest()


# --- decoding -----------------------------------------------------------------------------------


class Runs(NamedTuple):
    """Runs of numbers, each of one dimension in one factor; arrays [runs] int64."""

    scales: Whole
    classes: Whole
    counts: Whole


def coder() -> ModuleType:
    """The entropy coder. Raises UsageError if it is not installed."""
    try:
        from constriction import stream
    except ImportError:
        raise UsageError("packed files need one more package: pip install 'lorashrink[pack]'") from None
    module: ModuleType = stream
    return module


@lru_cache(maxsize=64)
def table_model(table: tuple[int, ...]) -> Any:
    """The coder's model of a table: symbols are an escape, then the numbers from the smallest to the largest."""
    import numpy as np

    escape, *sides = table
    frequencies = np.array([escape, *sides[:0:-1], *sides], dtype=np.float64)
    return coder().model.Categorical(frequencies, perfect=False)


def uniform_model(bits: int) -> Any:
    """The coder's model of equally likely numbers of so many bits."""
    return coder().model.Uniform(1 << bits)


def decode(words: Any, runs: Runs, tables: Mapping[str, tuple[int, ...]], path: object) -> Tensor:
    """Float16 numbers of these runs, one after the other. Raises DamagedFile if the words are no code."""
    import numpy as np
    import torch

    by_class = np.argsort(runs.classes, kind="stable")
    classes, counts = runs.classes[by_class], runs.counts[by_class]
    starts = np.flatnonzero(np.diff(classes, prepend=CLASSES.start - 1))
    totals = dict(zip(classes[starts].tolist(), np.add.reduceat(counts, starts).tolist(), strict=True))
    try:
        ans = coder().stack.AnsCoder(words)
        numbers = [_decode_class(ans, class_, count, tables[str(class_)]) for class_, count in totals.items()]
    except ValueError as error:
        raise DamagedFile(f"{path}: the code of the packed file is damaged. Download or copy it again.") from error
    steps = steps_of(runs.scales[by_class], classes)
    values = torch.from_numpy(np.concatenate([np.empty(0, dtype=np.int32), *numbers]).astype(np.float32))
    values *= torch.from_numpy(np.repeat(steps.astype(np.float32), counts))
    ordered: list[Tensor] = [values] * len(counts)
    for index, piece in zip(by_class.tolist(), torch.split(values.half(), counts.tolist()), strict=True):
        ordered[index] = piece
    return torch.cat(ordered)


def _decode_class(ans: Any, class_: int, count: int, table: tuple[int, ...]) -> Whole:
    """The numbers of a class, [count] int32: those of the table, escaped ones, and low bits beside them."""
    import numpy as np

    numbers: Whole = ans.decode(table_model(table), count)
    escaped = np.flatnonzero(numbers == 0)
    numbers -= len(table) - 1
    if len(escaped):
        numbers[escaped] = ans.decode(uniform_model(ESCAPE_BITS), len(escaped)) - (1 << (ESCAPE_BITS - 1))
    bits = low_bits(class_)
    if bits:
        numbers <<= bits
        numbers += ans.decode(uniform_model(bits), count)
        numbers -= 1 << (bits - 1)
    return numbers
