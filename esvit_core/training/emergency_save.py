"""Save what is small as soon as a training is asked to stop, because the pod may be gone before its step ends.

This covers the log lines and other small objects that have not been uploaded, and, in a pipeline step's own pod (which
lives for about one more second), the event that the run was stopped.
"""

from __future__ import annotations

import contextlib
import os

from esvit_core.errors import EsvitError
from esvit_core.runs.events import record_event
from esvit_core.runs.log import LogWriter
from esvit_core.runs.run import Run
from esvit_core.storage.upload_queue import UploadQueue
from esvit_core.training.checkpoint_interval import LOST_SECONDS_VARIABLE
from esvit_core.training.state import TrainState


class EmergencySave:
    """Uploads the small objects of a run.

    Args:
        run: the run.
        state: of the training; gives the current step.
        uploads: upload queue of rank 0; None in the other processes, which have nothing to upload.

    Attributes:
        log: of the current attempt; None before it begins.
        stop_recorded: whether the event log says that the run was stopped.
    """

    def __init__(self, run: Run, state: TrainState, uploads: UploadQueue | None) -> None:
        self._run, self._state, self._uploads = run, state, uploads
        self.log: LogWriter | None = None
        self.stop_recorded = False

    def flush(self) -> None:
        """Upload the pending small objects; what fails is left to the regular end of the training."""
        if self._uploads is None:
            return
        with contextlib.suppress(EsvitError):
            if self.log is not None:
                self.log.flush()
            self._uploads.flush_objects()

    def save(self) -> None:
        """Upload the pending small objects and, in a step's own pod, record that the run was stopped."""
        self.flush()
        if self._uploads is None:
            return
        if LOST_SECONDS_VARIABLE in os.environ:
            with contextlib.suppress(EsvitError):
                step, reason = self._state.progress.step, "asked to stop"
                record_event(self._uploads.quick_store, self._run.uri, "stopped", step=step, reason=reason)
                self.stop_recorded = True
