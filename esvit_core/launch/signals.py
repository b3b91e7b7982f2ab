"""Signals and processes: who handles SIGINT and SIGTERM, how long each process may take to stop, who ends with whom.

A request to stop travels inwards::

    command line (esvit run) -> pipeline runner -> step that launches the training -> agent -> training process
                                                   step that launches a job -> Kubernetes -> agent -> training process

Each process waits for the one inside it, so its time limit has to exceed that one's. All limits are in the table below,
and ``tests/training/test_signals.py`` checks that they nest. The workers of the data loader reset these handlers
(:mod:`esvit_core.data.loading.workers`).

Nothing here imports torch: handlers are installed before the seconds that importing torch takes.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType

from esvit_core.errors import TRY_AGAIN_EXIT_CODE

# Time limits of a stop in seconds, innermost first, each counted from the signal that reaches the process.
EXIT_MARGIN_SECONDS = 2.0  # a training process stops waiting for uploads so long before its limit
TRAINER_SECONDS = 25.0  # a training process finishes its step and writes a checkpoint; ESVIT_GRACE_SECONDS overrides it
AGENT_SECONDS = 30.0  # torch elastic kills its processes after this; the value is torch's
LAUNCHER_SECONDS = 40.0  # the launching step kills the agent after this, and then waits as long for its processes
POD_SECONDS = 60  # terminationGracePeriodSeconds of a training pod
JOB_SECONDS = 75.0  # the launching step waits so long for the pods of a job that it has deleted
RUN_SECONDS = 120.0  # `esvit run` waits so long for the steps after Ctrl-C
KILL_SECONDS = 15.0  # `esvit run` kills what is left so long after SIGTERM
# A step whose pod is stopped may take so long to find out why. It has a second or less, which deleting the job needs.
RESCHEDULED_SECONDS = 0.15
POLL_SECONDS = 0.1  # a process that waits notices a signal within this time

STOPPED_EXIT_CODE = TRY_AGAIN_EXIT_CODE  # stopped on request with a checkpoint: a restart continues
GRACE_VARIABLE = "ESVIT_GRACE_SECONDS"
RENDEZVOUS_VARIABLE = "ESVIT_RENDEZVOUS_DIR"  # folder in which the processes of one machine meet and write their ids
PROCESS_FILE_PREFIX = "process-"
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)
TERMINAL_SIGNALS = (*STOP_SIGNALS, signal.SIGHUP)
_PR_SET_PDEATHSIG = 1


class StopRequest:
    """The reasons for which a training process ends early: a signal, as a flag that the loop reads, or a lost process.

    A thread watches for both, because the main thread may be blocked: in a launch on a GPU whose queue is full since
    another process died, Python runs no signal handler. Before :meth:`arm` there is nothing to save, and a signal ends the
    process at once. Afterwards the process has ``ESVIT_GRACE_SECONDS`` to finish its step and write a checkpoint, or
    to fail by itself because another process was lost, while pending uploads continue. Then it ends regardless.
    """

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        self.unfollowed = False  # nobody waits for the training any more; it ends as if it was finished
        self._deadline: float | None = None
        self._armed = False
        self._on_signal: Callable[[], None] = lambda: None
        self.grace = float(os.environ.get(GRACE_VARIABLE, TRAINER_SECONDS))

    def install(self) -> None:
        """Install the handlers, and start the thread that watches for signals; for the main thread."""
        for number in STOP_SIGNALS:
            signal.signal(number, self._handle)
        reader, writer = os.pipe()
        os.set_blocking(writer, False)
        # The interpreter writes each signal's number there at once; Python's own handlers wait for the main thread.
        signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
        threading.Thread(target=self._watch, args=(reader,), name="signals", daemon=True).start()

    @property
    def requested(self) -> bool:
        """Whether a signal has arrived, or nobody follows the training."""
        return self.signal is not None or self.unfollowed

    def seconds_left(self) -> float | None:
        """Return the seconds left for uploads; None if the process has no reason to end early."""
        return None if self._deadline is None else max(0.0, self._deadline - time.monotonic() - EXIT_MARGIN_SECONDS)

    def arm(self, on_signal: Callable[[], None] = lambda: None) -> None:
        """Let the process stop in order from here on.

        Args:
            on_signal: called in a separate thread as soon as a signal arrives, even while a step computes.
        """
        self._on_signal = on_signal
        self._armed = True

    def nobody_follows(self) -> None:
        """Let the training end with a checkpoint at its next step."""
        self.unfollowed = True

    def lost_peer(self, on_timeout: Callable[[], None]) -> None:
        """Give the main thread the grace to fail because another training process was lost, then end the process.

        Args:
            on_timeout: called, in a separate thread, before the process ends because its main thread is blocked.
        """
        self._end_after_grace(on_timeout)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if not self._armed:
            os._exit(STOPPED_EXIT_CODE)
        if self.signal is None:
            self.signal = signal.Signals(number)
            self._end_after_grace(lambda: None)

    def _watch(self, reader: int) -> None:
        called = False
        while number := os.read(reader, 1):
            if number[0] not in STOP_SIGNALS:
                continue
            self._handle(number[0], None)  # the main thread may do the same, or be blocked
            if not called:
                called = True
                self._on_signal()

    def _end_after_grace(self, on_timeout: Callable[[], None]) -> None:
        def end() -> None:
            try:
                on_timeout()
            finally:
                os._exit(STOPPED_EXIT_CODE)

        if self._deadline is None:
            self._deadline = time.monotonic() + self.grace
            timer = threading.Timer(self.grace, end)
            timer.daemon = True
            timer.start()


class SignalCounter:
    """Signals of a process that waits for others: counted, so that the process can stop what it has started.

    The first signal asks for an orderly stop, the second for an immediate one. Outside the main thread no handler can
    be installed, and no signal is counted.

    Attributes:
        first: number of the first signal, 0 if none has arrived.
        count: number of signals so far.
        stopped: set by the first signal.
    """

    def __init__(self, numbers: tuple[signal.Signals, ...] = STOP_SIGNALS) -> None:
        self.first = 0
        self.count = 0
        self.stopped = threading.Event()
        self._handled = 0
        if threading.current_thread() is threading.main_thread():
            for number in numbers:
                signal.signal(number, self._handle)

    def sleep(self, seconds: float) -> None:
        """Sleep until a signal arrives that was not there at the end of the last sleep, at most ``seconds``."""
        # Not Event.wait: a handler that runs while the main thread holds the event's lock would wait for ever.
        end = time.monotonic() + seconds
        while self.count == self._handled and (left := end - time.monotonic()) > 0:
            time.sleep(min(left, POLL_SECONDS))
        self._handled = self.count

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.count += 1
        if self.count == 1:
            self.first = number
            self.stopped.set()


@contextlib.contextmanager
def restored_handlers(numbers: tuple[signal.Signals, ...] = STOP_SIGNALS) -> Iterator[None]:
    """Restore the signal handlers at the end of the block."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def outlive_signals(
    numbers: tuple[signal.Signals, ...] = TERMINAL_SIGNALS, on_signal: Callable[[], object] = lambda: None
) -> None:
    """Ignore the signals in this process but not in its children, which inherit ``SIG_IGN`` but no Python handler.

    Args:
        numbers: the signals.
        on_signal: called in the main thread when one arrives.
    """

    def handle(number: int, frame: FrameType | None) -> None:
        on_signal()

    for number in numbers:
        signal.signal(number, handle)


def exit_on_sigterm() -> None:
    """End this process on SIGTERM even if it is process 1 of a container, where the kernel drops unhandled signals."""
    signal.signal(signal.SIGTERM, lambda number, frame: os._exit(STOPPED_EXIT_CODE))


def end_with_parent(parent: int, number: signal.Signals = signal.SIGTERM) -> None:
    """Send this process ``number`` when its parent dies, however the parent dies.

    On Linux the kernel sends it; elsewhere a thread checks the parent every second.

    Args:
        parent: expected process id of the parent; if the parent has died already, the signal is sent at once.
        number: signal to send.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, int(number), 0, 0, 0)
    else:
        threading.Thread(target=_poll_parent, args=(parent, number), daemon=True).start()
    if os.getppid() != parent:
        os.kill(os.getpid(), number)


def _poll_parent(parent: int, number: signal.Signals) -> None:
    while os.getppid() == parent:
        time.sleep(1)
    os.kill(os.getpid(), number)


def write_process_file() -> None:
    """Write this process's id where the launcher looks for processes that have outlived the agent."""
    if folder := os.environ.get(RENDEZVOUS_VARIABLE):
        (Path(folder) / f"{PROCESS_FILE_PREFIX}{os.getpid()}").touch()
