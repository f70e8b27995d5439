"""Atomic writes, leftovers of interrupted runs, and checks of output paths."""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import secrets
from collections import defaultdict
from collections.abc import Collection, Iterable
from pathlib import Path

from lorashrink.errors import InputError, OutputError
from lorashrink.files.store import COPY_CHUNK, TensorStore


def write_bytes(path: Path, data: bytes | Iterable[bytes]) -> None:
    """Write a file of these bytes, or pieces, in one step: it appears complete under its name, or not at all."""
    temporary = None
    try:
        number, temporary = create_temporary(path)
        with os.fdopen(number, "wb") as handle:
            handle.writelines([data] if isinstance(data, bytes) else data)
            handle.flush()
            os.fsync(handle.fileno())
        publish(temporary, path)
    except OSError as error:
        raise OutputError(cannot_write(path, error)) from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


def create_temporary(path: Path) -> tuple[int, Path]:
    """(descriptor, name) of a new file beside `path`, open to read and write; `clear_leftovers` knows the name.

    The kernel gives it the rights of the owner's other new files. tempfile would give it others, and to mend them
    one would have to set the umask, which all threads share. Raises OSError.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    while True:
        temporary = path.parent / f"{_temporary_prefix(path)}{secrets.token_hex(4)}.tmp"
        with contextlib.suppress(FileExistsError):
            number = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0), 0o666)
            lock_file(number)
            return number, temporary


def publish(temporary: Path, path: Path) -> None:
    """Give a complete file its name."""
    os.replace(temporary, path)
    if os.name == "posix":  # elsewhere a folder cannot be opened to flush it
        with contextlib.suppress(OSError):
            number = os.open(path.parent, os.O_RDONLY)
            try:
                os.fsync(number)
            finally:
                os.close(number)


def cannot_write(path: Path, error: OSError) -> str:
    """What an OutputError says."""
    return f"{path}: cannot be written ({error.strerror or error}). Nothing was left behind; choose another place."


# --- what a killed process leaves behind --------------------------------------------------------

_TEMPORARY_NAME = re.compile(r"(\..*\.)[a-z0-9_]{8}\.tmp", re.DOTALL)  # (prefix), also those of earlier versions


def _temporary_prefix(path: Path) -> str:
    return f".{path.stem[:40]}."


def lock_file(number: int) -> bool:
    """Take an open file until it is closed or the process ends, however that is; False if another process has it.

    Where the system has no such locks nothing is done: Windows does not delete files that are open.
    """
    try:
        import fcntl
    except ImportError:
        return True
    try:
        fcntl.flock(number, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def clear_leftovers(outputs: Iterable[Path]) -> list[Path]:
    """Delete temporary files of these outputs which no living process has open, and return their paths."""
    prefixes: dict[Path, set[str]] = defaultdict(set)
    for path in outputs:
        prefixes[path.parent].add(_temporary_prefix(path))
    leftovers = [
        folder / name
        for folder, of_outputs in prefixes.items()
        if os.path.isdir(folder)
        for name in os.listdir(folder)
        if (match := _TEMPORARY_NAME.fullmatch(name)) and match[1] in of_outputs
    ]
    return [path for path in leftovers if _delete_unlocked(path)]


def _delete_unlocked(path: Path) -> bool:
    try:
        with open(path, "r+b") as handle:  # network shares lock only what may be written
            if not lock_file(handle.fileno()):
                return False
            if os.name == "posix":
                path.unlink()
        if os.name != "posix":
            path.unlink()
    except OSError:  # another process was faster, or may do what this one may not
        return False
    return True


def check_output(path: Path, *, force: bool, inputs: Collection[Path] = ()) -> None:
    """Find out before hours of work whether a file can be written; `inputs` are never overwritten.

    Raises OutputError if it is one of them, exists and `force` is not set, or lies where nothing can be written.
    """
    target = os.path.realpath(path)
    if any(target == os.path.realpath(source) for source in inputs):
        raise OutputError(f"{path}: is an input, and inputs are never overwritten. Choose another place.")
    if os.path.isdir(path):
        raise OutputError(f"{path}: is a folder. Choose another name.")
    if os.path.exists(path) and not force:
        raise OutputError(f"{path}: exists already. Use --force to replace it, or choose another place.")
    folder = next(parent for parent in path.absolute().parents if os.path.exists(parent))
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        raise OutputError(f"{path}: {folder} cannot be written to. Choose another place.")


# --- identity -----------------------------------------------------------------------------------


def sha256_file(path: Path) -> str:
    """SHA-256 of a file, as 64 hexadecimal digits. Raises InputError."""
    digest = hashlib.sha256()
    try:
        with open(path, "rb", buffering=0) as handle:
            while chunk := handle.read(COPY_CHUNK):
                digest.update(chunk)
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error}).") from error
    return digest.hexdigest()


def sha256_store(store: TensorStore) -> str:
    """SHA-256 of a store's first file, from memory if it is there. Raises InputError."""
    whole = store.loaded(0)
    return sha256_file(store.files[0]) if whole is None else hashlib.sha256(whole).hexdigest()


def content_fingerprint(store: TensorStore) -> str:
    """A quick identity of a store's contents: SHA-256 of its headers, sizes and 64 blocks of each file."""
    digest = hashlib.sha256()
    for path, header in zip(store.files, store.headers, strict=True):
        digest.update(header)
        digest.update(str(path.stat().st_size).encode())
    for block in store.sample():
        digest.update(block)
    return digest.hexdigest()
