"""How a run ends early: with a state to resume from."""

from __future__ import annotations

import contextlib
import logging
import signal
from types import FrameType, TracebackType
from typing import Any

_log = logging.getLogger(__name__)

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupted(KeyboardInterrupt):
    """The run ended early, and its state is saved; the text says where."""


class Ending:
    """While it is entered, the first SIGINT or SIGTERM is a request, and the second a KeyboardInterrupt."""

    def __init__(self) -> None:
        self.requested = False
        self._handlers: dict[signal.Signals, Any] = {}

    def __enter__(self) -> None:
        with contextlib.suppress(ValueError):  # signals reach the main thread only
            for number in _SIGNALS:
                if signal.getsignal(number) is not signal.SIG_IGN:  # nohup and background jobs ignore them
                    self._handlers[number] = signal.signal(number, self._request)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    def _request(self, number: int, frame: FrameType | None) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True
        _log.warning("the run ends after this step and saves its state; a second signal ends it at once")
