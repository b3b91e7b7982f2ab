"""Errors that a person can act on, and how a pipeline step ends with one.

A :class:`UserError` says three things: what was given, what was expected, and what to do.
It is printed as one line and ends the process with exit code 2, never with a traceback.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path

ERROR_FILE_VARIABLE = "ESVIT_ERROR_FILE"
USER_ERROR_EXIT_CODE = 2


class UserError(Exception):
    """A mistake in the input or the surroundings, told in one line.

    Args:
        message: names the input, what was expected, and what to do.
    """

    def __str__(self) -> str:
        # Not the base's text: of an error that is a KeyError too it would be the repr, with quotes.
        return " ".join(" ".join(map(str, self.args)).split())


@contextlib.contextmanager
def step(name: str) -> Iterator[None]:
    """Run the body of a pipeline step: a :class:`UserError` ends it with one line and exit code 2.

    The line also goes to the file named by ``ESVIT_ERROR_FILE`` where that is set, so that the
    command line, which started the step through the pipeline runner, can repeat it as its last word.
    """
    try:
        yield
    except UserError as error:
        line = f"{name}: {error}"
        print(f"error: {line}", file=sys.stderr, flush=True)
        if path := os.environ.get(ERROR_FILE_VARIABLE):
            with contextlib.suppress(OSError):  # the disk may be what failed; standard error has the line
                Path(path).write_text(line, encoding="utf-8")
        raise SystemExit(USER_ERROR_EXIT_CODE) from None
