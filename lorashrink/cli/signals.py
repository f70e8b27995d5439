"""How signals end a command."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator
from typing import Any, NoReturn

_ENDING = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]


@contextlib.contextmanager
def ended_by_signals() -> Iterator[None]:
    """The first signal to end is a KeyboardInterrupt in the main thread, and there is no second one."""

    def interrupt(*_: object) -> NoReturn:
        for number in _ENDING:  # unfinished files are deleted now, and a second signal must not stop that
            signal.signal(number, signal.SIG_IGN)
        raise KeyboardInterrupt

    before: dict[int, Any] = {number: signal.getsignal(number) for number in _ENDING}
    heard = [number for number in _ENDING if before[number] is not signal.SIG_IGN]  # under nohup not all of them
    try:
        with contextlib.suppress(ValueError):  # not in the main thread
            for number in heard:
                signal.signal(number, interrupt)
        yield
    except KeyboardInterrupt:
        before.clear()  # the rest of the way out is not interrupted either
        raise
    finally:
        with contextlib.suppress(ValueError, TypeError):
            for number, handler in before.items():
                signal.signal(number, handler)
