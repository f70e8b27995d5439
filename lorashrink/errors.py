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
    └── OutputError         a file that cannot be written, or came out wrong

A message says what is wrong, in which file or option, and what to do.
"""

import difflib
from collections.abc import Callable, Iterable

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


def nearest(name: str, names: Iterable[str], cutoff: float = 0.6) -> str | None:
    """The name that was probably meant by one that does not exist, for messages; None if none is like it.

    cutoff: least similarity, from 0 to 1 (`difflib`)."""
    return next(iter(difflib.get_close_matches(name, list(names), 1, cutoff)), None)
