"""Print the progress of long work as plain lines: work done, rate, and time left.

It prints lines, not a bar that redraws itself, because pipelines and log files consist of lines.
"""

from __future__ import annotations

import sys
import threading
import time
from collections import deque
from types import TracebackType
from typing import Self, TextIO

RATE_WINDOW_SECONDS = 30.0  # window over which the rate is measured
STARTUP_SECONDS = 5.0  # a first unit that is done earlier says nothing about the rate: it took as long as the start


class ProgressLine:
    """Prints at most one line every ``interval`` seconds.

    >>> with ProgressLine(1600, unit="images", label="prepare") as progress:
    ...     for image in images:
    ...         progress.update(1)
    prepare  1,024/1,600 images  64 %  512/s  0:01 left

    Args:
        total: units of work; None if not known.
        unit: name of the unit, in the plural.
        label: name of the work, the first word of every line.
        initial: units done by an earlier attempt.
        interval: shortest time between two lines, seconds.
        stream: output stream; None: standard output.
    """

    def __init__(
        self,
        total: int | None,
        unit: str = "images",
        label: str = "",
        *,
        initial: int = 0,
        interval: float = 2.0,
        stream: TextIO | None = None,
    ) -> None:
        self.total, self.unit, self.label, self.done = total, unit, label, initial
        self._interval, self._stream = interval, stream
        self._figures: dict[str, float | int | str] = {}
        self._lock = threading.Lock()
        self._start = time.monotonic()
        self._initial = initial
        self._history: deque[tuple[float, int]] = deque([(self._start, initial)])
        self._last_line = float("-inf")  # the first update prints at once
        self._closed = False

    def update(self, n: int = 1, **figures: float | int | str) -> None:
        """Count ``n`` more units; show ``figures`` until their next update (names with spaces instead of ``_``)."""
        with self._lock:
            self.done += n
            self._figures.update(figures)
            now = time.monotonic()
            if now - self._last_line >= self._interval:
                if self._last_line == float("-inf") and now - self._start < STARTUP_SECONDS:
                    self._history.clear()
                self._record(now)
                self._print(now)

    def close(self) -> None:
        """Print the last line, with the total time. Further calls do nothing."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            self._print(time.monotonic(), last=True)

    def rate(self) -> float:
        """Return the units per second over the last :data:`RATE_WINDOW_SECONDS`."""
        then, done = self._history[0]
        seconds = time.monotonic() - then
        return (self.done - done) / seconds if seconds > 0 else 0.0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:  # after an error, the error should be the last line
            self.close()

    def _record(self, now: float) -> None:
        self._history.append((now, self.done))
        while len(self._history) > 2 and now - self._history[0][0] > RATE_WINDOW_SECONDS:
            self._history.popleft()

    def _print(self, now: float, last: bool = False) -> None:
        self._last_line = now
        parts = [self.label] if self.label else []
        if self.total is None:
            parts.append(f"{self.done:,} {self.unit}")
        else:
            share = 100 * self.done // self.total if self.total else 100
            parts += [f"{self.done:,}/{self.total:,} {self.unit}", f"{share} %"]
        parts += self._pace(now, last)
        parts += [f"{name.replace('_', ' ')} {format_figure(value)}" for name, value in self._figures.items()]
        print("  ".join(parts), file=self._stream or sys.stdout, flush=True)

    def _pace(self, now: float, last: bool) -> list[str]:
        seconds = now - self._start
        if last:
            rate = (self.done - self._initial) / seconds if seconds > 0 else 0.0
            return [f"{format_figure(rate)}/s", f"took {format_duration(seconds)}"]
        rate = self.rate()
        if rate <= 0:  # on the first line there is none
            return []
        pace = [f"{format_figure(rate)}/s"]
        if self.total is not None:
            pace.append(f"{format_duration((self.total - self.done) / rate)} left")
        return pace


def format_duration(seconds: float) -> str:
    """Format as ``7:05`` (minutes and seconds), from an hour on ``1:07:05``, from a day on ``2 d 01:07``."""
    whole = max(0, round(seconds))
    minutes, second = divmod(whole, 60)
    hours, minute = divmod(minutes, 60)
    days, hour = divmod(hours, 24)
    if days:
        return f"{days} d {hour:02}:{minute:02}"
    return f"{hours}:{minute:02}:{second:02}" if hours else f"{minutes}:{second:02}"


def format_figure(value: float | int | str) -> str:
    """Format a number for people: integers with commas, others with three or four digits."""
    if isinstance(value, str):
        return value
    if isinstance(value, int) or abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.3g}" if abs(value) < 1 else f"{value:.2f}"
