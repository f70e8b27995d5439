"""What the header of a file tells about it."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lorashrink.adapters import looks_like_adapter, peft
from lorashrink.bases import norm_table, open_base
from lorashrink.errors import LorashrinkError, explained
from lorashrink.files.header import read_header
from lorashrink.files.metadata_keys import SOURCE
from lorashrink.files.store import open_file
from lorashrink.insight.inspection import inspect
from lorashrink.text import span_text

_STATISTICS = "lorashrink-statistics"  # the format that `calibrate` writes; its module would import torch
_PEEK = 300  # bytes of a .json file in which a norm table says what it is


def is_norm_table(path: Path) -> bool:
    """Whether a .json file is one of `base-norms`."""
    with contextlib.suppress(OSError), open_file(path) as handle:
        return norm_table.FORMAT.encode() in handle.read(_PEEK)
    return False


def facts_of(path: Path) -> Mapping[str, Any]:
    """The fields of an entry that its header tells."""
    try:
        if path.suffix == ".safetensors":
            tensors, metadata, _ = read_header(path)
            if metadata.get("format") == _STATISTICS:
                family = json.loads(metadata.get("base", "{}")).get("family")
                return {"state": "read", "kind": "statistics", "family": family}
            if not looks_like_adapter(tensors):
                return model_facts(path)
        elif not peft.is_folder(path):
            return model_facts(path)
        return adapter_facts(path)
    except Exception as error:  # whatever a file does, the others are read
        return {"state": "failed", "kind": "other", "error": str(explained(path, error))}


def model_facts(path: Path) -> Mapping[str, Any]:
    """The fields of a model or norm table, or of a file that is neither."""
    try:
        with open_base(path) as base:
            kind = "norms" if base.kind == "norms" else "model"
            return {"state": "read", "kind": kind, "family": base.family.name, "title": base.family.title}
    except LorashrinkError as error:
        return {"state": "read", "kind": "other", "error": str(error)}


def adapter_facts(path: Path) -> Mapping[str, Any]:
    """The fields of an adapter."""
    inspection = inspect(path, header=True)
    for failure in inspection.failed:
        return {"state": "failed", "kind": "other", "error": failure.error}
    (table,) = inspection.files
    ranks = [row.rank for row in table.layers]
    return {
        "state": "read",
        "kind": "adapter",
        "family": table.family,
        "algo": table.algo,
        "dtype": table.dtype,
        "layers": len(table.layers),
        "rank": span_text(ranks) if ranks else "",
        "highest_rank": max(ranks, default=0),
        "title": table.notes.get("title", ""),
        "trained_on": table.notes.get("base model", ""),
        "trigger": table.notes.get("trigger words", ""),
        "shrunk": SOURCE in table.metadata,
        "findings": tuple(finding.text for finding in table.health),
    }
