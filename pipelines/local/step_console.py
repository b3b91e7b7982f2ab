"""What a person sees of a pipeline that runs: step headers, the steps' own lines, and none of the machinery's.

Everything goes to the log; the screen gets what was written for people.
"""

from __future__ import annotations

import contextlib
import io
import logging
import re
import time
from collections.abc import Sequence
from typing import TextIO

_INDENT = "    "  # kfp.local puts it before every line of a step
_BEGIN = re.compile(r"Executing task \D*?'(?P<task>[^']+)'")
_COLOUR = re.compile(r"\x1b\[\d+m")
_WARNING = re.compile(r"^\S+:\d+: \w*Warning: ")
_CHAIN = re.compile(r"^(The above exception was the direct cause|During handling of the above exception)")
_LIBRARY_LOG = re.compile(r"^\[?[IWEF]\d{4} \d\d:\d\d:\d\d|^\[W\d|^\[rank\d+\]:")


class StepConsole(io.TextIOBase):
    """Takes the place of standard output while kfp.local runs.

    Args:
        names: of the steps, in the order in which they run.
        screen: gets the lines for people.
        log: gets every line, with the time.
    """

    def __init__(self, names: Sequence[str], screen: TextIO, log: TextIO) -> None:
        self.names, self.screen, self.log = list(names), screen, log
        self.step: str | None = None
        self.last_error = ""
        self._begun = 0
        self._partial = ""
        self._lines = LineFilter()

    def write(self, text: str) -> int:
        *lines, self._partial = (self._partial + text).split("\n")
        for line in lines:
            self._take(line)
        return len(text)

    def flush(self) -> None:
        self.log.flush()

    def begin(self, task: str) -> None:
        """A step starts: print its header."""
        self.step = self.names[self._begun] if self._begun < len(self.names) else task
        self._begun += 1
        self._lines = LineFilter()
        self._show(f"[{self._begun}/{max(len(self.names), self._begun)}] {self.step}")
        self.record(f"step {self._begun}: {self.step}")

    def record(self, text: str) -> None:
        """Write to the log only."""
        stamp = time.strftime("%Y-%m-%d %H:%M:%S")
        # On a disk that is full the step fails by itself, and says so in a line.
        with contextlib.suppress(OSError):
            self.log.writelines(f"{stamp}  {line}\n" for line in _COLOUR.sub("", text).splitlines())
            self.log.flush()

    def _take(self, line: str) -> None:
        line = line.removeprefix(_INDENT).rstrip()
        if not line or set(line) == {"-"}:  # kfp's separators
            return
        self.record(line)
        if self._lines.shows(line):
            self._show(f"  {line}")
        self.last_error = self._lines.last_error or self.last_error

    def _show(self, line: str) -> None:
        # Whoever reads the screen may have left (`esvit run | head`): the run goes on, and the log has all of it.
        with contextlib.suppress(OSError):
            self.screen.write(line + "\n")
            self.screen.flush()


class LineFilter:
    """Tells the lines of a step that were written for people from those that were not.

    Not shown are KFP's own lines, warnings of libraries, tracebacks (the last line of one is kept in
    ``last_error``), and lines that start with ``error:``, which the command line repeats as its last word.
    """

    def __init__(self) -> None:
        self.last_error = ""
        self._skip: str | None = None

    def shows(self, line: str) -> bool:
        """Whether the next line of the step is for people."""
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
            if line.startswith(" "):  # the source line that a warning quotes
                return False
        if line.startswith("[KFP Executor "):
            self._skip = "executor input" if line.endswith("Got executor_input:") else None
            return False
        if _WARNING.match(line):
            self._skip = "warning"
            return False
        return not (line.startswith("error: ") or _CHAIN.match(line) or _LIBRARY_LOG.match(line))


class KfpRecords(logging.Filter):
    """Takes kfp.local's log records off the root logger: to the log, and a step's start to the console."""

    def __init__(self, console: StepConsole) -> None:
        super().__init__()
        self._console = console

    def filter(self, record: logging.LogRecord) -> bool:
        message = record.getMessage()
        self._console.record(f"kfp: {message}")
        if begin := _BEGIN.search(_COLOUR.sub("", message)):
            self._console.begin(begin["task"])
        return False
