"""The errors that this program explains in one line, and the exit codes with which a process ends.

====  =========================  ==================================================================
code  class                      meaning
====  =========================  ==================================================================
0                                finished
1     :class:`CrashError`        an unexpected failure, such as a bug; the log has the traceback
2     :class:`UserError`         a mistake in the input: repeating the command does not help
75    :class:`InfrastructureError`  something outside the program failed, or stopped it: try again
====  =========================  ==================================================================

Every layer that repeats a failed process (the step's supervisor, torch elastic's agent, Volcano, the Kubeflow
Trainer) repeats code 75 and never code 2; ``docs/exit-codes.md`` lists them.
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
    """An error told in one line and without a traceback. Raise one of the subclasses.

    Args:
        message: names the input, what was expected, and what to do.
        step: of the pipeline, if the error is another process's.
        reason: the message without the step; default: the message.

    Attributes:
        step, reason: as given.
        exit_code: with which it ends the process.
        consequence: it follows from the failure of another process, which has the reason.
    """

    exit_code: ClassVar[int] = CRASH_EXIT_CODE
    consequence: ClassVar[bool] = False

    def __init__(self, *message: object, step: str = "", reason: str = "") -> None:
        super().__init__(*message)
        self.step = step
        self.reason = reason or str(self)

    def __str__(self) -> str:
        # Not the base's text: of an error that is a KeyError too it would be the repr, with quotes.
        return " ".join(" ".join(map(str, self.args)).split())


class UserError(EsvitError):
    """A mistake in the input or the settings: it stays one, however often the command is repeated."""

    exit_code = USER_ERROR_EXIT_CODE


class InfrastructureError(EsvitError):
    """A server, a disk, a network or another process failed: the same command may succeed later."""

    exit_code = TRY_AGAIN_EXIT_CODE


class LostPeerError(InfrastructureError):
    """Another training process has ended or does not answer; that process has the reason."""

    consequence = True


class CrashError(EsvitError):
    """A process of ours failed for a reason that only its traceback explains; that is in the log."""


def error_of(exit_code: int, message: str, step: str = "", reason: str = "") -> EsvitError:
    """The error that another process reported with its exit code and one line."""
    for family in (UserError, InfrastructureError):
        if exit_code == family.exit_code:
            return family(message, step=step, reason=reason)
    return CrashError(message, step=step, reason=reason)


def explained(error: Exception) -> EsvitError | None:
    """The one-line error that ``error`` is or stands for; None: only a traceback explains it.

    A full or failing disk and a lack of memory are the infrastructure's, wherever they are met.
    """
    if isinstance(error, EsvitError):
        return error
    if isinstance(error, OSError) and error.errno in _DISK_FAILURES:
        where = f"{error.filename}: " if error.filename else ""
        return InfrastructureError(f"{where}the disk failed ({error.strerror}); free some space, or use another disk")
    if isinstance(error, MemoryError):
        return InfrastructureError("out of memory; give the process more memory")
    return None


_DISK_FAILURES = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.ESTALE})


def write_error_file(path: Path, step: str, error: EsvitError) -> None:
    """Leave a step's error for the process that started this one; :func:`read_error_file` is its counterpart."""
    said = {"exit_code": error.exit_code, "step": step, "reason": str(error)}
    path.write_text(json.dumps(said), encoding="utf-8")


def read_error_file(path: Path) -> EsvitError:
    """The error that a step has left."""
    said = json.loads(path.read_text(encoding="utf-8"))
    step, reason = str(said["step"]), str(said["reason"])
    return error_of(int(said["exit_code"]), f"{step}: {reason}", step, reason)


@contextlib.contextmanager
def step(name: str) -> Iterator[None]:
    """Run the body of a pipeline step: an error that can be explained ends it with one line and its exit code.

    In a pod, code 75 starts the step again (:mod:`esvit_core.repetition`). The error also goes to the file named by ``ESVIT_ERROR_FILE`` where that is set, so that the command line, which
    started the step through the pipeline runner, can repeat it as its last word.
    """
    try:
        yield
    except Exception as error:
        known = explained(error)
        if known is None:
            raise
        print(f"error: {name}: {known}", file=sys.stderr, flush=True)
        if path := os.environ.get(ERROR_FILE_VARIABLE):
            with contextlib.suppress(OSError):  # the disk may be what failed; standard error has the line
                write_error_file(Path(path), name, known)
        if known.exit_code == TRY_AGAIN_EXIT_CODE:
            repeat(name)
        raise SystemExit(known.exit_code) from None
