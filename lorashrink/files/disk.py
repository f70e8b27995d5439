"""Atomic writes, leftovers of interrupted runs, and checks of output paths."""

from __future__ import annotations

import contextlib
import difflib
import hashlib
import os
import re
import secrets
import threading
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from io import FileIO
from pathlib import Path

from lorashrink.errors import InputError, OutputError, UsageError
from lorashrink.files.store import COPY_CHUNK, TensorStore, open_file


def write_bytes(path: Path, data: bytes | Iterable[bytes]) -> None:
    """Write a file of these bytes, or pieces, in one step: it appears complete under its name, or not at all."""
    write_together({path: data})


def write_together(files: Mapping[Path, bytes | Iterable[bytes]]) -> None:
    """Write files that appear together or not at all; readers know the group by the last one. Raises OutputError."""
    with complete_files(files) as temporaries:
        publish(temporaries)


@contextlib.contextmanager
def complete_files(files: Mapping[Path, bytes | Iterable[bytes]]) -> Iterator[dict[Path, Path]]:
    """Files of these bytes on the disk, name -> temporary name; those that get no name are deleted afterwards."""
    temporaries: dict[Path, Path] = {}
    with contextlib.ExitStack() as stack:
        for path, data in files.items():
            with as_output_error(path):
                number, temporaries[path] = create_temporary(path)
                stack.callback(discard, temporaries[path])
                handle = stack.enter_context(FileIO(number, "wb"))  # without a buffer that closing would flush again
                for piece in [data] if isinstance(data, bytes) else data:
                    view = memoryview(piece)
                    while view:
                        view = view[handle.write(view) :]
                os.fsync(number)
                if os.name != "posix":  # where open files get no new name; elsewhere they stay owned until then
                    handle.close()
        yield temporaries


@contextlib.contextmanager
def as_output_error(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise OutputError(cannot_write(path, error)) from error


def create_temporary(path: Path) -> tuple[int, Path]:
    """(descriptor, name) of a new file beside `path`, open to read and write; `clear_leftovers` knows the name.

    The kernel gives it the rights of the owner's other new files. tempfile would give it others, and to mend them
    one would have to set the umask, which all threads share. Raises OSError.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    while True:
        temporary = path.parent / f"{_temporary_prefix(path)}{secrets.token_hex(4)}.tmp"
        _own.unfinished.add(temporary)  # before it is there, because a signal can come at any moment
        try:
            number = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0), 0o666)
        except FileExistsError:
            _own.unfinished.discard(temporary)
        else:
            lock_file(number)
            try:
                if os.fstat(number).st_nlink:
                    return number, temporary
            except OSError:
                os.close(number)
                discard(temporary)
                raise
            os.close(number)  # another process took it for a leftover, in the moment before the lock
            _own.unfinished.discard(temporary)


class _Own:
    """What this process has written: temporary files without a name so far, and how many outputs have got theirs."""

    def __init__(self) -> None:
        self.unfinished: set[Path] = set()
        self.finished = 0
        self.lock = threading.Lock()


_own = _Own()


def discard(temporary: Path) -> None:
    """Delete a temporary file, if it is there; a disk that refuses once may not refuse twice."""
    for _ in range(2):
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
            _own.unfinished.discard(temporary)
            break


def discard_unfinished() -> None:
    """Delete all temporary files of this process, which will write no more."""
    for temporary in list(_own.unfinished):
        discard(temporary)


def count_finished() -> int:
    """How many outputs this process has written, those of several files counted once."""
    return _own.finished


def publish(temporaries: Mapping[Path, Path]) -> None:
    """Give complete files, name -> temporary name, their names: all of them, or none.

    A file alone replaces an older one in one step. Of several, readers know the group by the last one: while it is
    away no reader takes new files for a part of the old group. What is replaced is set aside until then, and put back
    if something fails; `clear_leftovers` puts it back after a process that was killed between two steps.
    Raises OutputError.
    """
    *others, last = temporaries
    aside: dict[Path, Path] = {}
    placed: list[Path] = []
    with contextlib.ExitStack() as stack, as_output_error(last):
        try:
            if others:
                token = secrets.token_hex(4)
                for path in filter(os.path.exists, [last, *reversed(others)]):
                    # Other processes take no open file for left behind; Windows would give it no new name.
                    number = os.open(path if os.name == "posix" else os.devnull, os.O_RDONLY)
                    stack.callback(os.close, number)
                    lock_file(number)
                    aside[path] = _aside(path, token)
                    os.replace(path, aside[path])
            for path, temporary in temporaries.items():
                placed.append(path)
                os.replace(temporary, path)
                _own.unfinished.discard(temporary)
        except BaseException:
            if others:  # a file alone is still the old one
                for path in placed:
                    with contextlib.suppress(OSError):
                        path.unlink()
                _put_back(aside)
            raise
        for old in aside.values():
            discard(old)
    if os.name == "posix":  # elsewhere a folder cannot be opened to flush it
        with contextlib.suppress(OSError):
            number = os.open(last.parent, os.O_RDONLY)
            try:
                os.fsync(number)
            finally:
                os.close(number)
    with _own.lock:
        _own.finished += 1


def _aside(path: Path, token: str) -> Path:
    return path.parent / f"{_temporary_prefix(path)}{token}.old"


def _put_back(aside: Mapping[Path, Path]) -> None:
    """Give files that were set aside, path -> where they are, their names again; the last one was set aside first."""
    for path, old in reversed(list(aside.items())):
        for _ in range(2):
            with contextlib.suppress(OSError):
                os.replace(old, path)
                break


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
    """Delete temporary files of these outputs which no living process has open, and return their paths.

    Outputs that were set aside and never replaced get their names back before.
    """
    outputs = list(outputs)
    recover(outputs)
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
    deleted = []
    for path in leftovers:
        with contextlib.suppress(OSError):  # another process was faster, or may do what this one may not
            with open(path, "r+b") as handle:  # network shares lock only what may be written
                if not lock_file(handle.fileno()):
                    continue
                if os.name == "posix":
                    path.unlink()
            if os.name != "posix":
                path.unlink()
            deleted.append(path)
    return deleted


def recover(outputs: Sequence[Path]) -> None:
    """Put back outputs of several files that a killed process had set aside, where it did not get to replace all.

    Of each output the file that it is known by comes first.
    """
    groups: dict[tuple[Path, str], dict[Path, Path]] = defaultdict(dict)
    for path in outputs:
        for name in os.listdir(path.parent) if os.path.isdir(path.parent) else ():
            token = name.removeprefix(_temporary_prefix(path)).removesuffix(".old")
            if name == _aside(path, token).name:
                with contextlib.suppress(OSError), open(path.parent / name, "rb") as handle:
                    if lock_file(handle.fileno()):  # no process uses it
                        groups[path.parent, token][path] = path.parent / name
    for aside in groups.values():
        if all(map(os.path.exists, aside)):
            for old in aside.values():
                discard(old)
        else:
            _put_back(aside)


def user_cache() -> Path | None:
    """The folder of this program in the user's cache; None for a user without a home, as services are."""
    import platformdirs

    try:
        folder = platformdirs.user_cache_path("lorashrink", appauthor=False)
    except (RuntimeError, OSError):
        return None
    return folder if folder.is_absolute() else None  # a ~ that nothing stands for


def absent_text(path: str | Path) -> str:
    """What to say of a path without a regular file: why, or which names in its folder are like it."""
    path = Path(path)
    if os.path.islink(path):
        return f"is a link to {os.readlink(path)}, where there is no file."
    if os.path.exists(path):
        return "cannot be read (not a regular file)."
    try:
        names = os.listdir(path.parent)
    except OSError:
        return f"no such file; the folder {path.parent} does not exist or cannot be read."
    same = [name for name in names if os.path.splitext(name)[0] == path.name]
    similar = list(dict.fromkeys([*same, *difflib.get_close_matches(path.name, names, 3)]))
    return f"no such file. Similar names there: {', '.join(similar)}" if similar else "no such file."


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
    check_folder(path.parent, path)


def check_folder(folder: Path, what: object) -> None:
    """Raises OutputError, which begins with `what`, if nothing can be written in a folder; it need not exist yet."""
    absolute = folder.absolute()
    existing = next(path for path in (absolute, *absolute.parents) if os.path.exists(path))
    if not existing.is_dir():
        raise OutputError(f"{what}: {existing} is no folder. Choose another place.")
    if not os.access(existing, os.W_OK):
        raise OutputError(f"{what}: {existing} cannot be written to. Choose another place.")


NamedPaths = Sequence[tuple[str, Path | None]]  # option, and what it names; None if nothing


def check_apart(files: NamedPaths, folders: NamedPaths = ()) -> None:
    """Find out whether the outputs of one call get in each other's way.

    folders: of outputs, where there may be others of the call. Raises UsageError if two paths are the same, or one lies
    below one of `files`.
    """
    named = [(option, path, os.path.realpath(path)) for option, path in (*files, *folders) if path is not None]
    of_files = {os.path.realpath(path) for _, path in files if path is not None}
    taken: set[str] = set()
    for option, path, real in named:
        if real in taken:
            raise UsageError(f"{option} {path}: is another output of the same call. Give each a name of its own.")
        taken.add(real)
        above = next((str(parent) for parent in Path(real).parents if str(parent) in of_files), None)
        if above is not None:
            raise UsageError(f"{option} {path}: lies below {above}, which is a file of the same call.")


# --- identity -----------------------------------------------------------------------------------


def sha256_file(path: Path, contents: memoryview | None = None) -> str:
    """SHA-256 of a file, whose contents may have been read, as 64 hexadecimal digits. Raises InputError."""
    begun = None
    with contextlib.suppress(OSError):
        begun = _begun.pop(_identity(path), None) if _begun else None
    if begun:
        return begun.result()
    return _sha256(path) if contents is None else hashlib.sha256(contents).hexdigest()


def begin_sha256(path: Path) -> None:
    """Begin to hash a file that `sha256_file` is about to be asked for, while the program starts."""
    with contextlib.suppress(OSError, ValueError):  # a file that cannot be read is not asked for
        identity, future = _identity(path), Future[str]()
        threading.Thread(target=_hash_for, args=(path, future), daemon=True).start()
        _begun[identity] = future


_begun: dict[tuple[int, ...], Future[str]] = {}


def _identity(path: Path) -> tuple[int, ...]:
    """Device, inode, size and time of the last change of a file. Raises OSError, or ValueError for a broken name."""
    status = os.stat(path)
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def _hash_for(path: Path, future: Future[str]) -> None:
    try:
        future.set_result(_sha256(path))
    except BaseException as error:
        future.set_exception(error)


def _sha256(path: Path) -> str:
    digest, buffer = hashlib.sha256(), memoryview(bytearray(COPY_CHUNK))
    try:
        with open_file(path) as handle:
            while count := handle.readinto(buffer):
                digest.update(buffer[:count])
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error}).") from error
    return digest.hexdigest()


def sha256_store(store: TensorStore) -> str:
    """SHA-256 of a store's first file, from memory if it is there. Raises InputError."""
    return sha256_file(store.files[0], store.loaded(0))


def content_fingerprint(store: TensorStore) -> str:
    """A quick identity of a store's contents: SHA-256 of its headers, sizes and 64 blocks of each file."""
    digest = hashlib.sha256()
    for path, header in zip(store.files, store.headers, strict=True):
        digest.update(header)
        digest.update(str(path.stat().st_size).encode())
    for block in store.sample():
        digest.update(block)
    return digest.hexdigest()
