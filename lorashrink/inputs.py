"""What the arguments of a command stand for: adapter files, and which argument is the base."""

from __future__ import annotations

import glob
import os
from collections.abc import Sequence
from pathlib import Path

from lorashrink.adapters import looks_like_adapter, peft
from lorashrink.bases.containers import is_model_folder
from lorashrink.bases.gguf_file import is_gguf
from lorashrink.errors import InputError
from lorashrink.files import PICKLE_SUFFIXES, read_header


def find_adapters(given: Sequence[str | Path], *, recursive: bool = False) -> list[Path]:
    """The adapter files that paths, folders and globs stand for, each once, in order.

    In folders only files that hold adapter tensors count, by their headers. Raises InputError if an entry
    stands for none.
    """
    found: dict[str, Path] = {}
    for entry in map(str, given):
        path = Path(entry)
        if peft.is_folder(path):
            paths, missing = [path], ""
        elif os.path.isdir(path):  # unlike Path.is_dir, no error for a name that is too long
            inside = path.rglob("*") if recursive else path.iterdir()
            paths = [each for each in sorted(inside) if each.suffix == ".safetensors" and not each.name.startswith(".")]
            paths = [each for each in paths if _holds_adapter(each)]
            missing = (
                f"{entry}: no adapter (.safetensors) in this folder{'' if recursive else '; --recursive looks deeper'}."
            )
        elif os.path.exists(path) or not glob.has_magic(entry):
            paths, missing = [path], ""
        else:
            paths = [Path(each) for each in sorted(glob.glob(entry, recursive=recursive))]
            missing = f"{entry}: no file matches."
        if not paths:
            raise InputError(missing)
        for each in (path.parent if _of_peft(path) else path for path in paths):
            found.setdefault(os.path.realpath(each), each)
    return list(found.values())


def _of_peft(path: Path) -> bool:
    return path.name in peft.WEIGHTS_FILES and peft.is_folder(path.parent)


def _holds_adapter(path: Path) -> bool:
    try:
        return looks_like_adapter(read_header(path)[0])
    except InputError:
        return True  # a damaged file is named in the report, not passed over


def looks_like_base(entry: str) -> bool:
    """Whether a positional argument is a base: by its header, or as a folder with a model's parts."""
    path = Path(entry)
    if os.path.isdir(path):
        return not peft.is_folder(path) and is_model_folder(path)
    if is_gguf(path):
        return True
    if path.suffix == ".json":
        return True
    if not os.path.isfile(path):
        return False
    try:
        if path.suffix.lower() in PICKLE_SUFFIXES:
            return path.suffix.lower() == ".ckpt"
        return not looks_like_adapter(read_header(path)[0])
    except InputError:
        return False
