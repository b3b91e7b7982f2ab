"""Ctrl-C saves the state and leaves no process, and the same command resumes."""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest

from esvit_core.storage.address import VARIABLES


@contextlib.contextmanager
def started(folder: Path, *arguments: str) -> Iterator[tuple[subprocess.Popen[str], list[str]]]:
    """Start the command line in ``folder``; yields the process and a list for its lines, and ends it with the block."""
    environment = {k: v for k, v in os.environ.items() if k not in VARIABLES}
    command = [sys.executable, "-m", "esvit_pipelines", *arguments]
    process = subprocess.Popen(
        command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    try:
        yield process, []
    finally:
        if process.poll() is None:  # the test failed
            process.terminate()
            process.communicate(timeout=240)


def read_until(process: subprocess.Popen[str], lines: list[str], pattern: str) -> None:
    """Read lines until one matches; fail if the output ends before that."""
    assert process.stdout
    for line in process.stdout:
        lines.append(line)
        if re.search(pattern, line):
            return
    raise AssertionError(f"ended before {pattern!r}:\n{''.join(lines)}")


def left_over(folder: Path) -> list[str]:
    """Return the command lines of processes whose working directory is below ``folder``."""
    found = []
    for process in psutil.process_iter():
        try:
            if Path(process.cwd()).is_relative_to(folder):
                found.append(" ".join(process.cmdline()))
        except (psutil.Error, OSError):
            continue
    return found


@dataclass(frozen=True)
class Interrupted:
    """A run on unlabelled images that was interrupted with Ctrl-C during pre-training, and then repeated.

    Args:
        folder: the working directory.
        arguments: arguments of the command.
        code: exit code of the first attempt.
        first: what it printed.
        left: processes that it left behind.
        again: the second attempt.
    """

    folder: Path
    arguments: list[str]
    code: int
    first: str
    left: list[str]
    again: subprocess.CompletedProcess[str]


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory: pytest.TempPathFactory, micro_recipe: Path, images: Any, esvit: Any) -> Interrupted:
    folder = tmp_path_factory.mktemp("interrupted")
    images.folder(folder / "python3 images", [""], 30)  # kfp.local would replace python3 in this path
    arguments = [
        "run",
        *("--data", "python3 images", "--recipe", str(micro_recipe), "--out", "out", "--bucket", "mine"),
        *("--set", "recipe=My own/One", "--set", "training.epochs=16", "--set", "training.checkpoint_steps=100000"),
    ]
    with started(folder, *arguments) as (process, lines):
        read_until(process, lines, r"^\[\d+/\d+\] pretrain")
        read_until(process, lines, r"train  [1-9]\d*/\d+ steps")
        process.send_signal(signal.SIGINT)  # to the command line only, which has to forward it
        output, _ = process.communicate(timeout=200)
    left = left_over(folder)
    again = esvit(*arguments, cwd=folder)
    return Interrupted(folder, arguments, process.returncode, "".join(lines) + output, left, again)


# The first test waits for both attempts, which takes minutes on a busy machine.
pytestmark = pytest.mark.timeout(900)


def test_ctrl_c_stops_the_run_and_prints_how_to_resume(interrupted: Interrupted) -> None:
    assert interrupted.code == 130, interrupted.first
    assert "Traceback" not in interrupted.first
    lines = interrupted.first.rstrip().splitlines()
    assert lines[-2] == "interrupted; rerun the command to resume:"
    assert shlex.split(lines[-1])[-len(interrupted.arguments) :] == interrupted.arguments


def test_an_interrupted_run_leaves_no_process(interrupted: Interrupted) -> None:
    assert interrupted.left == []
    assert left_over(interrupted.folder) == []


def test_the_same_command_resumes_from_the_checkpoint(interrupted: Interrupted) -> None:
    assert interrupted.again.returncode == 0, interrupted.again.stdout + interrupted.again.stderr
    assert "resumed: finished steps are reused" in interrupted.again.stdout
    resumed = re.search(r"resuming from step (\d+) of", interrupted.again.stdout)
    assert resumed and int(resumed[1]) > 0, interrupted.again.stdout


def test_evaluations_that_need_labels_are_skipped_with_a_reason(interrupted: Interrupted) -> None:
    message = interrupted.again.stdout
    assert message.count("skipped: ") >= 2 and "not measured" in message and "promoted  no" in message
    (here,) = interrupted.folder.glob("out/my-own-one-*")
    assert (here / "backbone" / "model.safetensors").is_file()
    assert "label" in (here / "report.html").read_text(encoding="utf-8")


def test_everything_is_in_the_named_bucket(interrupted: Interrupted, esvit: Any) -> None:
    out = interrupted.folder / "out"
    assert "s3://mine/runs/my-own-one-" in esvit("store", "ls", "s3://mine", "--out", out).stdout
    assert "0 objects" in esvit("store", "ls", "--out", out).stdout


def test_the_steps_end_when_the_command_line_is_killed(tmp_path: Path, micro_recipe: Path, images: Any) -> None:
    images.folder(tmp_path / "images", ["a", "b"], 16)
    arguments = ["run", "--data", "images", "--recipe", str(micro_recipe), "--set", "training.epochs=500"]
    with started(tmp_path, *arguments) as (process, lines):
        read_until(process, lines, r"^\[\d+/\d+\] pretrain")
        process.kill()
        process.wait()
    deadline = time.monotonic() + 60
    while (left := [line for line in left_over(tmp_path) if "weed" not in line]) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert left == []
    # The store keeps running for the next command; stop it here.
    from esvit_core.storage.embedded import EmbeddedStore

    assert EmbeddedStore(tmp_path / "esvit-runs" / "store").stop()
