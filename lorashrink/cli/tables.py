"""Tables that fit the terminal: where it is narrow, columns that matter less are left out, and named below."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from lorashrink.text import printable

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderableType

# Columns of words; all others are numbers and stand to the right.
_WORDS = frozenset(("layer", "block", "file", "recipe", "algo", "flags", "kind"))

_GAP = 3  # characters between columns, and around the table
_NARROWEST = 40  # characters to which names are folded before other columns are left out


@dataclass
class TextTable:
    """A table of texts for a console.

    columns: the heads; the first column holds names, which are folded where they must be. extra: columns that can be
    left out, the first to stay longest. everything: none is left out.
    """

    columns: Sequence[str]
    extra: Sequence[str] = ()
    everything: bool = False
    rows: list[tuple[str, ...]] = field(default_factory=list)

    def add_row(self, *cells: str) -> None:
        """Add the cells of all columns, in their order."""
        assert len(cells) == len(self.columns)
        self.rows.append(cells)

    def shown(self, width: int) -> list[str]:
        """The columns that fit into so many characters; an extra one without numbers is left out anyway."""
        if self.everything:
            return list(self.columns)
        columns = [name for name in self.columns if name not in self.extra or self._says_something(name)]
        for name in reversed(self.extra):
            if name in columns and self._width(columns) > width:
                columns.remove(name)
        return columns

    def _says_something(self, column: str) -> bool:
        position = self.columns.index(column)
        return any(row[position] not in ("", "-") for row in self.rows)

    def _width(self, columns: Sequence[str]) -> int:
        """Characters of a table of these columns, the first one folded."""
        first, *others = (self._longest(name) for name in columns)
        return min(first, _NARROWEST) + sum(others) + _GAP * len(columns)

    def _longest(self, column: str) -> int:
        position = self.columns.index(column)
        return max(len(column), *(len(printable(row[position])) for row in self.rows), 0)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[RenderableType]:
        """What rich prints: the table, and a line about columns that are not in it."""
        from rich.box import SIMPLE
        from rich.table import Table

        shown = self.shown(options.max_width)
        table = Table(box=SIMPLE, pad_edge=False)
        for name in shown:
            if name in _WORDS or name == self.columns[0]:
                table.add_column(name, justify="left", overflow="fold")
            else:
                table.add_column(name, justify="right", overflow="ellipsis", no_wrap=True)
        positions = [self.columns.index(name) for name in shown]
        for row in self.rows:
            table.add_row(*(row[position] for position in positions))
        yield table
        if hidden := [name for name in self.columns if name not in shown and self._says_something(name)]:
            yield f"(-v shows more columns: {', '.join(hidden)})"
