"""Hashes of model files in the conventions of their metadata."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping

from lorashrink.files.store import TensorInfo
from lorashrink.files.writing import header_bytes

MODEL_HASH, LEGACY_HASH = "sshs_model_hash", "sshs_legacy_hash"

SPEC_HASH = "modelspec.hash_sha256"

# What the old addnet hash reads: 64 KiB at 1 MiB.
_LEGACY_WINDOW = (0x100000, 0x10000)

_PLACEHOLDERS = {MODEL_HASH: "0" * 64, LEGACY_HASH: "0" * 8, SPEC_HASH: "0x" + "0" * 64}


def with_placeholders(metadata: Mapping[str, str]) -> dict[str, str]:
    """`metadata` with placeholders for those hashes of the contents that it has."""
    return {key: _PLACEHOLDERS.get(key, text) for key, text in metadata.items()}


def with_hashes(
    metadata: Mapping[str, str], tensors: Mapping[str, TensorInfo], data: Callable[[], Iterable[bytes]]
) -> dict[str, str]:
    """`metadata` with the placeholders replaced. `data()` yields the bytes behind the header.

    sd-scripts hashes a re-save that keeps only the `ss_*` entries; the legacy hash reads at a fixed place of
    that file, so the length of its header matters.
    """
    training = {key: value for key, value in metadata.items() if key.startswith("ss_")}
    header = header_bytes(tensors, training)
    start, length = _LEGACY_WINDOW
    window, place = bytearray(header[start : start + length]), len(header)
    digest = hashlib.sha256()
    for chunk in data():
        digest.update(chunk)
        begin, end = max(start - place, 0), max(start + length - place, 0)
        window += chunk[begin:end]
        place += len(chunk)
    hashes = {
        MODEL_HASH: digest.hexdigest(),
        LEGACY_HASH: hashlib.sha256(window).hexdigest()[:8],
        SPEC_HASH: "0x" + digest.hexdigest(),
    }
    return {key: hashes.get(key, text) for key, text in metadata.items()}
