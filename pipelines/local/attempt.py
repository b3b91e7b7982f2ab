"""One attempt at a run: start the process that runs the pipeline, forward Ctrl-C, and leave no process behind."""

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
from pathlib import Path

import psutil

from esvit_core.errors import CrashError, UserError, read_error_file
from esvit_core.launch.signals import KILL_SECONDS, RUN_SECONDS, TERMINAL_SIGNALS, SignalCounter, restored_handlers
from esvit_pipelines.local.runner import Outcome, Request, environment


class StoppedError(Exception):
    """The run was stopped by a signal."""


def run_attempt(
    data: str,
    config_file: Path,
    run_uri: str,
    log: Path,
    lock: int,
    owner: str | None = None,
    backbone: str | None = None,
    finished: bool = False,
) -> None:
    """Run the pipeline until it ends.

    Args:
        data: source of the images.
        config_file: the resolved configuration; for a retraining or an evaluation, the requested one.
        run_uri: address of the run.
        log: file to which every line is written.
        lock: descriptor of the locked file that marks this run as in progress.
        owner: owner of the retraining's lease; None: the run is not a retraining.
        backbone: the existing backbone that the run evaluates; None: it trains one.
        finished: the run has its report.

    Raises:
        UserError, InfrastructureError: a step ended with this error.
        CrashError: a step failed in another way.
        StoppedError: SIGINT, SIGTERM or SIGHUP stopped the run.
    """
    work = Path(tempfile.mkdtemp(prefix="esvit-run-"))
    try:
        request, error_file = work / "request.json", work / "error.txt"
        Request(data, str(config_file), run_uri, str(work), str(log), owner, backbone, finished).write(request)
        with log.open("a", encoding="utf-8") as errors, restored_handlers(TERMINAL_SIGNALS):
            stop = SignalCounter(TERMINAL_SIGNALS)
            runner = subprocess.Popen(
                [sys.executable, "-m", "esvit_pipelines.local.runner", str(request)],
                env=environment(os.environ, work, error_file),
                stdin=subprocess.PIPE,  # stays open until this process ends
                stderr=errors,
                start_new_session=True,
                pass_fds=(lock,),
            )
            started: list[psutil.Process] = []
            try:
                _wait(runner, stop, started)
            finally:
                _end(runner, started)
        if stop.count:
            raise StoppedError
        _raise_for(Outcome.read(work), error_file, log)
    finally:
        shutil.rmtree(work, ignore_errors=True)


@contextlib.contextmanager
def in_progress(folder: Path) -> Iterator[int]:
    """Lock the run in ``folder`` for this command; yields the descriptor of the locked file.

    Raises:
        UserError: another command has locked it.
    """
    with (folder / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"run {folder.name}: another esvit command is running it; wait for that command, or stop it with Ctrl-C"
            ) from None
        yield file.fileno()


def _raise_for(outcome: Outcome, error_file: Path, log: Path) -> None:
    if outcome.finished:
        return
    if error_file.exists():
        raise read_error_file(error_file)
    step = outcome.step or "the pipeline"
    reason = outcome.error or "the process ended without an error message (killed, or out of memory?)"
    reason = f"{reason}; see the log: {log}"
    raise CrashError(f"{step} failed: {reason}", step=step, reason=reason)


def _wait(runner: subprocess.Popen[bytes], stop: SignalCounter, started: list[psutil.Process]) -> None:
    """Wait until the runner ends, by itself or after a signal to stop.

    Args:
        started: filled with the processes that were running at the first signal. Some are in sessions of their own, and
            cannot be found any more once their parents have ended.
    """
    forwarded, deadline = 0, float("inf")
    while runner.poll() is None and time.monotonic() < deadline:
        with contextlib.suppress(subprocess.TimeoutExpired):
            runner.wait(0.2)
        if stop.count > forwarded == 0:
            with contextlib.suppress(OSError):  # the terminal may be gone
                print("\nstopping: the run is saving its state (press Ctrl-C again to stop immediately)", flush=True)
            deadline = time.monotonic() + RUN_SECONDS
            started += _descendants(runner)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(runner.pid, signal.SIGINT)
        elif stop.count > forwarded:
            return
        forwarded = stop.count


def _descendants(runner: subprocess.Popen[bytes]) -> list[psutil.Process]:
    with contextlib.suppress(psutil.NoSuchProcess):
        process = psutil.Process(runner.pid)
        return [process, *process.children(recursive=True)]
    return []


def _end(runner: subprocess.Popen[bytes], started: list[psutil.Process]) -> None:
    """End the runner and all processes that it has started, whatever their session."""
    remaining = {*started, *_descendants(runner)}
    for process in remaining:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.terminate()
    _, stubborn = psutil.wait_procs(remaining, KILL_SECONDS)
    for process in stubborn:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    runner.wait()
    if runner.stdin:
        runner.stdin.close()
