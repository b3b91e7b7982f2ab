"""Programs of tests in forks of the test's process, which has imported torch: other processes would take seconds to do so."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Mapping
from typing import IO, NoReturn

TRAINING = "import runpy; runpy.run_module('esvit_core.training', run_name='__main__', alter_sys=True)"


class Forked:
    """A real process that runs the text of a program, with the interface of ``subprocess.Popen``.

    Args:
        program: its text; it runs as ``__main__``.
        arguments: its ``sys.argv[1:]``.
        environment: its complete environment; default: that of this process.
    """

    def __init__(self, program: str, *arguments: str, environment: Mapping[str, str] | None = None) -> None:
        self.returncode: int | None = None
        output, errors = os.pipe(), os.pipe()
        sys.stdout.flush()
        sys.stderr.flush()
        self.pid = os.fork()
        if self.pid == 0:
            _run(program, arguments, environment, output[1], errors[1])
        for pipe in (output, errors):
            os.close(pipe[1])
        self.stdout: IO[str] = os.fdopen(output[0], encoding="utf-8")
        self.stderr: IO[str] = os.fdopen(errors[0], encoding="utf-8")

    def poll(self) -> int | None:
        """Return the exit code, negative for a signal; None while the process runs."""
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.returncode = os.waitstatus_to_exitcode(status)
        return self.returncode

    def wait(self, timeout: float) -> int:
        """Wait for the end, and return the exit code."""
        end = time.monotonic() + timeout
        while (code := self.poll()) is None:
            if time.monotonic() > end:
                raise subprocess.TimeoutExpired(str(self.pid), timeout)
            time.sleep(0.01)
        return code

    def communicate(self, timeout: float = 60) -> tuple[str, str]:
        """Wait for the end, and return standard output and standard error, which have to fit into a pipe (64 KiB)."""
        self.wait(timeout)
        with self.stdout, self.stderr:
            return self.stdout.read(), self.stderr.read()

    def send_signal(self, number: int) -> None:
        """Send a signal, unless the process has ended."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        """Send SIGTERM."""
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """Send SIGKILL."""
        self.send_signal(signal.SIGKILL)


def _run(
    program: str, arguments: tuple[str, ...], environment: Mapping[str, str] | None, output: int, errors: int
) -> NoReturn:
    code = 1
    try:
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGALRM):
            signal.signal(number, signal.SIG_DFL)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(output, 1)
        os.dup2(errors, 2)
        os.closerange(3, 1024)  # pipes of other processes among them, which would not end otherwise
        sys.stdout, sys.stderr = os.fdopen(1, "w", encoding="utf-8"), os.fdopen(2, "w", encoding="utf-8")
        if environment is not None:
            os.environ.clear()
            os.environ.update(environment)
        sys.argv = ["program", *arguments]
        if "torch" in sys.modules:
            sys.modules["torch"].set_num_threads(1)  # OpenMP's threads do not survive a fork
        exec(compile(program, "program", "exec"), {"__name__": "__main__"})
        code = 0
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
