"""What a process may lack: standard streams that are open and read, a home, a name of its user."""

from __future__ import annotations

import getpass
import io
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TextIO


def open_closed_streams() -> None:
    """Let standard streams that are closed (``>&-``) lead nowhere.

    Otherwise the next file that is opened gets the number of the closed one, and whatever child processes print ends
    in it, such as in a connection with the object store.
    """
    for number, mode in ((0, os.O_RDONLY), (1, os.O_WRONLY), (2, os.O_WRONLY)):
        try:
            os.fstat(number)
        except OSError:
            opened = os.open(os.devnull, mode)  # the lowest free number
            if opened != number:
                os.dup2(opened, number)
                os.close(opened)
            os.set_inheritable(number, True)
    sys.stdin = sys.stdin or open(0, closefd=False, encoding="utf-8")  # noqa: SIM115
    sys.stdout = sys.stdout or open(1, "w", closefd=False, encoding="utf-8")  # noqa: SIM115
    sys.stderr = sys.stderr or open(2, "w", closefd=False, encoding="utf-8")  # noqa: SIM115


def require_home() -> None:
    """Give a user without a home one below the temporary folder, and one without a name the number as a name.

    The number of a container's user often has no entry in ``/etc/passwd``; libraries look for settings at home.

    Raises:
        UserError: the folder cannot be made, or is another user's.
    """
    try:
        Path.home()
    except RuntimeError:
        from esvit_core.storage.private_folders import private_folder  # brings the client of the store

        os.environ["HOME"] = str(private_folder("home", "HOME"))
    try:
        getpass.getuser()
    except (KeyError, OSError):
        os.environ["USER"] = str(os.geteuid())


class _UnreadOutput(io.TextIOBase):
    """Standard output whose end (``esvit run | head``) is told once and stops nothing."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    @property
    def encoding(self) -> str:  # type: ignore[override]
        return self._stream.encoding

    def fileno(self) -> int:
        return self._stream.fileno()

    def isatty(self) -> bool:
        return self._stream.isatty()

    def writable(self) -> bool:
        return True

    def write(self, text: str) -> int:
        with self._never_failing():
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with self._never_failing():
            self._stream.flush()

    @contextmanager
    def _never_failing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            lead_nowhere(self._stream)
            reason = "nobody reads it any more" if isinstance(error, BrokenPipeError) else error.strerror
            with suppress(OSError):
                print(
                    f"warning: standard output cannot be written to ({reason}); the work goes on without it",
                    file=sys.stderr,
                    flush=True,
                )


def lead_nowhere(stream: TextIO) -> None:
    """Let a stream that cannot be written to lead nowhere, with what is in its buffer."""
    nothing = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nothing, stream.fileno())
    os.close(nothing)


@contextmanager
def going_on_unread() -> Iterator[None]:
    """Let work go on though its standard output cannot be written to any more."""
    before = sys.stdout
    sys.stdout = _UnreadOutput(before)
    try:
        yield
    finally:
        sys.stdout.flush()
        sys.stdout = before
