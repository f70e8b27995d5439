"""Norm tables: JSON files that stand in for a base wherever norms are enough.

It holds the names and shapes of the base's tensors, from which the weights are named as for the base itself, and the
norms of each.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorashrink.bases.families import family_named
from lorashrink.bases.family import BaseFamily
from lorashrink.errors import InputError, NotABase
from lorashrink.files.store import read_text

FORMAT = "lorashrink-norms"
VERSION = 2

Norms = Mapping[str, Mapping[str, float]]


@dataclass(frozen=True, eq=False, slots=True)
class Table:
    """What a norm table says."""

    family: BaseFamily
    fingerprint: str
    shapes: Mapping[str, tuple[int, ...]]
    norms: Norms  # views_id -> {"fro": ‖W‖_F, "spn": ‖W‖₂}


def to_bytes(family: BaseFamily, name: str, fingerprint: str, shapes: Mapping[str, Any], norms: Norms) -> bytes:
    """The contents of a norm table for the base of this name."""
    table = {
        "format": FORMAT,
        "version": VERSION,
        "family": family.name,
        "base": name,
        "fingerprint": fingerprint,
        "tensors": shapes,
        "norms": {key: {name: values[name] for name in ("fro", "spn")} for key, values in norms.items()},
    }
    return (json.dumps(table, separators=(",", ":")) + "\n").encode()


def read(path: Path) -> Table:
    """Read a norm table. Raises InputError (unreadable) or NotABase (not one, or of another version)."""
    try:
        table = json.loads(read_text(path))
        if table["format"] != FORMAT:
            raise KeyError(FORMAT)
        if table["version"] != VERSION:
            raise ValueError(f"it has version {table['version']}, this program reads {VERSION}")
        norms = {key: {name: float(values[name]) for name in ("fro", "spn")} for key, values in table["norms"].items()}
        if not all(math.isfinite(value) and value >= 0 for values in norms.values() for value in values.values()):
            raise ValueError("a norm is not a finite number")
        shapes = {str(key): tuple(map(int, shape)) for key, shape in table["tensors"].items()}
        if not all(0 <= side < 2**63 for shape in shapes.values() for side in shape):
            raise ValueError("a shape is none")
        "".join([*shapes, *norms]).encode()  # half a character has no place in a name
        family = family_named(table["family"])
        if family is None:
            raise ValueError(f"its family, {table['family']}, is unknown")
        return Table(family, str(table["fingerprint"]), shapes, norms)
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error}).") from error
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, OverflowError) as error:
        raise NotABase(
            f"{path}: not a norm table of this version ({error}). Make one: lorashrink base-norms BASE -o {path.name}"
        ) from error
