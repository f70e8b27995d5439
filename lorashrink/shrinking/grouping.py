"""Collections of adapters for several models: which of them each is for, and a table of their bases."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Mapping
from pathlib import Path

from lorashrink.adapters import adapter_family, open_adapter
from lorashrink.bases import FAMILIES
from lorashrink.errors import InputError, UsageError

# How `ss_base_model_version` of sd-scripts begins -> family, for adapters whose layers alone do not tell.
_TRAINED_ON = {"sdxl_base": "sdxl", "sd_v1": "sd15", "sd_v2": "sd2", "sd3": "sd3", "flux1": "flux"}


def read_table(path: str | Path) -> dict[str, Path]:
    """Family -> base, of a .toml or .json file; paths in it are relative to its folder.

    Raises UsageError if it cannot be read, is no such table, or names a family that does not exist.
    """
    file = Path(path)
    try:
        text = file.read_text(encoding="utf-8")
        table = json.loads(text) if file.suffix == ".json" else tomllib.loads(text)
    except OSError as error:
        raise UsageError(f"{file}: cannot be read ({error.strerror or error}).") from error
    except (ValueError, RecursionError) as error:
        raise UsageError(
            f"{file}: neither TOML nor JSON ({error}). Write lines such as sdxl = 'model.safetensors'."
        ) from error
    if not isinstance(table, dict) or not table or not all(isinstance(base, str) for base in table.values()):
        raise UsageError(f"{file}: not a table of bases. Write lines such as sdxl = 'model.safetensors'.")
    names = {family.name for family in FAMILIES}
    if unknown := sorted(table.keys() - names):
        raise UsageError(f"{file}: '{unknown[0]}' is no family of models; known are {', '.join(sorted(names))}.")
    return {family: file.parent / base for family, base in table.items()}


def family_in(path: Path) -> str | None:
    """The family of models that an adapter file is for, by its layers or else its metadata; None if both are silent.

    Reads headers only. Raises InputError as `open_adapter`.
    """
    with open_adapter(path) as adapter:
        trained_on = adapter.store.metadata.get("ss_base_model_version", "")
        by_metadata = (family for start, family in _TRAINED_ON.items() if trained_on.startswith(start))
        return adapter_family(adapter) or next(by_metadata, None)


def base_for(path: Path, bases: Mapping[str, Path]) -> Path:
    """The adapter's base in a table of bases. Raises InputError if its family is unknown or not in the table."""
    family = family_in(path)
    if family is None:
        raise InputError(
            f"{path}: neither its layers nor its metadata tell which model it is for. Shrink it alone, with --base."
        )
    if family not in bases:
        raise InputError(
            f"{path}: is for {family}, and the table of bases has only {', '.join(bases)}. Add a line for {family}."
        )
    return bases[family]
