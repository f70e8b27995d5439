"""How small the adapters of a library could be: found out in the background, when nobody waits for anything else."""

from __future__ import annotations

import contextlib
import threading
from collections import deque
from collections.abc import Callable, Sequence

from lorashrink.errors import InputError, explained
from lorashrink.ui.library import Entry, Library, Saving
from lorashrink.ui.measuring import saving

_LOOK_SECONDS = 1.0  # after which headers that were read meanwhile are a reason to go on
_PAUSE_SECONDS = 0.2  # before it is looked again whether somebody waits


class Savings:
    """Measures one adapter after the other while nothing is `busy`. Safe to use from several threads."""

    def __init__(self, library: Library, busy: Callable[[], bool]) -> None:
        self._library, self._busy = library, busy
        self._first: deque[str] = deque()  # ids, those that are on the screen first
        self._everything = False
        self._lock = threading.Lock()
        self._requested, self._stopped = threading.Event(), threading.Event()

    def request(self, identities: Sequence[str], *, everything: bool) -> None:
        """Measure these adapters, or these and then all; drops earlier requests."""
        with self._lock:
            self._first, self._everything = deque(identities), everything
        self._requested.set()

    def run(self) -> None:
        """Measure what was requested, until `stop`. Runs in a thread of its own."""
        while not self._stopped.is_set():
            self._requested.wait(_LOOK_SECONDS)
            self._requested.clear()
            while not self._stopped.is_set():
                if self._busy():
                    self._stopped.wait(_PAUSE_SECONDS)
                    continue
                with self._lock:
                    first, everything = self._first, self._everything
                entry = None
                while first and entry is None:
                    with contextlib.suppress(InputError):  # it was deleted meanwhile
                        requested = self._library.get(first.popleft())
                        entry = requested if _unmeasured(requested) else None
                if entry is None and everything:
                    entry = next(filter(_unmeasured, self._library.entries()), None)
                if entry is None:
                    break
                try:
                    path = self._library.get(entry.id).path  # which may lead out of the folders by now
                    self._library.update(entry.id, saving=Saving(**saving(path)))
                except Exception as error:
                    self._library.update(entry.id, saving_error=str(explained(entry.path, error)))

    def stop(self) -> None:
        """End `run` after the adapter that is being measured."""
        self._stopped.set()
        self._requested.set()


def _unmeasured(entry: Entry) -> bool:
    return entry.kind == "adapter" and entry.layers > 0 and not (entry.shrunk or entry.saving or entry.saving_error)
