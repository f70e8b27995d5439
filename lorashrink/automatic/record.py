"""The record of an output folder: what became of each adapter, so that a rerun goes on where the last one stopped.

Outputs tell what they were made from, and without a record they are made again, so a damaged line does no harm.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

from lorashrink.adapters import open_adapter
from lorashrink.automatic.collecting import Item
from lorashrink.results.automatic import Shrunk
from lorashrink.shrinking.journal import stamps
from lorashrink.shrinking.outputs import shown, source_files
from lorashrink.sums.summing import contents_sha256
from lorashrink.text import json_in

_log = logging.getLogger(__name__)

NAME = ".lorashrink-shrunk.jsonl"

# Fields that depend on where things lie, or are drawn from kept pictures, and are not read from a file.
_NOT_KEPT = ("input", "output", "pictures", "state_dict", "metadata")


class Record:
    """The record of one output folder, for one request."""

    def __init__(self, folder: Path, request: str) -> None:
        self._path, self._request = folder / NAME, request
        self._entries: dict[str, dict[str, Any]] = {}
        text = ""
        with contextlib.suppress(OSError):
            text = self._path.read_text(encoding="utf-8", errors="replace")
        for entry in map(json_in, text.splitlines()):
            is_entry = isinstance(entry, dict) and {"name", "result", "output"} <= entry.keys()
            if is_entry and entry.get("request") == request:
                self._entries[str(entry["name"])] = entry

    def result(self, item: Item) -> Shrunk | None:
        """What an equal run made of the adapter as it is now; None if there was none, or its output has changed."""
        entry = self._entries.get(item.name)
        if entry is None or entry["output"] != _stamp(item.output):
            return None
        if not entry.get("source") or entry["source"] != source_stamp(item):
            with open_adapter(item.source) as adapter:
                if entry.get("sha256") != contents_sha256(adapter):
                    return None
        try:
            values = {
                field.name: entry["result"][field.name] for field in fields(Shrunk) if field.name not in _NOT_KEPT
            }
            lists = {key: tuple(value) for key, value in values.items() if isinstance(value, list)}
            output = str(shown(item.output)) if entry["output"] else None
            result = Shrunk(input=str(item.source), output=output, **{**values, **lists})
            return result if _is_sound(result) else None
        except (KeyError, TypeError):
            return None

    def add(self, item: Item, result: Shrunk, before: object, sha256: str) -> None:
        """Write down a result; stamp and hash are the source's, the stamp from before it was read."""
        entry = {
            "name": item.name,
            "request": self._request,
            "source": before,
            "sha256": sha256,
            "output": _stamp(item.output) if result.output else None,
            "result": {key: value for key, value in asdict(result).items() if key not in _NOT_KEPT},
        }
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with open(self._path, "a", encoding="utf-8") as handle:
                handle.write(json.dumps(entry) + "\n")
        except OSError as error:  # costs a rerun time and nothing else
            _log.warning("%s: a rerun begins anew, because this cannot be written (%s)", self._path, error.strerror)


def source_stamp(item: Item) -> list[list[object]]:
    """Sizes and times of an adapter's files, as JSON has them; [] if they were changed just now."""
    return [list(stamp) for stamp in stamps(source_files(item.source))]


def _stamp(path: Path) -> list[int] | None:
    try:
        stat = os.stat(path)
    except OSError:
        return None
    return [stat.st_size, stat.st_mtime_ns]


def _is_sound(result: Shrunk) -> bool:
    """Whether the numbers of a recorded result can be printed and compared."""
    numbers = (result.bytes_before, result.bytes_after, result.relative_error)
    levels = (result.predicted_db, result.worst_picture_db)
    lists = (result.loads_in or (), result.warnings, result.details)
    return (
        all(isinstance(number, int | float) and number >= 0 for number in numbers)
        and result.bytes_before > 0
        and all(level is None or isinstance(level, int | float) for level in levels)
        and all(isinstance(text, str) for text in (result.method, result.why, result.recipe, result.dtype))
        and all(isinstance(texts, tuple) and all(isinstance(text, str) for text in texts) for texts in lists)
        and (result.skipped is None or isinstance(result.skipped, str))
    )


def as_earlier(result: Shrunk) -> Shrunk:
    """A result of an earlier run in the report of this one."""
    return result if result.skipped else replace(result, skipped="made by an earlier run")
