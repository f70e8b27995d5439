"""Hashes of model files in the conventions of their metadata."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path

from lorashrink.files.header import Arrangement

MODEL_HASH, LEGACY_HASH, SPEC_HASH = "sshs_model_hash", "sshs_legacy_hash", "modelspec.hash_sha256"

# The legacy hash reads 64 KiB at 1 MiB.
_LEGACY_START, _LEGACY_BYTES = 0x100000, 0x10000

_PLACEHOLDERS = {MODEL_HASH: "0" * 64, LEGACY_HASH: "0" * 8, SPEC_HASH: "0x" + "0" * 64}


def legacy_hash(path: Path) -> str:
    """The legacy hash of a file, which is that of a base or VAE in metadata."""
    with open(path, "rb") as file:
        file.seek(_LEGACY_START)
        return hashlib.sha256(file.read(_LEGACY_BYTES)).hexdigest()[:8]


def with_placeholders(metadata: Mapping[str, str]) -> dict[str, str]:
    """`metadata` with placeholders for those hashes of the contents that it has."""
    return {key: _PLACEHOLDERS.get(key, text) for key, text in metadata.items()}


class Hashes:
    """Replaces the placeholders in metadata, from the bytes behind the header as they come.

    sd-scripts hashes a re-save that keeps only the `ss_*` entries. The legacy hash reads at a fixed position of
    that file, so the length of its header matters. `needed` is False if the metadata has no placeholders.
    """

    def __init__(self, metadata: Mapping[str, str], tensors: Arrangement) -> None:
        self.needed = bool(metadata.keys() & _PLACEHOLDERS.keys())
        self._metadata = metadata
        self._digest = hashlib.sha256()
        header = tensors.header({key: value for key, value in metadata.items() if key.startswith("ss_")})
        self._window, self._position = bytearray(header[_LEGACY_START : _LEGACY_START + _LEGACY_BYTES]), len(header)

    def update(self, data: bytes | bytearray | memoryview) -> None:
        """Take the next bytes."""
        self._digest.update(data)
        begin, end = (max(edge - self._position, 0) for edge in (_LEGACY_START, _LEGACY_START + _LEGACY_BYTES))
        self._window += data[begin:end]
        self._position += len(data)

    def metadata(self) -> dict[str, str]:
        """The metadata with the hashes of all bytes so far."""
        digest = self._digest.hexdigest()
        legacy = hashlib.sha256(self._window).hexdigest()[:8]
        hashes = {MODEL_HASH: digest, LEGACY_HASH: legacy, SPEC_HASH: "0x" + digest}
        return {key: hashes.get(key, text) for key, text in self._metadata.items()}


def with_hashes(
    metadata: Mapping[str, str], tensors: Arrangement, data: Iterable[bytes | memoryview]
) -> dict[str, str]:
    """`metadata` with the placeholders replaced; `data` are all bytes behind the header.

    Without placeholders nothing is read.
    """
    hashes = Hashes(metadata, tensors)
    for chunk in data if hashes.needed else ():
        hashes.update(chunk)
    return hashes.metadata()
