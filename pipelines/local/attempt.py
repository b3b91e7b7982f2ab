"""One attempt at a run: start the process that runs the pipeline, pass on a Ctrl-C, leave nothing running."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

import psutil

from esvit_core.errors import CrashError, UserError, read_error_file
from esvit_pipelines.local.runner import Outcome, Request, environment

SAVE_SECONDS = 120.0  # that the steps get to save their state after a Ctrl-C
END_SECONDS = 15.0  # that what is left gets after SIGTERM


class StoppedError(Exception):
    """The person, or the system, asked the run to stop, and it has."""


@dataclass
class _Stop:
    """How often it was asked for; a second time means at once."""

    asked: int = 0


def run_attempt(data: str, config_file: Path, run_uri: str, log: Path, lock: int, owner: str | None = None) -> None:
    """Run the pipeline to its end.

    Args:
        data: the images.
        config_file: the resolved configuration; of a retraining, the one that was asked for.
        run_uri: where the run lies.
        log: gets every line.
        lock: descriptor of the locked file that says that this run is in progress.
        owner: of a retraining; None: the run is none.

    Raises:
        UserError, InfrastructureError: a step ended with one.
        CrashError: a step ended in another way.
        StoppedError: by SIGINT, SIGTERM or SIGHUP.
    """
    work = Path(tempfile.mkdtemp(prefix="esvit-run-"))
    try:
        request, error_file = work / "request.json", work / "error.txt"
        Request(data, str(config_file), run_uri, str(work), str(log), owner).write(request)
        with log.open("a", encoding="utf-8") as errors, _signals() as stop:
            runner = subprocess.Popen(
                [sys.executable, "-m", "esvit_pipelines.local.runner", str(request)],
                env=environment(os.environ, work, error_file),
                stdin=subprocess.PIPE,  # open as long as this process lives
                stderr=errors,
                start_new_session=True,
                pass_fds=(lock,),
            )
            started: list[psutil.Process] = []
            try:
                _wait(runner, stop, started)
            finally:
                _end(runner, started)
        if stop.asked:
            raise StoppedError
        _raise_for(Outcome.read(work), error_file, log)
    finally:
        shutil.rmtree(work, ignore_errors=True)


@contextlib.contextmanager
def in_progress(folder: Path) -> Iterator[int]:
    """Hold the run in ``folder`` for this command; yields the descriptor of the locked file.

    Raises:
        UserError: another command holds it.
    """
    with (folder / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"run {folder.name}: another esvit run is working on it; wait for it, or stop it with Ctrl-C"
            ) from None
        yield file.fileno()


def _raise_for(outcome: Outcome, error_file: Path, log: Path) -> None:
    if outcome.finished:
        return
    if error_file.exists():
        raise read_error_file(error_file)
    step = outcome.step or "the pipeline"
    reason = outcome.error or "it ended without saying why (killed, or out of memory?)"
    reason = f"{reason}; the log has the rest: {log}"
    raise CrashError(f"{step} failed: {reason}", step=step, reason=reason)


@contextlib.contextmanager
def _signals() -> Iterator[_Stop]:
    """Count requests to stop instead of ending this process."""
    stop = _Stop()

    def ask(number: int, frame: FrameType | None) -> None:
        stop.asked += 1

    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = {number: signal.signal(number, ask) for number in numbers}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _wait(runner: subprocess.Popen[bytes], stop: _Stop, started: list[psutil.Process]) -> None:
    """Until the runner ends: by itself, or because it was asked to.

    Args:
        started: gets the processes that ran when the run was asked to stop; some are in sessions of their own, and
            cannot be found any more when those who started them are gone.
    """
    passed_on, deadline = 0, float("inf")
    while runner.poll() is None and time.monotonic() < deadline:
        with contextlib.suppress(subprocess.TimeoutExpired):
            runner.wait(0.2)
        if stop.asked > passed_on == 0:
            with contextlib.suppress(OSError):  # the terminal may be gone
                print("\nstopping: the run saves its state (Ctrl-C again to stop at once)", flush=True)
            deadline = time.monotonic() + SAVE_SECONDS
            started += _descendants(runner)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(runner.pid, signal.SIGINT)
        elif stop.asked > passed_on:
            return
        passed_on = stop.asked


def _descendants(runner: subprocess.Popen[bytes]) -> list[psutil.Process]:
    with contextlib.suppress(psutil.NoSuchProcess):
        process = psutil.Process(runner.pid)
        return [process, *process.children(recursive=True)]
    return []


def _end(runner: subprocess.Popen[bytes], started: list[psutil.Process]) -> None:
    """End the runner and everything that it has started, in whatever session."""
    left = {*started, *_descendants(runner)}
    for process in left:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.terminate()
    _, stubborn = psutil.wait_procs(left, END_SECONDS)
    for process in stubborn:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    runner.wait()
    if runner.stdin:
        runner.stdin.close()
