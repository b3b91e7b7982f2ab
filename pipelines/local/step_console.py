"""Console output of a local pipeline run: step headers and the steps' own lines, without those of KFP.

All lines go to the log; the screen shows only those that are meant for the user.
"""

from __future__ import annotations

import contextlib
import io
import logging
import re
import time
from collections.abc import Sequence
from typing import TextIO

_INDENT = "    "  # kfp.local indents every line of a step
_START = re.compile(r"Executing task \D*?'(?P<task>[^']+)'")
_COLOR = re.compile(r"\x1b\[\d+m")
_WARNING = re.compile(r"^\S+:\d+: \w*Warning: ")
_CHAIN = re.compile(r"^(The above exception was the direct cause|During handling of the above exception)")
_LIBRARY_LOG = re.compile(r"^\[?[IWEF]\d{4} \d\d:\d\d:\d\d|^\[W\d|^\[rank\d+\]:")


class StepConsole(io.TextIOBase):
    """Replacement for standard output while kfp.local runs.

    Args:
        names: names of the steps, in the order in which they run.
        screen: stream for the lines that the user sees.
        log: stream for all lines, with timestamps.
    """

    def __init__(self, names: Sequence[str], screen: TextIO, log: TextIO) -> None:
        self.names, self.screen, self.log = list(names), screen, log
        self.step: str | None = None
        self.last_error = ""
        self._started = 0
        self._partial = ""
        self._lines = LineFilter()

    def write(self, text: str) -> int:
        *lines, self._partial = (self._partial + text).split("\n")
        for line in lines:
            self._handle(line)
        return len(text)

    def flush(self) -> None:
        self.log.flush()

    def start_step(self, task: str) -> None:
        """Print the header of a step that starts."""
        self.step = self.names[self._started] if self._started < len(self.names) else task
        self._started += 1
        self._lines = LineFilter()
        self._show(f"[{self._started}/{max(len(self.names), self._started)}] {self.step}")
        self.record(f"step {self._started}: {self.step}")

    def record(self, text: str) -> None:
        """Write lines to the log only."""
        stamp = time.strftime("%Y-%m-%d %H:%M:%S")
        # On a full disk the step itself fails, and reports it in one line.
        with contextlib.suppress(OSError):
            self.log.writelines(f"{stamp}  {line}\n" for line in _COLOR.sub("", text).splitlines())
            self.log.flush()

    def _handle(self, line: str) -> None:
        line = line.removeprefix(_INDENT).rstrip()
        if not line or set(line) == {"-"}:  # separators of KFP
            return
        self.record(line)
        if self._lines.shows(line):
            self._show(f"  {line}")
        self.last_error = self._lines.last_error or self.last_error

    def _show(self, line: str) -> None:
        # The reader of the output may have exited (`esvit run | head`): the run continues, and the log is complete.
        with contextlib.suppress(OSError):
            self.screen.write(line + "\n")
            self.screen.flush()


class LineFilter:
    """Selects the lines of a step that are meant for the user.

    It hides KFP's own lines, warnings of libraries, tracebacks (the last line of one is kept in ``last_error``), and
    lines that start with ``error:``, which the command line prints at the end.
    """

    def __init__(self) -> None:
        self.last_error = ""
        self._skip: str | None = None

    def shows(self, line: str) -> bool:
        """Return whether to show the next line of the step."""
        if line.startswith("Traceback (most recent call last)"):
            self._skip = "traceback"
            return False
        if self._skip == "traceback":
            if line[:1] not in " |+":
                self._skip = None
                self.last_error = line
            return False
        if self._skip == "executor input":
            if line == "}":
                self._skip = None
            return False
        if self._skip == "warning":
            self._skip = None
            if line.startswith(" "):  # the source line quoted by a warning
                return False
        if line.startswith("[KFP Executor "):
            self._skip = "executor input" if line.endswith("Got executor_input:") else None
            return False
        if _WARNING.match(line):
            self._skip = "warning"
            return False
        return not (line.startswith("error: ") or _CHAIN.match(line) or _LIBRARY_LOG.match(line))


class KfpRecords(logging.Filter):
    """Redirects kfp.local's log records from the root logger to the log, and reports step starts to the console."""

    def __init__(self, console: StepConsole) -> None:
        super().__init__()
        self._console = console

    def filter(self, record: logging.LogRecord) -> bool:
        message = record.getMessage()
        self._console.record(f"kfp: {message}")
        if start := _START.search(_COLOR.sub("", message)):
            self._console.start_step(start["task"])
        return False
