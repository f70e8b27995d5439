"""Results of runs of any length: what is printed at the end lies in a temporary file until then."""

from __future__ import annotations

import csv
import io
import json
import tempfile
from collections.abc import Iterator
from dataclasses import fields
from typing import TYPE_CHECKING

import typer

from lorashrink.cli.printing import cells
from lorashrink.results.shown import plain

if TYPE_CHECKING:
    from lorashrink.results.shrinking import FileResult, Report

# The most files that get a line each in a summary without -v.
LINES = 40


class Gathered:
    """Results of `resize` as they come; memory holds the first ones, or all of them if every file is listed."""

    def __init__(self, *, as_json: bool, as_csv: bool, everything: bool) -> None:
        self.listed: list[FileResult] = []
        self.warnings = 0  # of files that are not listed
        self._everything = everything
        self._json = _Spool() if as_json else None
        self._csv = _Spool() if as_csv else None

    def add(self, result: FileResult) -> None:
        """Take a result, in any order."""
        if self._json:
            self._json.put(result.output, json.dumps(plain(result), allow_nan=False).encode())
        if self._csv:
            text = io.StringIO(newline="")
            rows = ({"output": result.output, **plain(layer)} for layer in result.layers)
            csv.writer(text).writerows(cells(row).values() for row in rows)
            self._csv.put(result.output, text.getvalue().encode())
        if self._json is None and (self._everything or len(self.listed) < LINES):
            self.listed.append(result)
        else:
            self.warnings += len(result.warnings)

    def print_json(self, report: Report) -> None:
        """One document, equal to the whole report's."""
        assert self._json
        typer.echo('{"command": "resize"', nl=False)
        for field in fields(report):
            typer.echo(f', "{field.name}": ', nl=False)
            if field.name == "results":
                typer.echo("[", nl=False)
                for index, result in enumerate(report.results):
                    typer.echo(", " * bool(index) + self._json.get(result.output).decode(), nl=False)
                typer.echo("]", nl=False)
            else:
                typer.echo(json.dumps(plain(getattr(report, field.name)), allow_nan=False), nl=False)
        typer.echo("}")

    def csv(self, report: Report) -> Iterator[bytes]:
        """The pieces of a table with a line for each layer."""
        from lorashrink.results.shrinking import LayerResult

        assert self._csv
        yield ",".join(["output", *(field.name for field in fields(LayerResult))]).encode() + b"\r\n"
        for result in report.results:
            yield self._csv.get(result.output)

    def __enter__(self) -> Gathered:
        return self

    def __exit__(self, *exc: object) -> None:
        for spool in filter(None, (self._json, self._csv)):
            spool.close()


class _Spool:
    """Pieces of text in a file without a name, each with a key."""

    def __init__(self) -> None:
        self._file = tempfile.TemporaryFile()  # noqa: SIM115 - closed with what it belongs to
        self._spans: dict[str, tuple[int, int]] = {}

    def put(self, key: str, text: bytes) -> None:
        self._spans[key] = (self._file.seek(0, io.SEEK_END), len(text))
        self._file.write(text)

    def get(self, key: str) -> bytes:
        start, length = self._spans[key]
        self._file.seek(start)
        return self._file.read(length)

    def close(self) -> None:
        self._file.close()
