"""Programs of tests in forks of a server that has imported torch: a process of its own would take seconds to do so."""

from __future__ import annotations

import functools
import multiprocessing
import os
import signal
import subprocess
import sys
import traceback
from collections.abc import Mapping
from multiprocessing import forkserver
from multiprocessing.connection import Connection
from pathlib import Path
from typing import IO, NoReturn

import pytest

TRAINING = "import runpy; runpy.run_module('esvit_core.training', run_name='__main__', alter_sys=True)"

_context = multiprocessing.get_context("forkserver")


@functools.cache
def _start_server() -> None:
    """Start the server of this process. It has run no test, so that all programs begin alike."""
    _context.set_forkserver_preload(["forked_imports"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(Path(__file__).parent))  # the server does not search sys.path (Python 3.11)
        patch.setenv("OMP_NUM_THREADS", "1")  # OpenMP's threads do not survive a fork
        forkserver.ensure_running()


class Forked:
    """A real process that runs the text of a program, with the interface of ``subprocess.Popen``.

    Args:
        program: its text; it runs as ``__main__``.
        arguments: its ``sys.argv[1:]``.
        environment: its complete environment; default: that of this process.
    """

    def __init__(self, program: str, *arguments: str, environment: Mapping[str, str] | None = None) -> None:
        _start_server()
        output, errors = _context.Pipe(duplex=False), _context.Pipe(duplex=False)
        variables = dict(os.environ if environment is None else environment)
        self._process = _context.Process(target=_run, args=(program, arguments, variables, output[1], errors[1]))
        self._process.start()
        self.stdout, self.stderr = (_text(pipe) for pipe in (output, errors))

    @property
    def returncode(self) -> int | None:
        """The exit code, negative for a signal; None while the process runs."""
        return self._process.exitcode

    def poll(self) -> int | None:
        """Return :attr:`returncode`."""
        return self.returncode

    def wait(self, timeout: float) -> int:
        """Wait for the end, and return the exit code."""
        self._process.join(timeout)
        if self.returncode is None:
            raise subprocess.TimeoutExpired(str(self._process.pid), timeout)
        return self.returncode

    def communicate(self, timeout: float = 60) -> tuple[str, str]:
        """Wait for the end, and return standard output and standard error, which have to fit into a pipe (64 KiB)."""
        self.wait(timeout)
        with self.stdout, self.stderr:
            return self.stdout.read(), self.stderr.read()

    def send_signal(self, number: int) -> None:
        """Send a signal, unless the process has ended."""
        if self.returncode is None and self._process.pid:
            os.kill(self._process.pid, number)

    def terminate(self) -> None:
        """Send SIGTERM."""
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """Send SIGKILL."""
        self.send_signal(signal.SIGKILL)


def _text(pipe: tuple[Connection, Connection]) -> IO[str]:
    """Close the end for writing, and return the one for reading as text."""
    pipe[1].close()
    with pipe[0]:
        return os.fdopen(os.dup(pipe[0].fileno()), encoding="utf-8")


def _run(
    program: str, arguments: tuple[str, ...], environment: Mapping[str, str], output: Connection, errors: Connection
) -> NoReturn:
    code = 1
    try:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_DFL)
        os.dup2(output.fileno(), 1)
        os.dup2(errors.fileno(), 2)
        output.close()
        errors.close()
        sys.stdout, sys.stderr = os.fdopen(1, "w", encoding="utf-8"), os.fdopen(2, "w", encoding="utf-8")
        os.environ.clear()
        os.environ.update(environment)
        sys.argv = ["program", *arguments]
        exec(compile(program, "program", "exec"), {"__name__": "__main__"})
        code = 0
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
