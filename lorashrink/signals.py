"""How signals end what runs."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

# SIGHUP, which Windows lacks, comes when a terminal is closed.
ENDING = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))


@contextlib.contextmanager
def handled(handler: Callable[..., Any], numbers: tuple[int, ...] = ENDING) -> Iterator[None]:
    """These signals go to the handler, but those that are ignored, as under nohup, and none outside the main thread.

    Afterwards they have their old handlers again, but those that the handler changed.
    """
    heard = [number for number in numbers if signal.getsignal(number) is not signal.SIG_IGN]
    if threading.current_thread() is not threading.main_thread():  # the only one that signals reach
        heard = []
    before = {number: signal.signal(number, handler) for number in heard}
    try:
        yield
    finally:
        for number, previous in before.items():
            if signal.getsignal(number) is handler and previous is not None:  # None: set by something else than Python
                signal.signal(number, previous)


@contextlib.contextmanager
def ended_by_signals() -> Iterator[None]:
    """The first signal to end is a KeyboardInterrupt in the main thread, and there is no second one."""

    def interrupt(*_: object) -> NoReturn:
        for number in ENDING:  # unfinished files are deleted now, and a second signal must not stop that
            signal.signal(number, signal.SIG_IGN)
        raise KeyboardInterrupt

    with handled(interrupt):
        yield
