"""How results look in Python: a short `repr`, tables for pandas and notebooks, and plain data."""

from __future__ import annotations

import dataclasses
import html
import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from lorashrink.errors import UsageError

# Marks a field that is no plain data.
NOT_PLAIN = {"plain": False}

_LONGEST = 60  # characters of a text in a repr
_FEW = 3  # entries that a repr lists
_ROWS = 50  # of a table in a notebook


def plain(value: Any) -> Any:
    """The value as JSON holds it: dataclasses and mappings as dictionaries, NaN and infinity as None."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = (field for field in dataclasses.fields(value) if field.metadata != NOT_PLAIN)
        return {field.name: plain(getattr(value, field.name)) for field in fields}
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


class Shown:
    """A result that is a frozen dataclass."""

    __slots__ = ()
    table: ClassVar[str] = ""  # the field whose items are the rows of its table; "": the result itself is one row

    def to_dict(self) -> dict[str, Any]:
        """The result as plain data, as `--json` prints it."""
        result: dict[str, Any] = plain(self)
        return result

    def to_pandas(self) -> Any:
        """Its table as a pandas DataFrame. Raises UsageError if pandas is not installed."""
        try:
            import pandas
        except ImportError as error:
            raise UsageError("to_pandas: needs pandas; pip install pandas") from error
        return pandas.DataFrame(self._rows())

    def _rows(self) -> list[dict[str, Any]]:
        items = getattr(self, self.table) if self.table else [self]
        return [plain(item) for item in items]

    def __repr__(self) -> str:
        values = ((field.name, getattr(self, field.name)) for field in dataclasses.fields(self))  # type: ignore[arg-type]
        texts = (f"{name}={_short(value)}" for name, value in values if value not in (None, (), {}, ""))
        return f"{type(self).__name__}({', '.join(texts)})"

    def _repr_html_(self) -> str:
        rows = self._rows()
        columns = list(rows[0]) if rows else []
        head = "".join(f"<th>{html.escape(name)}</th>" for name in columns)
        body = "".join(
            "<tr>" + "".join(f"<td>{html.escape(_short(row[name]))}</td>" for name in columns) + "</tr>"
            for row in rows[:_ROWS]
        )
        more = f"<p>and {len(rows) - _ROWS} more</p>" if len(rows) > _ROWS else ""
        return f"<p>{html.escape(repr(self))}</p><table><tr>{head}</tr>{body}</table>{more}"


def _short(value: Any) -> str:
    """The value on a part of a line."""
    if isinstance(value, str):
        return value if len(value) <= _LONGEST else f"{value[: _LONGEST - 1]}…"
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, Mapping):
        return f"<{len(value)}>"
    if isinstance(value, Sequence):
        small = len(value) <= _FEW and not any(dataclasses.is_dataclass(item) for item in value)
        return f"({', '.join(map(_short, value))})" if small else f"<{len(value)}>"
    return str(value) if isinstance(value, (int, type(None))) else repr(value)[:_LONGEST]
