"""The errors that are reported in one line, and the exit codes of all processes.

====  =========================  ==================================================================
code  class                      meaning
====  =========================  ==================================================================
0                                finished
1     :class:`CrashError`        an unexpected failure, such as a bug; the log has the traceback
2     :class:`UserError`         a mistake in the input: repeating the command does not help
75    :class:`InfrastructureError`  something outside the program failed, or stopped it: retry
====  =========================  ==================================================================

Every layer that retries a failed process (the step itself, torch elastic's agent, Volcano, the Kubeflow Trainer)
retries code 75 and never code 2; ``docs/exit-codes.md`` lists the layers.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

from esvit_core.repetition import repeat

ERROR_FILE_VARIABLE = "ESVIT_ERROR_FILE"
CRASH_EXIT_CODE = 1
USER_ERROR_EXIT_CODE = 2
TRY_AGAIN_EXIT_CODE = 75  # EX_TEMPFAIL of sysexits.h


class EsvitError(Exception):
    """An error that is reported in one line without a traceback. Raise one of the subclasses.

    Args:
        message: names the input, what was expected, and what to do.
        step: pipeline step of the process that reported the error, if it was another process.
        reason: the message without the step; default: the message.

    Attributes:
        step, reason: as passed.
        exit_code: exit code of the process.
        consequence: whether the error is the consequence of another process's failure, which has the reason.
    """

    exit_code: ClassVar[int] = CRASH_EXIT_CODE
    consequence: ClassVar[bool] = False

    def __init__(self, *message: object, step: str = "", reason: str = "") -> None:
        super().__init__(*message)
        self.step = step
        self.reason = reason or str(self)

    def __str__(self) -> str:
        # Exception.__str__ would return the repr, with quotes, for an error that is also a KeyError.
        return " ".join(" ".join(map(str, self.args)).split())


class UserError(EsvitError):
    """A mistake in the input or the settings; repeating the command does not help."""

    exit_code = USER_ERROR_EXIT_CODE


class InfrastructureError(EsvitError):
    """A server, a disk, a network or another process failed; the same command may succeed later."""

    exit_code = TRY_AGAIN_EXIT_CODE


class LostPeerError(InfrastructureError):
    """Another training process ended or does not answer; that process has the reason."""

    consequence = True


class CrashError(EsvitError):
    """A process failed unexpectedly; the log has its traceback."""


def error_of(exit_code: int, message: str, step: str = "", reason: str = "") -> EsvitError:
    """Return the error that another process reported with its exit code and one line."""
    for error_class in (UserError, InfrastructureError):
        if exit_code == error_class.exit_code:
            return error_class(message, step=step, reason=reason)
    return CrashError(message, step=step, reason=reason)


def explained(error: Exception) -> EsvitError | None:
    """Return the one-line error for ``error``; None if only a traceback explains it.

    A full or failing disk and a lack of memory are infrastructure failures wherever they occur.
    """
    if isinstance(error, EsvitError):
        return error
    if isinstance(error, OSError) and error.errno in _DISK_FAILURES:
        path = f"{error.filename}: " if error.filename else ""
        return InfrastructureError(f"{path}the disk failed ({error.strerror}); free some space, or use another disk")
    if isinstance(error, MemoryError):
        return InfrastructureError("out of memory; give the process more memory")
    return None


_DISK_FAILURES = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.ESTALE})


def write_error_file(path: Path, step: str, error: EsvitError) -> None:
    """Write a step's error for the process that started the step, which reads it with :func:`read_error_file`."""
    content = {"exit_code": error.exit_code, "step": step, "reason": str(error)}
    path.write_text(json.dumps(content), encoding="utf-8")


def read_error_file(path: Path) -> EsvitError:
    """Read the error that a step has written."""
    content = json.loads(path.read_text(encoding="utf-8"))
    step, reason = str(content["step"]), str(content["reason"])
    return error_of(int(content["exit_code"]), f"{step}: {reason}", step, reason)


@contextlib.contextmanager
def step(name: str) -> Iterator[None]:
    """Wrap the body of a pipeline step: an error that can be explained ends it with one line and its exit code.

    In a pod, code 75 restarts the step (:mod:`esvit_core.repetition`). The error is also written to the file named by
    ``ESVIT_ERROR_FILE``, if set, so that the command line, which started the step through the pipeline runner, can
    print it last.
    """
    try:
        yield
    except Exception as error:
        known = explained(error)
        if known is None:
            raise
        print(f"error: {name}: {known}", file=sys.stderr, flush=True)
        if path := os.environ.get(ERROR_FILE_VARIABLE):
            with contextlib.suppress(OSError):  # the disk may have failed; standard error has the line
                write_error_file(Path(path), name, known)
        if known.exit_code == TRY_AGAIN_EXIT_CODE:
            repeat(name)
        raise SystemExit(known.exit_code) from None
