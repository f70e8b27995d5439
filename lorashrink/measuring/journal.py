"""What has been measured, a line of JSON for each measurement, so that a rerun goes on where the last one stopped."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lorashrink.errors import InputError
from lorashrink.files.disk import as_output_error

NAME = "measured.jsonl"


class Journal:
    """The measurements of a folder. A line that is cut short is as if it were not there."""

    def __init__(self, folder: Path) -> None:
        """Raises InputError if the file cannot be read."""
        self.path = folder / NAME
        self._entries: dict[str, dict[str, Any]] = {}
        try:
            text = self.path.read_text(encoding="utf-8", errors="replace") if self.path.exists() else ""
        except OSError as error:
            raise InputError(f"{self.path}: cannot be read ({error.strerror or error}).") from error
        self._broken = bool(text) and not text.endswith("\n")
        for line in text.splitlines():
            try:
                entry = json.loads(line)
                self._entries[str(entry["key"])] = dict(entry["value"])
            except (ValueError, KeyError, TypeError, RecursionError):
                continue

    def __len__(self) -> int:
        return len(self._entries)

    def get(self, key: str) -> Mapping[str, Any] | None:
        """What was measured under a key, None if nothing was."""
        return self._entries.get(key)

    def add(self, key: str, value: Mapping[str, Any]) -> None:
        """Write a measurement down, in one step. Raises OutputError."""
        line = json.dumps({"key": key, "value": value}, allow_nan=False) + "\n"
        with as_output_error(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            number = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
            try:
                os.write(number, (("\n" if self._broken else "") + line).encode())
                os.fsync(number)
            finally:
                os.close(number)
        self._broken = False
        self._entries[key] = dict(value)

    def others(self, name: str, scope: str) -> int:
        """How many measurements of an adapter of this name belong to another scope: to other contents or prompts."""
        return sum(key.split("|")[0] == name and key.split("|")[1] != scope for key in self._entries)
