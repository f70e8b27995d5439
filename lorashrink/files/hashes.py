"""Hashes of model files in the conventions of their metadata."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping
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


def with_hashes(
    metadata: Mapping[str, str], tensors: Arrangement, data: Callable[[], Iterable[bytes | memoryview]]
) -> dict[str, str]:
    """`metadata` with the placeholders replaced. `data()` yields the bytes behind the header.

    sd-scripts hashes a re-save that keeps only the `ss_*` entries. The legacy hash reads at a fixed position of
    that file, so the length of its header matters. Nothing is read if the metadata has no hashes.
    """
    if not metadata.keys() & _PLACEHOLDERS.keys():
        return dict(metadata)
    training = {key: value for key, value in metadata.items() if key.startswith("ss_")}
    header = tensors.header(training)
    window, position = bytearray(header[_LEGACY_START : _LEGACY_START + _LEGACY_BYTES]), len(header)
    digest = hashlib.sha256()
    for chunk in data():
        digest.update(chunk)
        begin, end = max(_LEGACY_START - position, 0), max(_LEGACY_START + _LEGACY_BYTES - position, 0)
        window += chunk[begin:end]
        position += len(chunk)
    hashes = {
        MODEL_HASH: digest.hexdigest(),
        LEGACY_HASH: hashlib.sha256(window).hexdigest()[:8],
        SPEC_HASH: "0x" + digest.hexdigest(),
    }
    return {key: hashes.get(key, text) for key, text in metadata.items()}
