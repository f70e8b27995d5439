"""Which files are shrunk, and where their outputs go."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lorashrink.adapters import open_adapter, peft
from lorashrink.errors import InputError, OutputError, UsageError
from lorashrink.files.header import read_header
from lorashrink.files.metadata_keys import RECIPE, SOURCE
from lorashrink.files.reading import PICKLE_SUFFIXES
from lorashrink.linking.inputs import find_adapters
from lorashrink.sums.summing import contents_sha256

FOLDER = "shrunk"


@dataclass(frozen=True, slots=True)
class Item:
    """An adapter to shrink, and the file that its smaller version becomes."""

    source: Path
    output: Path
    folder: Path  # of all outputs of its kind, with their record and page

    @classmethod
    def of(cls, source: Path, root: Path, folder: Path) -> Item:
        """The item of an adapter below `root`, with the same tree below `folder`."""
        below = folder / os.path.relpath(source, root)
        is_folder = peft.is_folder(source)
        return cls(source, below / peft.WEIGHTS_FILE if is_folder else below.with_suffix(".safetensors"), folder)

    @property
    def name(self) -> str:
        """What its path below the folder is."""
        return os.path.relpath(self.output, self.folder)


@dataclass(frozen=True, slots=True)
class Collection:
    """All adapters of a run."""

    items: tuple[Item, ...]
    own: tuple[Path, ...]  # outputs of earlier runs among the inputs, which are left alone


def collect(entries: Sequence[str | Path], output: Path | None) -> Collection:
    """The adapters that files, folders and globs stand for, folders with all that is below them.

    Raises:
        InputError: an entry stands for nothing.
        UsageError: two adapters would have the same output, or `output` is a file and there are several adapters.
    """
    items: dict[str, Item] = {}
    own: list[Path] = []
    for entry in entries:
        path = Path(entry)
        is_tree = os.path.isdir(path) and not peft.is_folder(path)
        for source in find_adapters([entry], recursive=is_tree):
            root = path if is_tree else source.parent
            folder = output or root / FOLDER
            inside = root.absolute() in folder.absolute().parents
            if is_tree and inside and folder.absolute() in source.absolute().parents:
                continue  # it is an output
            if is_own_output(source):
                own.append(source)
            else:
                items.setdefault(os.path.realpath(source), Item.of(source, root, folder))
    collected = tuple(items.values())
    if output and output.suffix == ".safetensors":
        if len(collected) != 1:
            raise UsageError(f"-o {output}: is one file, and there are {len(collected)} adapters. Name a folder.")
        collected = (Item(collected[0].source, output, output.parent),)
    elif output and output.suffix.lower() in PICKLE_SUFFIXES and not output.is_dir():
        raise UsageError(f"-o {output}: outputs are .safetensors files. Name a folder.")
    owners: dict[Path, Path] = {}
    for item in collected:
        owner = owners.setdefault(item.output.absolute(), item.source)
        if owner != item.source:
            raise UsageError(
                f"{item.output}: would be the output of both {owner} and {item.source}. "
                "Name the folder above both, or shrink them with two lines."
            )
    return Collection(collected, tuple(own))


def is_own_output(source: Path) -> bool:
    """Whether lorashrink made this adapter by shrinking another, by its metadata."""
    try:
        path = peft.weights_in(source) if peft.is_folder(source) else source
        return path.suffix == ".safetensors" and {RECIPE, SOURCE} <= read_header(path)[1].keys()
    except InputError:
        return False  # its own error is told when it is shrunk


def check_existing(item: Item) -> None:
    """Raises OutputError if the output exists and is not an earlier version of this adapter, smaller than it is."""
    if not os.path.exists(item.output):
        return
    try:
        made_from = read_header(item.output)[1].get(SOURCE)
    except InputError:
        made_from = None
    with open_adapter(item.source) as adapter:
        if made_from == contents_sha256(adapter):
            return
    raise OutputError(
        f"{item.output}: exists, and was not made from {item.source}. Use --force to replace it, or another -o."
    )
