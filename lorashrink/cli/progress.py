"""Progress bars on stderr."""

from __future__ import annotations

import contextlib
import sys
import threading
from collections.abc import Iterator
from typing import Any

from lorashrink.errors import Progress
from lorashrink.text import printable


@contextlib.contextmanager
def progress_bars(quiet: bool) -> Iterator[Progress | None]:
    """A function that draws one bar per text on stderr; None if nobody would see it."""
    if quiet or not sys.stderr.isatty():
        yield None
        return
    from rich import progress as bars
    from rich.console import Console
    from rich.table import Column
    from rich.text import Text

    class Rate(bars.ProgressColumn):
        def render(self, task: bars.Task) -> Text:
            return Text(f"{task.speed:.0f}/s" if task.speed else "")

    console = Console(stderr=True)
    # Of one width, so that bars do not jump from file to file.
    texts = Column(width=max(20, console.width // 2 - 5), no_wrap=True, overflow="ellipsis")
    columns = (
        bars.TextColumn("{task.description}", markup=False, table_column=texts),  # names of files may look like it
        bars.BarColumn(),
        bars.MofNCompleteColumn(),
        Rate(),
        bars.TimeRemainingColumn(),
    )
    with bars.Progress(*columns, console=console, transient=True) as display:
        tasks: dict[str, Any] = {}
        lock = threading.Lock()

        def report(text: str, done: int, total: int) -> None:
            with lock:  # called from several threads
                if text not in tasks:
                    tasks[text] = display.add_task(printable(text), total=total)
                display.update(tasks[text], completed=done)
                if done >= total:
                    display.remove_task(tasks.pop(text))

        yield report
