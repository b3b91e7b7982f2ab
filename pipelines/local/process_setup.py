"""Set up what a process may lack: open standard streams, a home folder, a user name."""

from __future__ import annotations

import getpass
import io
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TextIO

from esvit_core.private_folders import private_folder


def open_closed_streams() -> None:
    """Open ``/dev/null`` for standard streams that are closed (``>&-``).

    Otherwise the next file that is opened gets the number of the closed stream, and the output of child processes ends
    up in it, for example in a connection to the object store.
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


def ensure_home() -> None:
    """Set ``HOME`` to a temporary folder if the user has no home, and ``USER`` to the user id if it has no name.

    A container's user id often has no entry in ``/etc/passwd``, and libraries look for settings in the home folder.

    Raises:
        UserError: the folder cannot be created, or belongs to another user.
    """
    try:
        Path.home()
    except RuntimeError:
        os.environ["HOME"] = str(private_folder("home", "HOME"))
    try:
        getpass.getuser()
    except (KeyError, OSError):
        os.environ["USER"] = str(os.geteuid())


class _UnfailingOutput(io.TextIOBase):
    """Standard output that warns once when it cannot be written to (``esvit run | head``), and never raises."""

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
        with self._ignore_errors():
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with self._ignore_errors():
            self._stream.flush()

    @contextmanager
    def _ignore_errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            redirect_to_null(self._stream)
            reason = "its reader has exited" if isinstance(error, BrokenPipeError) else error.strerror
            with suppress(OSError):
                print(
                    f"warning: standard output cannot be written to ({reason}); the run continues without it",
                    file=sys.stderr,
                    flush=True,
                )


def redirect_to_null(stream: TextIO) -> None:
    """Redirect a stream that cannot be written to, and the contents of its buffer, to ``/dev/null``."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, stream.fileno())
    os.close(null)


@contextmanager
def survive_closed_stdout() -> Iterator[None]:
    """Continue the block even if standard output cannot be written to any more."""
    previous = sys.stdout
    sys.stdout = _UnfailingOutput(previous)
    try:
        yield
    finally:
        sys.stdout.flush()
        sys.stdout = previous
