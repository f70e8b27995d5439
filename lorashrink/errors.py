"""Everything that lorashrink raises on purpose.

    LorashrinkError
    ├── UsageError          the request itself cannot be carried out
    │   └── RecipeError     a recipe that does not parse, or asks for what is not there
    ├── InputError          a file that cannot be used
    │   ├── DamagedFile     cut short, a header that lies, code instead of tensors
    │   ├── NotAnAdapter
    │   ├── NotABase
    │   ├── ShapeError      tensors that do not fit each other or the base
    │   ├── FamilyMismatch  an adapter for another family of models than the base
    │   └── NonFinite       NaN or infinity in a tensor
    ├── OutputError         a file that cannot be written, or came out wrong
    └── Unexpected          whatever else went wrong with one input

A message says what is wrong, in which file or option, and what to do.
"""

import contextlib
import difflib
import logging
from collections.abc import Callable, Iterable, Iterator

log = logging.getLogger(__name__)

# How long work reports progress: (what is being done, steps done, steps in all).
Progress = Callable[[str, int, int], None]


class LorashrinkError(Exception):
    """Base class of all errors that lorashrink raises on purpose."""


class UsageError(LorashrinkError):
    """The request cannot be carried out as it stands: options that contradict or miss something."""


class RecipeError(UsageError):
    """A recipe that does not parse, or that needs something which was not given."""


class InputError(LorashrinkError):
    """An input file cannot be used."""


class DamagedFile(InputError):
    """A file that is cut short, lies about its contents, or holds something else than tensors."""


class NotAnAdapter(InputError):
    """A file in which no adapter layer was found."""


class NotABase(InputError):
    """A file or folder that is no checkpoint of a known family."""


class ShapeError(InputError):
    """Tensors whose shapes do not fit each other or the base."""


class FamilyMismatch(InputError):
    """The adapter belongs to another family of models than the base."""


class NonFinite(InputError):
    """A tensor contains NaN or infinity."""


class OutputError(LorashrinkError):
    """An output file cannot be written, would overwrite something, or did not come out right."""


class Unexpected(LorashrinkError):
    """Something that nobody foresaw went wrong with one input, or the machine refused to go on with it."""


@contextlib.contextmanager
def boundary(subject: object, failed: Callable[[LorashrinkError], object]) -> Iterator[None]:
    """The work on one of many inputs: whatever it raises goes to `failed`, and the others can go on."""
    try:
        yield
    except Exception as error:
        failed(explained(subject, error))


def explained(subject: object, error: Exception) -> LorashrinkError:
    """The error as one that says what is wrong, with which input, and what to do; its traceback goes to the log."""
    if isinstance(error, LorashrinkError):
        return error
    log.debug("%s", subject, exc_info=error)
    words, kind = " ".join(str(error).split())[:300], type(error).__name__
    fault = f"unexpected {kind}: {words}. This is an error of lorashrink; please report it with what --debug shows."
    if isinstance(error, MemoryError) or "not enough memory" in words or "out of memory" in words:
        fault = "does not fit into memory. Close other programs, or use a machine with more."
    elif isinstance(error, OSError) and error.strerror:
        where = f" {error.filename}" if error.filename else ""
        fault = f"the system refused it ({error.strerror}{where}). See to that, and run the same line again."
    return Unexpected(f"{subject}: {fault}")


def hint_of(text: str) -> str | None:
    """What a message says behind its first sentence, which is what to do; None if that is all of it."""
    return text.partition(". ")[2].strip() or None


def nearest(name: str, names: Iterable[str], cutoff: float = 0.6) -> str | None:
    """The name that was probably meant by one that does not exist, for messages; None if none is like it.

    cutoff: least similarity, from 0 to 1 (`difflib`)."""
    return next(iter(difflib.get_close_matches(name, list(names), 1, cutoff)), None)
