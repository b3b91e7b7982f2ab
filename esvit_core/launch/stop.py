"""How a training process is asked to stop, and how it makes sure that it does not outlive what started it.

Nothing here imports torch: it is set up before the seconds that that takes.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType

from esvit_core.errors import TRY_AGAIN_EXIT_CODE

STOPPED_EXIT_CODE = TRY_AGAIN_EXIT_CODE  # stopped on request with a checkpoint: started again it continues
RENDEZVOUS_VARIABLE = "ESVIT_RENDEZVOUS_DIR"  # where processes of one machine meet, and leave their ids
PROCESS_FILE_PREFIX = "process-"
GRACE_VARIABLE = "ESVIT_GRACE_SECONDS"
DEFAULT_GRACE_SECONDS = 25.0  # torch elastic kills 30 s after it has asked
_PR_SET_PDEATHSIG = 1


class StopRequest:
    """SIGTERM and SIGINT as a flag that the loop looks at between steps.

    Before :meth:`arm` there is nothing to save: a signal ends the process at once. Afterwards the process has
    ``ESVIT_GRACE_SECONDS`` to come to the end of its step and write a checkpoint; then it ends regardless, so that
    a process that waits for a dead one does not stay.
    """

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        self._deadline: float | None = None
        self._armed = False
        self.grace = float(os.environ.get(GRACE_VARIABLE, DEFAULT_GRACE_SECONDS))

    def listen(self) -> None:
        """From here on signals are heard."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._handle)

    @property
    def requested(self) -> bool:
        return self.signal is not None

    def seconds_left(self) -> float | None:
        """Of the grace, with a little to spare for the last words; None when nothing was asked."""
        return None if self._deadline is None else max(0.0, self._deadline - time.monotonic() - 2)

    def arm(self, at_once: Callable[[], None] = lambda: None) -> None:
        """From here on a stop can be carried out in order.

        Args:
            at_once: called in a thread of its own when a signal arrives, also while the step computes.
        """
        self._armed = True
        if threading.current_thread() is threading.main_thread():
            reader, writer = os.pipe()
            os.set_blocking(writer, False)
            # The interpreter writes each signal's number there at once; Python's own handlers wait for the main thread.
            signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
            threading.Thread(target=_call_on_signal, args=(reader, at_once), name="signals", daemon=True).start()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if not self._armed:
            os._exit(STOPPED_EXIT_CODE)
        if self.signal is None:
            self.signal = signal.Signals(number)
            self._deadline = time.monotonic() + self.grace
            timer = threading.Timer(self.grace, os._exit, (STOPPED_EXIT_CODE,))
            timer.daemon = True
            timer.start()


def _call_on_signal(reader: int, call: Callable[[], None]) -> None:
    while number := os.read(reader, 1):
        if number[0] in (signal.SIGTERM, signal.SIGINT):
            call()
            return


def end_with(parent: int, number: signal.Signals = signal.SIGTERM) -> None:
    """Send this process ``number`` when its parent dies, however it dies.

    On Linux the kernel does it, elsewhere a thread that looks every second.

    Args:
        parent: process id that the parent must have: if it has died already, the signal comes at once.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, int(number), 0, 0, 0)
    else:
        threading.Thread(target=_look_after, args=(parent, number), daemon=True).start()
    if os.getppid() != parent:
        os.kill(os.getpid(), number)


def _look_after(parent: int, number: signal.Signals) -> None:
    while os.getppid() == parent:
        time.sleep(1)
    os.kill(os.getpid(), number)


def leave_process_id() -> None:
    """Tell the launcher which processes to wait for, should the agent die before them."""
    if folder := os.environ.get(RENDEZVOUS_VARIABLE):
        (Path(folder) / f"{PROCESS_FILE_PREFIX}{os.getpid()}").touch()
