"""Files that other programs keep beside an adapter: previews, and notes on it."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

from lorashrink.errors import OutputError
from lorashrink.files.disk import sha256_file, write_bytes
from lorashrink.text import json_in

_NOTES = ".metadata.json"  # LoRA Manager's
_PREVIEWS = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".mp4")
_ENDINGS = (
    *(f".preview{ending}" for ending in _PREVIEWS),
    *_PREVIEWS,
    *(".civitai.info", _NOTES, ".json", ".txt", ".yaml", ".description.txt"),
)


def sidecars(source: Path, output: Path, *, overwrite: bool = False) -> Iterator[tuple[Path, Path]]:
    """The files beside an adapter that belong to it, with the names of their copies beside the output.

    Those whose copies exist are left out without `overwrite`.
    """
    if os.path.isdir(source):
        return
    for ending in _ENDINGS:
        sidecar, copy = source.with_suffix(ending), output.with_suffix(ending)
        if sidecar.is_file() and sidecar != copy and (overwrite or not os.path.lexists(copy)):
            yield sidecar, copy


def copy_sidecar(sidecar: Path, copy: Path, output: Path) -> None:
    """Copy a file that lies beside an adapter to its smaller version `output`, which exists. Raises OutputError."""
    try:
        data = sidecar.read_bytes()
    except OSError as error:
        raise OutputError(f"{sidecar}: cannot be copied ({error.strerror or error}).") from error
    write_bytes(copy, _notes_on(output, data) if copy.name.endswith(_NOTES) else data)


def _notes_on(output: Path, data: bytes) -> bytes:
    """LoRA Manager's notes, corrected for the output: it trusts the name, size and hash in them."""
    notes = json_in(data)
    if not isinstance(notes, dict):
        return data
    for key in ("preview_url", "file_path"):
        if isinstance(notes.get(key), str):
            old = Path(notes[key])
            ending = "".join(old.suffixes[-2:]) if ".preview" in old.suffixes else old.suffix
            notes[key] = str(output.with_name(output.stem + ending))
    own = {"file_name": output.stem, "size": output.stat().st_size, "sha256": sha256_file(output)}
    notes |= {key: value for key, value in own.items() if key in notes}
    return json.dumps(notes, indent=2, ensure_ascii=False).encode()
