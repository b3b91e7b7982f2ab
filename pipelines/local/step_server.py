"""Start the steps of a local run as forks of a process that has imported their libraries.

A step of a small run computes for a second, but importing PyTorch, timm, KFP and matplotlib takes three to eight. The
server imports them once and forks for each step; the first step waits for it. It computes nothing and starts no threads
before it forks. Linux only: elsewhere, libraries do not survive a fork.

    python -m esvit_pipelines.local.step_server DESCRIPTOR [finished]
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import multiprocessing
import os
import shlex
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from esvit_core.launch.signals import TERMINAL_SIGNALS, end_with_parent, outlive_signals

# What the steps import, besides small modules.
PRELOADED = (
    "kfp.dsl.executor_main",
    "esvit_core.artifacts",
    "esvit_core.models.factory",
    "esvit_core.data.ingest.prepare",
    "esvit_core.evaluation.features",
    "esvit_core.evaluation.linear_probe",
    "esvit_core.evaluation.visualize",
    "esvit_core.reporting.report",
)
# What they import if they only find their results.
PRELOADED_IF_FINISHED = (
    "kfp.dsl.executor_main",
    "esvit_core.artifacts",
    "esvit_core.data.ingest.prepare",
    "esvit_core.runs.run",
)


@contextlib.contextmanager
def step_server(folder: Path, finished: bool = False) -> Iterator[None]:
    """Let ``python3`` on the search path run the steps: in a fork of a server if there is one.

    kfp.local replaces every ``python3`` in a step's command with ``sys.executable``, unquoted and also in arguments. A
    path with a space, or an image folder with "python3" in its name, would break. With a program called ``python3`` on
    the search path, the replacement changes nothing.

    Args:
        folder: an empty folder of this user only.
        finished: the steps only find their results, for which the server need not import PyTorch.
    """
    address, client = folder / "socket", Path(__file__).with_name("step_client.py")
    python = sys.executable
    wrapper = folder / "python3"
    words = shlex.join([python, "-IS", str(client), str(address), python])
    wrapper.write_text(f'#!/bin/sh\nexec {words} "$@"\n', encoding="utf-8")
    wrapper.chmod(0o755)
    os.environ["PATH"] = f"{folder}{os.pathsep}{os.environ.get('PATH', os.defpath)}"
    sys.executable = "python3"
    if sys.platform != "linux":
        yield
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        try:
            listener.bind(str(address))
        except OSError:  # the path is too long for a socket
            yield
            return
        listener.listen()
        number = listener.fileno()
        server = subprocess.Popen(
            [python, "-m", __spec__.name, str(number), *(["finished"] if finished else [])],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            pass_fds=(number,),
        )
    try:
        yield
    finally:
        server.kill()
        server.wait()


def main(descriptor: int, preloaded: Sequence[str]) -> None:
    """Import these modules, and serve on the socket with this descriptor until the runner ends."""
    end_with_parent(os.getppid(), signal.SIGKILL)
    outlive_signals()  # a signal to the group is for the steps
    with socket.socket(fileno=descriptor) as listener:
        gc.disable()  # collections take a quarter of the time of the imports
        if "esvit_core.models.factory" in preloaded:
            from esvit_core.torch_private import import_timm_without_dynamo

            import_timm_without_dynamo()
        for name in preloaded:
            importlib.import_module(name)
        gc.freeze()  # a collection in a fork would copy all that was imported
        gc.enable()
        while True:
            connection, _ = listener.accept()
            with connection:
                code = _fork(connection)
                with contextlib.suppress(OSError):  # the client may be gone
                    connection.sendall(b"%d" % (code if code >= 0 else 128 - code))


def _fork(connection: socket.socket) -> int:
    """Run the step of a client in a fork, and return its exit code, negative for a signal.

    A process of ``multiprocessing`` ends without taking down the interpreter, which takes seconds after such imports.
    """
    step = multiprocessing.get_context("fork").Process(target=_run_step, args=(connection, os.getpid()))
    signal.pthread_sigmask(signal.SIG_BLOCK, TERMINAL_SIGNALS)
    step.start()
    signal.pthread_sigmask(signal.SIG_UNBLOCK, TERMINAL_SIGNALS)
    step.join()
    return step.exitcode or 0


def _run_step(connection: socket.socket, server: int) -> None:
    end_with_parent(server)
    _become(connection)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, TERMINAL_SIGNALS)
    from kfp.dsl.executor_main import executor_main

    executor_main()


def _become(connection: socket.socket) -> None:
    """Take over the client's arguments, environment, folder, standard streams and signals.

    If a signal has ended the client meanwhile, this process ends, too.
    """
    for number in TERMINAL_SIGNALS:
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    header, streams, _, _ = socket.recv_fds(connection, 8, 3, socket.MSG_WAITALL)
    if len(streams) < 3:
        os._exit(1)
    with connection.makefile("rb") as sent:
        request = json.loads(sent.read(int.from_bytes(header, "big")))
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
        os.close(stream)
    os.environ.clear()
    os.environ.update(request["environment"])
    os.chdir(request["folder"])
    sys.argv[1:] = request["arguments"]
    try:
        connection.sendall(b"+")
    except OSError:
        os._exit(1)


if __name__ == "__main__":
    main(int(sys.argv[1]), PRELOADED_IF_FINISHED if "finished" in sys.argv[2:] else PRELOADED)
