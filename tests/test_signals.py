"""Signals: who gets them, and who does not."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from lorashrink.signals import ENDING, ended_by_signals, handled

NUMBER = signal.SIGTERM


@pytest.fixture(autouse=True)
def restored() -> Iterator[None]:
    before = {number: signal.getsignal(number) for number in ENDING}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def test_a_handler_gets_signals_for_as_long_as_asked_for() -> None:
    caught: list[int] = []
    before = signal.getsignal(NUMBER)
    with handled(lambda number, frame: caught.append(number), (NUMBER,)):
        os.kill(os.getpid(), NUMBER)
    assert caught == [NUMBER]
    assert signal.getsignal(NUMBER) is before


def test_ignored_signals_stay_ignored() -> None:
    """As under nohup."""
    signal.signal(NUMBER, signal.SIG_IGN)
    with handled(lambda number, frame: None, (NUMBER,)):
        assert signal.getsignal(NUMBER) is signal.SIG_IGN


def test_other_threads_change_no_handler() -> None:
    before = signal.getsignal(NUMBER)

    def inside() -> object:
        with handled(lambda number, frame: None, (NUMBER,)):
            return signal.getsignal(NUMBER)

    with ThreadPoolExecutor(1) as threads:
        assert threads.submit(inside).result() is before


def test_the_first_signal_interrupts_and_a_second_one_is_ignored() -> None:
    with pytest.raises(KeyboardInterrupt), ended_by_signals():
        os.kill(os.getpid(), NUMBER)
    os.kill(os.getpid(), NUMBER)
