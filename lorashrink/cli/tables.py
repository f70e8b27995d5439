"""Tables that fit the terminal: where it is narrow, columns that matter less are left out, and named below."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from lorashrink.text import printable

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderableType

Row = TypeVar("Row")

# Columns of words; all others are numbers and stand to the right.
_WORDS = frozenset(("layer", "block", "file", "recipe", "algo", "flags", "kind"))

_GAP = 3  # characters between columns, and around the table
_NARROWEST = 40  # characters to which names are folded before other columns are left out


@dataclass
class TextTable:
    """A table of texts for a console.

    columns: head -> its cells; the first column holds names, which are folded where they must be. extra: columns that
    can be left out, the first to stay longest. everything: none is left out.
    """

    columns: Mapping[str, Sequence[str]]
    extra: Sequence[str] = ()
    everything: bool = False

    def shown(self, width: int) -> list[str]:
        """The columns that fit into so many characters; an extra one without numbers is left out anyway."""
        if self.everything:
            return list(self.columns)
        columns = [name for name in self.columns if name not in self.extra or self._says_something(name)]
        widths = {name: max(len(printable(text)) for text in (name, *self.columns[name])) for name in columns}
        for first in columns[:1]:  # which is folded
            widths[first] = min(widths[first], _NARROWEST)
        for name in reversed(self.extra):
            if name in columns and sum(widths[column] + _GAP for column in columns) > width:
                columns.remove(name)
        return columns

    def _says_something(self, column: str) -> bool:
        return any(cell not in ("", "-") for cell in self.columns[column])

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[RenderableType]:
        """What rich prints: the table, and a line about columns that are not in it."""
        from rich.box import SIMPLE
        from rich.table import Table

        shown = self.shown(options.max_width)
        table = Table(box=SIMPLE, pad_edge=False)
        for position, name in enumerate(shown):
            if name in _WORDS or position == 0:
                table.add_column(name, justify="left", overflow="fold")
            else:
                table.add_column(name, justify="right", overflow="ellipsis", no_wrap=True)
        for cells in zip(*(self.columns[name] for name in shown), strict=True):
            table.add_row(*cells)
        yield table
        if hidden := [name for name in self.columns if name not in shown and self._says_something(name)]:
            yield f"(-v shows more columns: {', '.join(hidden)})"


def table_of(
    rows: Iterable[Row],
    columns: Mapping[str, Callable[[Row], str]],
    *,
    extra: Sequence[str] = (),
    everything: bool = False,
) -> TextTable:
    """A table with a line for each row; `columns` has the head of each column, and its text for a row."""
    rows = list(rows)
    return TextTable({head: [text(row) for row in rows] for head, text in columns.items()}, extra, everything)
