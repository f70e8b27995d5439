"""How the code reads, in figures: `python benchmarks/code_figures.py [FOLDER ...]`. A mirror, not a gate.

For each folder: lines of Python, functions, their median length and the longest ones (without docstrings), private
helpers that are used once, those of them that are not called but passed on (as a callback, in a table), and how many of
the bound names are words that say nothing.
"""

from __future__ import annotations

import ast
import statistics
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parents[1]
FOLDERS = ("lorashrink", "train", "plots")
GENERIC = frozenset(
    "each found place one other told given known asked made left there said wanted whole both".split()  # noqa: SIM905
)
LONG = 60  # lines


@dataclass
class Figures:
    """Counts over the Python files of a folder."""

    lines: int = 0
    lengths: list[int] = field(default_factory=list)  # of functions, in lines without their docstrings
    helpers: Counter[tuple[str, str]] = field(default_factory=Counter)  # (file, private function) -> uses
    called: set[tuple[str, str]] = field(default_factory=set)  # (file, name) of what is called there
    bound: Counter[str] = field(default_factory=Counter)  # names bound by assignments, loops and parameters

    def add(self, path: Path) -> None:
        """Count one file."""
        text = path.read_text(encoding="utf-8")
        tree = ast.parse(text)
        self.lines += text.count("\n")
        uses = Counter(_names_used(tree))
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name | ast.Attribute):
                self.called.add((str(path), node.func.id if isinstance(node.func, ast.Name) else node.func.attr))
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                self.lengths.append(_length(node))
            elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                self.bound[node.id] += 1
            elif isinstance(node, ast.arg):
                self.bound[node.arg] += 1
            if isinstance(node, ast.FunctionDef) and node.name.startswith("_") and not node.name.endswith("__"):
                self.helpers[str(path), node.name] = uses[node.name]

    def __str__(self) -> str:
        long = sum(length > LONG for length in self.lengths) / max(1, len(self.lengths))
        single = {helper for helper, count in self.helpers.items() if count == 1}
        once, passed_on = (len(group) / max(1, len(self.helpers)) for group in (single, single - self.called))
        generic = sum(self.bound[word] for word in GENERIC) / max(1, self.bound.total())
        functions, median = len(self.lengths), statistics.median(self.lengths or [0])
        return (
            f"{self.lines:6d} lines  {functions:4d} functions, median {median:g} lines, {long:.1%} above {LONG}  "
            f"private helpers used once {once:.0%} ({passed_on:.0%} passed on)  generic names {generic:.2%}"
        )


def _names_used(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load):
            yield node.id
        elif isinstance(node, ast.Attribute):
            yield node.attr


def _length(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    first = function.body[1] if ast.get_docstring(function) and len(function.body) > 1 else function.body[0]
    end = function.end_lineno
    assert end is not None
    return end - first.lineno + 1


def main(folders: list[str]) -> None:
    """Print a line for each folder and one for all of them."""
    total = Figures()
    width = max(len(folder) for folder in [*folders, "total"])
    for folder in folders:
        figures = Figures()
        for path in sorted((ROOT / folder).rglob("*.py")):
            figures.add(path)
            total.add(path)
        print(f"{folder:{width}}  {figures}")
    print(f"{'total':{width}}  {total}")


if __name__ == "__main__":
    main(sys.argv[1:] or list(FOLDERS))
