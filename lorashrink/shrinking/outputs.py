"""Where outputs go, checked before any work begins."""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

from lorashrink.adapters import peft
from lorashrink.errors import OutputError, UsageError
from lorashrink.files.disk import check_output, clear_leftovers
from lorashrink.results.shrinking import Space

T = TypeVar("T")

# Endings that no folder has; adapters are not written as such files.
_OTHER_FILES = frozenset({".pt", ".pth", ".ckpt", ".bin", ".gguf", ".safetensor", ".sft", ".zip", ".json", ".txt"})

log = logging.getLogger(__name__)


def name_outputs(
    source: Path,
    labels: Sequence[tuple[str, T]],
    output: str | Path | None,
    *,
    sources: int = 1,
    folder: bool = False,
) -> dict[Path, T]:
    """Output file -> what it is for, from (what to append to the source's name, what it is for).

    `output` is what the user named: a folder, or a file if it is the only output of all `sources`. With `folder`
    outputs are PEFT folders. Raises UsageError or OutputError.
    """
    path = Path(output) if output is not None else source.parent
    if path.suffix.lower() in _OTHER_FILES and not path.is_dir():
        raise UsageError(f"-o {output}: results are .safetensors files. Name one, such as {path.stem}.safetensors.")
    if output is not None and path.suffix == ".safetensors" and not path.is_dir():
        if folder:
            raise UsageError(f"-o {output}: a PEFT adapter is a folder with two files. Name a folder.")
        if sources * len(labels) != 1:
            raise UsageError(
                f"-o {output}: one file name, but there are {sources * len(labels)} outputs. Give a folder instead."
            )
        return {path: labels[0][1]}
    if path.exists() and not path.is_dir():
        raise OutputError(f"-o {output}: is a file, not a folder. Name a folder, or a new file ending in .safetensors.")
    stem = source.name if os.path.isdir(source) else source.stem
    ending = f"/{peft.WEIGHTS_FILE}" if folder else ".safetensors"
    targets = {path / f"{stem}_{label}{ending}": purpose for label, purpose in labels}
    if len(targets) < len(labels):
        raise UsageError(
            f"two of the recipes give the same file name: {', '.join(label for label, _ in labels)}. They mean the "
            "same, or nearly; leave one out, or run them one by one with -o FILE."
        )
    return targets


def folders_of_outputs(sources: Collection[Path], output: str | Path | None) -> dict[Path, str | Path | None]:
    """Source -> what `name_outputs` gets as `output`: where two names are equal, the tree below the common folder."""
    names = [source.name if os.path.isdir(source) else source.stem for source in sources]
    if output is None or len(set(names)) == len(names) or len({source.absolute().parent for source in sources}) == 1:
        return dict.fromkeys(sources, output)
    parents = {source: os.path.abspath(source.parent) for source in sources}
    try:
        common = os.path.commonpath(parents.values())
    except ValueError:  # several drives have no common folder
        return dict.fromkeys(sources, output)
    return {source: Path(output) / os.path.relpath(parent, common) for source, parent in parents.items()}


def becomes_folder(source: Path, naming: str | None) -> bool:
    """Whether outputs of this adapter are PEFT folders; without a naming they are what the adapter is."""
    return peft.is_folder(source) if naming is None else naming == "peft"


def base_files(base: object) -> list[Path]:
    """Every file that may be a part of the base, found without opening it; none of a base in memory."""
    if not isinstance(base, (str, Path)):
        return []
    path = Path(base)
    folder = path if path.is_dir() else path.parent if ".index." in path.name else None
    return [path, *(folder.rglob("*.safetensors") if folder else ())]


def source_files(source: Path) -> list[Path]:
    """Every file that is read of an adapter."""
    return [peft.weights_in(source), source / peft.CONFIG_FILE] if peft.is_folder(source) else [source]


def check_outputs(
    targets: Mapping[Path, Collection[Path]],
    inputs: Collection[Path],
    *,
    force: bool,
    hint: str = "--force to replace it",
) -> None:
    """Raises OutputError for whatever would stop the writing later, before hours of work.

    `targets` maps each source to its outputs.
    """
    owners: dict[str, Path] = {}
    read = set(map(os.path.realpath, inputs))
    for source, outputs in targets.items():
        for path in outputs:
            real = os.path.realpath(path)
            if real in owners:
                raise OutputError(
                    f"{path}: would be the output of both {owners[real]} and {source}. Rename one of them."
                )
            owners[real] = source
            check_name(path)
            check_output(path, force=True, inputs=[path] if real in read else ())
            if os.path.exists(path) and not force:
                raise OutputError(f"{path}: exists already. Use {hint}.")


def clear_outputs(outputs: Sequence[Path]) -> None:
    """Delete what a killed run left behind beside these outputs, and put back what it had set aside."""
    configs = [path.parent / peft.CONFIG_FILE for path in outputs if path.name == peft.WEIGHTS_FILE]
    for path in clear_leftovers([*outputs, *configs]):
        log.info("%s: deleted, left behind by a process that was killed", path)


# Bytes of one name on almost all file systems.
_LONGEST_NAME = 255


def check_name(path: Path) -> None:
    """Raises OutputError for a name that no file can have, or that is no text."""
    try:
        longest = max((len(part.encode()) for part in path.parts), default=0)
    except UnicodeEncodeError as error:
        message = f"{str(path)!a}: its name is not UTF-8. Rename the input, or name the output with -o."
        raise OutputError(message) from error
    if longest > _LONGEST_NAME:
        raise OutputError(
            f"{path}: a name of {longest} bytes, and files can have {_LONGEST_NAME}. Name the output with -o FILE."
        )


def space_for(sizes: Mapping[Path, int]) -> Space | None:
    """Space for outputs of these sizes on the disk where it is tightest, None without outputs."""
    disks: dict[int, Space] = {}
    folders: dict[Path, tuple[int, int]] = {}  # folder -> (its disk, bytes free there)
    for path, size in sizes.items():
        if path.parent not in folders:
            folder = next(parent for parent in path.absolute().parents if os.path.isdir(parent))
            folders[path.parent] = folder.stat().st_dev, shutil.disk_usage(folder).free
        disk, free = folders[path.parent]
        disks[disk] = Space(size + (disks[disk].needed if disk in disks else 0), free)
    return min(disks.values(), key=lambda space: space.free - space.needed, default=None)


def check_space(sizes: Mapping[Path, int]) -> None:
    """Raises OutputError if outputs of these sizes cannot be sure to fit."""
    space = space_for(sizes)
    if space and space.needed > space.free:
        raise OutputError(
            f"the {len(sizes)} outputs may need {space.needed / 1e9:.2f} GB, if nothing shrinks, and "
            f"{space.free / 1e9:.2f} GB are free. --dry-run tells what they will need; recipes with size= need no more "
            "than they say; or do a part of the adapters first."
        )


def shown(output: Path) -> Path:
    """The path that reports name: the file, or the folder of a PEFT adapter."""
    return output.parent if output.name == peft.WEIGHTS_FILE else output
