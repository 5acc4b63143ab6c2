"""Ctrl-C and SIGTERM while training: the first one waits for the step's end, the second one has its usual effect."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from ditcli.progress import say


class _StopNow(KeyboardInterrupt):
    """Leaves what need not be finished."""


class Stop:
    """Whether the first Ctrl-C or SIGTERM was received."""

    received = False
    _leaving = False

    def may_leave(self, task: Callable[[], object]) -> None:
        """Do what a signal, also one that came before, breaks off."""
        try:
            self._leaving = True
            if self.received:
                raise _StopNow
            task()
            self._leaving = False
        except _StopNow:
            self._leaving = False

    def receive(self) -> None:
        """Note the signal, and leave what may be left."""
        self.received = True
        with suppress(RuntimeError):  # the signal came while something was being printed
            say("\nFinishing the step and saving; once more to stop at once.")
        if self._leaving:
            raise _StopNow


@contextmanager
def stop_signals() -> Iterator[Stop]:
    """Receive the first signal instead of being ended by it."""
    stop = Stop()

    def receive(number: int, frame: object) -> None:
        signal.signal(number, former[signal.Signals(number)])
        stop.receive()

    former = {number: signal.signal(number, receive) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)
