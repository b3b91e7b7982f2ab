"""What is saved at once when a training is asked to stop, in case that the pod is gone before its step ends.

The log lines that have not been sent, other small objects that wait, and in a step's own pod (which lives for about a
second more) the entry of the event log that says that the run was stopped.
"""

from __future__ import annotations

import contextlib
import os

from esvit_core.errors import EsvitError
from esvit_core.runs.events import note
from esvit_core.runs.log import LogWriter
from esvit_core.runs.run import Run
from esvit_core.storage.upload_queue import UploadQueue
from esvit_core.training.checkpoint_interval import LOST_SECONDS_VARIABLE
from esvit_core.training.state import Parts


class Urgent:
    """Sends the small things of a run.

    Args:
        run: the run.
        parts: of the training; tell the step.
        uploads: the upload queue of the first process; None in the others, which have nothing to store.

    Attributes:
        log: of the present attempt, None before it begins.
        noted: the event log says that the run was stopped.
    """

    def __init__(self, run: Run, parts: Parts, uploads: UploadQueue | None) -> None:
        self._run, self._parts, self._uploads = run, parts, uploads
        self.log: LogWriter | None = None
        self.noted = False

    def send(self) -> None:
        """Send all; what fails is left to the orderly end of the training."""
        if self._uploads is None:
            return
        with contextlib.suppress(EsvitError):
            if self.log is not None:
                self.log.flush()
            self._uploads.flush_objects()
        if LOST_SECONDS_VARIABLE in os.environ:
            with contextlib.suppress(EsvitError):
                step, reason = self._parts.position.step, "asked to stop"
                note(self._uploads.quick_store, self._run.uri, "stopped", step=step, reason=reason)
                self.noted = True
