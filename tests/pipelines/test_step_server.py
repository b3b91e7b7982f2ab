"""Steps run in forks of a server exactly as in processes of their own, and end with it."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest

from esvit_pipelines.local import step_client

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="there is a step server on Linux only")
SERVER = """
import sys
from esvit_pipelines.local import step_server
step_server.main(int(sys.argv[1]), sys.argv[2:])
"""
STEP = """
import os, signal, sys, time

def step(what: str):
    print("step", what, os.environ.get("OF_THE_CLIENT"), os.getcwd(), os.getppid(), flush=True)
    print("an error message", file=sys.stderr, flush=True)
    if what == "exit":
        sys.exit(7)
    if what == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if what == "wait":
        time.sleep(60)
    if what == "raise":
        raise ValueError("from the step")
"""


class Client:
    """Starts steps as the runner does."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.address = folder, folder / "socket"
        (folder / "component.py").write_text(STEP)

    def start(self, what: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-IS", step_client.__file__, str(self.address), sys.executable]
        inputs = {"inputs": {"parameterValues": {"what": what}}, "outputs": {"outputFile": str(self.folder / "out")}}
        component = ["--component_module_path", str(self.folder / "component.py"), "--function_to_execute", "step"]
        return subprocess.Popen(
            [*command, *step_client.EXECUTOR, *component, "--executor_input", json.dumps(inputs)],
            cwd=self.folder,
            env=os.environ | {"OF_THE_CLIENT": "\udcff ü"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="surrogateescape",
        )

    def run(self, what: str) -> tuple[int, str]:
        process = self.start(what)
        output, _ = process.communicate(timeout=60)
        return process.returncode, output


@pytest.fixture
def client(tmp_path: Path) -> Client:
    return Client(tmp_path)


@contextmanager
def serving(client: Client, *preloaded: str) -> Iterator[subprocess.Popen[bytes]]:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(client.address))
        listener.listen()
        command = [sys.executable, "-c", SERVER, str(listener.fileno()), *preloaded]
        process = subprocess.Popen(command, pass_fds=(listener.fileno(),))
    yield process
    process.kill()
    process.wait()


@pytest.fixture
def server(client: Client) -> Iterator[subprocess.Popen[bytes]]:
    with serving(client, "kfp.dsl.executor_main") as process:
        yield process


def _wait_until(condition: Callable[[], Any]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.parametrize(
    ("what", "code", "line"),
    [
        ("succeed", 0, "Wrote executor output file"),
        ("exit", 7, "an error message"),
        ("raise", 1, "ValueError: from the step"),
        ("killed", 128 + signal.SIGKILL, "an error message"),
    ],
)
def test_a_step_ends_as_in_a_process_of_its_own(
    what: str, code: int, line: str, client: Client, request: pytest.FixtureRequest
) -> None:
    alone = client.run(what)
    server = request.getfixturevalue("server")
    forked = client.run(what)
    for returncode, output in (alone, forked):
        assert returncode % 256 == code % 256 or returncode == -signal.SIGKILL
        assert f"step {what} \udcff ü {client.folder}" in output and line in output
    assert f"{client.folder} {server.pid}\n" in forked[1], "it is a fork of the server"
    assert f"{client.folder} {server.pid}\n" not in alone[1]


def test_no_step_starts_after_the_run_was_asked_to_stop(client: Client, server: subprocess.Popen[bytes]) -> None:
    (client.folder / step_client.STOPPED).touch()
    assert client.run("succeed") == (1, "")


RUNNER = """
import sys, threading
from pathlib import Path
from esvit_core.launch.signals import outlive_signals
from esvit_pipelines.local import runner

stopped = Path(sys.argv[1])
seen = threading.Event()
outlive_signals(on_signal=lambda: (print("signal", stopped.exists(), flush=True), seen.set()))
runner._stop_when_parent_ends(stopped)
print("waits", flush=True)
while not seen.wait(0.05):  # the signal may come before the wait
    pass
"""


def test_the_end_of_the_command_line_first_keeps_further_steps_from_starting(tmp_path: Path) -> None:
    """Otherwise the step that starts after the signal to the running ones would not end, nor would those after it."""
    command = [sys.executable, "-c", RUNNER, str(tmp_path / step_client.STOPPED)]
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    assert process.stdout and process.stdout.readline() == "waits\n"
    assert process.communicate(timeout=60)[0] == "signal True\n"  # which closes its standard input


def test_a_server_that_cannot_import_is_not_needed(client: Client) -> None:
    with serving(client, "a_module_that_is_not_there"):
        code, output = client.run("succeed")
    assert code == 0 and "step succeed" in output


def test_a_step_ends_with_the_server(server: subprocess.Popen[bytes], client: Client) -> None:
    process = client.start("wait")
    assert process.stdout is not None
    _wait_until(lambda: process.stdout.readline().startswith("step wait"))
    (step,) = psutil.Process(server.pid).children()
    server.kill()
    assert process.wait(30) == 1
    _wait_until(lambda: not step.is_running())


def test_a_signal_before_the_step_begins_ends_it(client: Client) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(client.address))
        listener.listen()
        process = client.start("succeed")
        connection, _ = listener.accept()
        with connection:
            process.send_signal(signal.SIGTERM)
            assert process.wait(30) == -signal.SIGTERM


def test_a_signal_to_the_group_reaches_the_step_and_not_the_server(
    server: subprocess.Popen[bytes], client: Client
) -> None:
    process = client.start("wait")
    assert process.stdout is not None
    _wait_until(lambda: process.stdout.readline().startswith("step wait"))
    (step,) = psutil.Process(server.pid).children()
    for each in (server, process, step):
        os.kill(each.pid, signal.SIGTERM)
    assert process.wait(30) == 128 + signal.SIGTERM
    assert client.run("succeed")[0] == 0, "the server serves on"


def test_clients_that_end_before_their_step_begins_leave_nothing(client: Client) -> None:
    with serving(client, "kfp.dsl.executor_main") as server:
        waiting = {number: client.start("succeed") for number in (signal.SIGTERM, signal.SIGKILL)}
        time.sleep(0.2)  # less than the server's import
        for number, process in waiting.items():
            process.send_signal(number)
            assert process.wait(30) == -number
        code, output = client.run("succeed")
        assert code == 0 and f"{client.folder} {server.pid}\n" in output
        for process in waiting.values():
            assert process.stdout is not None and process.stdout.read() == ""


def test_other_programs_are_started_directly(server: subprocess.Popen[bytes], client: Client) -> None:
    command = [sys.executable, "-IS", step_client.__file__, str(client.address), sys.executable, "-c", "print(6 * 7)"]
    assert subprocess.run(command, capture_output=True, text=True).stdout == "42\n"
