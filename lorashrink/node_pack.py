"""`comfyui install`: the node pack for ComfyUI, linked or copied to where ComfyUI looks for it."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from pathlib import Path

from lorashrink.errors import InputError, OutputError, UsageError

_NAME = "lorashrink"


@dataclass(frozen=True, slots=True)
class Installed:
    """Nodes in a ComfyUI."""

    path: str
    source: str
    linked: bool


def pack_folder() -> Path:
    """The folder with the nodes: in the package, or beside it in a checkout. Raises InputError."""
    package = Path(__file__).parent
    for folder in (package / "comfyui", package.parent / "comfyui"):
        if (folder / "nodes.py").is_file():
            return folder
    raise InputError(f"{package}: has no folder comfyui. Install lorashrink again.")


def install(path: str | Path, *, copy: bool = False, force: bool = False) -> Installed:
    """Link the nodes into ComfyUI's `custom_nodes/lorashrink`, or copy them where links cannot be made.

    path: the folder of ComfyUI, or its `custom_nodes`. Raises UsageError if it is neither, and OutputError if the nodes
    are there already and `force` is not set, or cannot be written.
    """
    path = Path(path)
    folder = path if path.name == "custom_nodes" else path / "custom_nodes"
    if not folder.is_dir():
        raise UsageError(f"{path}: has no folder custom_nodes. Give the folder of ComfyUI, which holds main.py.")
    target, source = folder / _NAME, pack_folder()
    try:
        if os.path.lexists(target):
            if not force:
                raise OutputError(f"{target}: is there already. Use --force to replace it.")
            if target.is_symlink():
                target.unlink()
            elif (target / "nodes.py").is_file() and (target / "logic.py").is_file():
                shutil.rmtree(target)  # an earlier copy
            else:
                raise OutputError(f"{target}: holds something else than these nodes. Move it away first.")
        if not copy:
            try:
                target.symlink_to(source, target_is_directory=True)
                return Installed(str(target), str(source), linked=True)
            except (OSError, NotImplementedError):  # Windows asks for a right that few users have
                pass
        shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__"))
    except OSError as error:
        raise OutputError(f"{target}: cannot be written ({error.strerror or error}).") from error
    return Installed(str(target), str(source), linked=False)
