"""What the arguments of a command stand for: adapter files, and which argument is the base."""

from __future__ import annotations

import glob
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorashrink.adapters import looks_like_adapter, peft
from lorashrink.bases import recognise
from lorashrink.bases.containers import is_model_folder
from lorashrink.bases.gguf_file import is_gguf
from lorashrink.errors import InputError, NotABase, UsageError
from lorashrink.files.disk import absent_text
from lorashrink.files.header import read_header
from lorashrink.files.reading import PICKLE_SUFFIXES


def find_adapters(entries: str | Path | Sequence[str | Path], *, recursive: bool = False) -> list[Path]:
    """The adapter files that paths, folders and globs stand for, each once, in order.

    In folders only files that hold adapter tensors count, by their headers. Raises InputError if an entry
    stands for none.
    """
    files: dict[str, Path] = {}
    for entry in [entries] if isinstance(entries, (str, Path)) else entries:
        path = Path(entry)
        # os.path.isdir: unlike Path.is_dir, no error for a name that is too long
        if os.path.isdir(path) and not peft.is_folder(path):
            paths = _adapters_in(path, recursive)
        elif os.path.exists(path) or not glob.has_magic(str(entry)):
            paths = [path]
        else:
            paths = [Path(match) for match in sorted(glob.glob(str(entry), recursive=recursive))]
            if not paths:
                raise InputError(f"{entry}: no file matches.")
        for path in paths:
            in_folder = path.name in peft.WEIGHTS_FILES and peft.is_folder(path.parent)
            adapter = path.parent if in_folder else path
            files.setdefault(os.path.realpath(adapter), adapter)
    return list(files.values())


def only_adapter(entry: Any, *, needed: str = "one adapter is needed") -> Path:
    """The one adapter that an argument stands for. Raises InputError if there is none, UsageError if there are more."""
    adapters = find_adapters([entry])
    if len(adapters) != 1:
        raise UsageError(f"{entry}: stands for {len(adapters)} adapters, and {needed}. Name one file.")
    check_exists(adapters[0])
    return adapters[0]


def check_exists(entry: str | Path) -> None:
    """Raises InputError if this is a path at which there is nothing."""
    if not os.path.lexists(entry) and not glob.has_magic(str(entry)) and not is_sum(entry):
        raise InputError(f"{entry}: no such file or folder.")


def _adapters_in(folder: Path, recursive: bool) -> list[Path]:
    """The adapter files of a folder, and the folders below it that may not be read.

    Raises InputError if there are none, or the folder itself may not be read.
    """
    unreadable: list[Path] = []

    def note_unreadable(error: OSError) -> None:
        if error.filename == str(folder):
            raise InputError(f"{folder}: cannot be read ({error.strerror or error}).") from error
        unreadable.append(Path(error.filename))

    entries: list[Path] = []
    for parent, folders, names in os.walk(folder, onerror=note_unreadable):
        entries += (Path(parent, name) for name in (*folders, *names))
        if not recursive:
            break
    files = [path for path in entries if path.suffix == ".safetensors" and not path.name.startswith(".")]
    # a damaged file is named in the report, not passed over
    paths = sorted([*(path for path in files if _is_adapter(path) is not False), *unreadable])
    if not paths:
        hint = "" if recursive else "; --recursive looks deeper"
        raise InputError(f"{folder}: no adapter (.safetensors) in this folder{hint}.")
    return paths


def _is_adapter(path: Path) -> bool | None:
    """Whether the header of a file names tensors of an adapter; None if it cannot be read."""
    try:
        return looks_like_adapter(read_header(path)[0])
    except InputError:
        return None


def split_weight(text: str | Path) -> tuple[str, float]:
    """(path, weight) of `A` or `A:0.7`; the weight is 1 where none is given.

    A weight is only what follows the last colon and is a number, and none where all of it is the name of a file that
    exists. Raises UsageError if a file that exists is followed by something else, or by NaN or infinity.
    """
    path, colon, number = str(text).rpartition(":")
    if not colon or not path or os.path.exists(text):
        return str(text), 1.0
    try:
        weight = float(number)
    except ValueError:
        weight = math.nan
        if not os.path.exists(path):
            return str(text), 1.0
    if not math.isfinite(weight):
        raise UsageError(f"{text}: '{number}' is no weight. Give a number, such as {path}:0.7.")
    return path, weight


@dataclass(frozen=True, slots=True)
class Sum:
    """A weighted sum of adapters as one input."""

    terms: tuple[tuple[Path, float], ...]

    @property
    def path(self) -> Path:
        """What messages and reports call it: `A:0.7,B:0.5`."""
        return Path(",".join(f"{path}:{weight:.12g}" for path, weight in self.terms))

    @property
    def location(self) -> Path:
        """A path beside the first adapter, from which the outputs get their names."""
        names = [path.name if os.path.isdir(path) else path.stem for path, _ in self.terms]
        return self.terms[0][0].parent / f"{'+'.join(names)}.safetensors"

    @property
    def files(self) -> list[Path]:
        """The adapters without their weights."""
        return [path for path, _ in self.terms]


def split_sum(text: str | Path) -> list[tuple[str, float]]:
    """The (path, weight) of each term of `A:0.7,B:0.5`, as `split_weight`; commas may be a part of files that exist."""
    pieces, terms = str(text).split(","), []
    while pieces:
        for end in range(len(pieces), 0, -1):
            term = ",".join(pieces[:end])
            path, _, number = term.rpartition(":")
            if end == 1 or os.path.exists(term) or ("," not in number and os.path.exists(path)):
                break
        terms.append(split_weight(term))
        pieces = pieces[end:]
    return terms


def is_sum(text: str | Path) -> bool:
    """Whether an argument is not just the name of one adapter, or of several."""
    if os.path.exists(text) or (glob.has_magic(str(text)) and glob.glob(str(text), recursive=True)):
        return False
    return split_sum(text) != [(str(text), 1.0)]


def find_inputs(entries: Sequence[str | Path], *, recursive: bool = False) -> dict[Path, Sum | None]:
    """All that arguments stand for, each once and in order: files as `find_adapters`, and sums by what they are called.

    Raises InputError if an argument stands for nothing, and UsageError for a sum that is none.
    """
    inputs: dict[str, tuple[Path, Sum | None]] = {}
    for entry in entries:
        if is_sum(entry):
            terms = to_sum([entry])
            inputs.setdefault(str(terms.path), (terms.path, terms))
        else:
            for path in find_adapters([entry], recursive=recursive):
                inputs.setdefault(os.path.realpath(path), (path, None))
    return dict(inputs.values())


def to_sum(texts: Sequence[str | Path]) -> Sum:
    """The sum of all terms in some arguments. Raises UsageError or InputError.

    A term is one adapter, and each adapter is there once. A sum whose weights all are 0 is nothing.
    """
    terms: dict[str, tuple[Path, float]] = {}
    for name, weight in [term for text in texts for term in split_sum(text)]:
        if not name.strip():
            raise UsageError(f"{','.join(map(str, texts))}: a name is missing. Write A:0.7,B:0.5.")
        adapters = find_adapters([name])
        if len(adapters) != 1:
            raise UsageError(
                f"{name}: stands for {len(adapters)} adapters, and each needs a weight. Name them one by one."
            )
        (path,) = adapters
        if not os.path.exists(path) and ":" in name:
            raise InputError(f"{name}: no such file; nor is {name.rpartition(':')[2]!r} behind its colon a weight.")
        real_path = os.path.realpath(path)
        if real_path in terms:
            total = terms[real_path][1] + weight
            raise UsageError(f"{path}: is there twice. Give it once, with the weight {total:g}.")
        terms[real_path] = (path, weight)
    if not any(weight for _, weight in terms.values()):
        raise UsageError("the weights are all 0, and so is the sum. Give at least one adapter another weight.")
    return Sum(tuple(terms.values()))


def check_is_base(path: str | Path) -> None:
    """Raises NotABase for an adapter, and InputError for what does not exist; other faults show when it is opened."""
    if not os.path.exists(path):
        raise InputError(f"{path}: {absent_text(path)}")
    if is_lora(path):
        raise NotABase(f"{path}: is a LoRA, and a base model is needed here.")


def is_lora(path: str | Path) -> bool:
    """Whether this is an adapter: a PEFT folder, or a file with the names of one."""
    path = Path(path)
    return peft.is_folder(path) or (path.is_file() and path.suffix == ".safetensors" and bool(_is_adapter(path)))


def is_checkpoint(path: str | Path) -> bool:
    """Whether this is a base model of a known family, and not just a file without an adapter's names."""
    if os.path.isdir(path):
        return looks_like_base(str(path))
    try:
        family = recognise({key: info.shape for key, info in read_header(Path(path))[0].items()})
    except InputError:
        return False
    return family is not None and family.name != "unknown"


def looks_like_base(entry: str) -> bool:
    """Whether a positional argument is a base: by its header, or as a folder with a model's parts."""
    path = Path(entry)
    if os.path.isdir(path):
        return not peft.is_folder(path) and is_model_folder(path)
    if is_gguf(path) or path.suffix == ".json":
        return True
    if not os.path.isfile(path):
        return False
    if path.suffix.lower() in PICKLE_SUFFIXES:
        return path.suffix.lower() == ".ckpt"
    return _is_adapter(path) is False and bool(read_header(path)[0])
