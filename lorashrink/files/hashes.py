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
    that file, so the length of its header matters. Nothing is hashed if the metadata has no placeholders.
    """

    def __init__(self, metadata: Mapping[str, str], tensors: Arrangement) -> None:
        self._metadata = metadata
        self._digest = hashlib.sha256() if metadata.keys() & _PLACEHOLDERS.keys() else None
        training = {key: value for key, value in metadata.items() if key.startswith("ss_")}
        header = tensors.header(training) if self._digest else b""
        self._window, self._position = bytearray(header[_LEGACY_START : _LEGACY_START + _LEGACY_BYTES]), len(header)

    @property
    def needed(self) -> bool:
        """Whether the metadata has placeholders."""
        return self._digest is not None

    def update(self, data: bytes | memoryview) -> None:
        """Take the next bytes."""
        if self._digest:
            self._digest.update(data)
            begin = max(_LEGACY_START - self._position, 0)
            end = max(_LEGACY_START + _LEGACY_BYTES - self._position, 0)
            self._window += data[begin:end]
            self._position += len(data)

    def metadata(self) -> dict[str, str]:
        """The metadata with the hashes of all bytes so far."""
        if self._digest is None:
            return dict(self._metadata)
        digest = self._digest.hexdigest()
        legacy = hashlib.sha256(self._window).hexdigest()[:8]
        hashes = {MODEL_HASH: digest, LEGACY_HASH: legacy, SPEC_HASH: "0x" + digest}
        return {key: hashes.get(key, text) for key, text in self._metadata.items()}


def with_hashes(
    metadata: Mapping[str, str], tensors: Arrangement, data: Iterable[bytes | memoryview]
) -> dict[str, str]:
    """`metadata` with the placeholders replaced; `data` are all bytes behind the header."""
    hashes = Hashes(metadata, tensors)
    for chunk in data:
        hashes.update(chunk)
    return hashes.metadata()
