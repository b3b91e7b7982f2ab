"""Runs without streams, home, user name or folder finish, or end with one line and no process."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from esvit_core.storage.address import VARIABLES

pytestmark = pytest.mark.timeout(1800)  # whole runs, which take minutes on a busy machine
READER_GONE = "warning: standard output cannot be written to (its reader has exited); the run continues without it"
ESVIT = [sys.executable, "-m", "esvit_pipelines"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, images: Any, micro_recipe: Path) -> Path:
    """A folder of images, and the micro recipe with one epoch beside it."""
    made = tmp_path_factory.mktemp("process-setup")
    images.folder(made / "images", ["a", "b"], 8)
    text = micro_recipe.read_text(encoding="utf-8").replace("epochs: 2, batch_size: 8", "epochs: 1, batch_size: 4")
    (made / "micro.yaml").write_text(text, encoding="utf-8")
    return made


def environment(**changes: str) -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name not in VARIABLES} | changes


def left_over(folder: Path) -> list[str]:
    """Return the command lines of processes that mention a folder or work in it."""
    found = []
    for process in psutil.process_iter():
        try:
            command = " ".join(process.cmdline())
            if str(folder) in command or Path(process.cwd()).is_relative_to(folder):
                found.append(command)
        except (psutil.Error, OSError):
            continue
    return found


def without_passwd_entry() -> list[str]:
    """Return a command prefix that runs under a user id without an entry in /etc/passwd."""
    command = ["unshare", "--user", "--map-user=54321"]
    if shutil.which("unshare") and subprocess.run([*command, "true"], capture_output=True).returncode == 0:
        return command
    pytest.fail("no user namespace can be made here, and nothing else gives a user without an entry in /etc/passwd")


def test_a_run_without_standard_streams_home_and_user_name_finishes(folder: Path) -> None:
    """`esvit run <&- >&-` in a container whose user id has no name."""
    bare = environment()
    for name in ("HOME", "USER", "LOGNAME", "LNAME", "USERNAME"):
        bare.pop(name, None)
    command = [*without_passwd_entry(), *ESVIT, "run", "--data", "images", "--recipe", "micro.yaml", "--out", "bare"]
    closed = ["sh", "-c", 'exec "$@" <&- >&-', "sh", *command]
    done = subprocess.run(closed, cwd=folder, env=bare, stderr=subprocess.PIPE, text=True, timeout=1500)
    assert (done.returncode, done.stderr) == (0, "")
    (here,) = folder.glob("bare/micro-*")
    assert (here / "report.html").is_file() and (here / "backbone" / "model.safetensors").is_file()
    assert (here / ".lock").read_bytes() == b""  # nothing was printed into a file that got the number of a stream
    assert left_over(folder) == []


def test_a_run_whose_reader_has_exited_finishes_with_one_warning(folder: Path) -> None:
    """`esvit run | head -1`."""
    command = [*ESVIT, "run", "--data", "images", "--recipe", "micro.yaml", "--out", "unread"]
    process = subprocess.Popen(
        command, cwd=folder, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None and process.stderr is not None
    assert process.stdout.readline().startswith("run micro-")
    process.stdout.close()
    message = process.stderr.read()
    assert process.wait(1500) == 0, message
    assert message.splitlines() == [READER_GONE]
    assert list(folder.glob("unread/micro-*/report.html"))
    assert left_over(folder) == []


def test_printing_commands_end_silently_with_their_reader() -> None:
    """`esvit recipe show demo | head -1`."""
    process = subprocess.Popen(
        [*ESVIT, "recipe", "show", "demo"], env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdout is not None and process.stderr is not None
    process.stdout.close()
    assert process.stderr.read() == b""
    process.wait(60)


def test_a_closed_stream_does_not_reuse_the_number_of_a_file(tmp_path: Path) -> None:
    script = """
import os
from esvit_pipelines.local.process_setup import open_closed_streams
open_closed_streams()
with open(os.environ["PLACE"], "w") as file:
    os.system("echo from a child process")
    print("from this one")
    assert file.fileno() > 2
"""
    place = tmp_path / "file"
    closed = ["sh", "-c", 'exec "$@" <&- >&- 2>&-', "sh", sys.executable, "-c", script]
    done = subprocess.run(closed, env=environment(PLACE=str(place)), timeout=60)
    assert done.returncode == 0 and place.read_bytes() == b""


def test_a_run_without_reader_trains_until_its_folder_is_deleted_and_leaves_no_process(
    folder: Path, request: pytest.FixtureRequest
) -> None:
    command = [*ESVIT, "run", "--data", "images", "--recipe", "micro.yaml", "--out", "gone"]
    command += ["--set", "training.epochs=100000"]
    process = subprocess.Popen(
        command, cwd=folder, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    request.addfinalizer(process.terminate)  # if the test fails
    assert process.stdout is not None and process.stderr is not None
    assert process.stdout.readline().startswith("run micro-")
    process.stdout.close()
    assert process.stderr.readline() == f"{READER_GONE}\n"
    while sum(len(re.findall(r"train .* steps", log.read_text())) for log in folder.glob("gone/micro-*/run.log")) < 2:
        assert process.poll() is None
        time.sleep(0.1)
    shutil.rmtree(folder / "gone", ignore_errors=True)
    message = process.stderr.read()
    assert process.wait(900) not in (0, None)
    (line,) = message.splitlines()
    assert line.startswith("error: ") and "was deleted while in use" in line, message
    assert left_over(folder) == []
