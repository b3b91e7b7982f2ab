"""Repeat a pipeline step inside its own container after an infrastructure failure (exit code 75).

Kubeflow Pipelines cannot do this: whether it retries a step depends on how the step ended and on the server's version,
but not on the exit code (``docs/exit-codes.md``). So the step's process replaces itself with a new process that has the
same arguments. The pod, its volumes and its node stay the same, and signals reach the new process.

A pipeline compiled for a cluster sets the variables below. Without them nothing is repeated: on one machine the command
line reports the failure at once.
"""

from __future__ import annotations

import os
import sys
import time
from typing import Any

RETRIES_VARIABLE = "ESVIT_STEP_RETRIES"
WAIT_VARIABLE = "ESVIT_STEP_RETRY_SECONDS"
DONE_VARIABLE = "ESVIT_STEP_RETRIES_DONE"  # number of repetitions so far, set by this module
LONGEST_WAIT_SECONDS = 600.0


def variables(retries: int, seconds: float) -> dict[str, str]:
    """Return the environment of a step that is to be repeated.

    Args:
        retries: largest number of repetitions.
        seconds: wait before the first repetition; it doubles each time, up to ten minutes.
    """
    return {RETRIES_VARIABLE: str(retries), WAIT_VARIABLE: f"{seconds:g}"}


def repeat(name: str) -> None:
    """Wait and restart this process; return only if no repetition is left.

    Args:
        name: of the step, for the message.
    """
    retries, done = int(os.environ.get(RETRIES_VARIABLE, 0)), int(os.environ.get(DONE_VARIABLE, 0))
    if done >= retries:
        return
    seconds = wait_before(done, float(os.environ.get(WAIT_VARIABLE, 30)))
    print(f"{name}: retrying in {seconds:g} s ({done + 1} of {retries})", flush=True)
    time.sleep(seconds)
    os.environ[DONE_VARIABLE] = str(done + 1)
    sys.stderr.flush()
    arguments: list[Any] = [sys.executable, *sys.orig_argv[1:]]
    os.execv(sys.executable, arguments)


def wait_before(done: int, first: float) -> float:
    """Return the seconds to wait before repetition number ``done + 1``."""
    return min(first * 2**done, LONGEST_WAIT_SECONDS)
