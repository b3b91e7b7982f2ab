"""SIGINT and SIGTERM of the step that launches a training: remembered, so that it can stop what it has started."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType


class Signals:
    """The first signal that arrived, 0 if none has, and how many; ``stopped`` is set with the first and stays."""

    def __init__(self) -> None:
        self.first = 0
        self.count = 0
        self.stopped = threading.Event()
        self._arrived = threading.Event()
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                signal.signal(number, self._handle)

    def sleep(self, seconds: float) -> None:
        """Until a signal arrives, but not longer."""
        self._arrived.wait(seconds)
        self._arrived.clear()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.first = self.first or number
        self.count += 1
        self.stopped.set()
        self._arrived.set()


@contextlib.contextmanager
def keep_signal_handlers() -> Iterator[None]:
    """Put the handlers back as they were."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
