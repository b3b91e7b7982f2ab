"""Ctrl-C: the state is saved, nothing is left running, the same command goes on."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil

from esvit_core.storage.address import VARIABLES


def start(folder: Path, *arguments: str) -> tuple[subprocess.Popen[str], list[str]]:
    environment = {k: v for k, v in os.environ.items() if k not in VARIABLES}
    command = [sys.executable, "-m", "esvit_pipelines", *arguments]
    process = subprocess.Popen(
        command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    return process, []


def read_until(process: subprocess.Popen[str], lines: list[str], pattern: str) -> None:
    """Until a line matches; the line after the end fails."""
    assert process.stdout
    for line in process.stdout:
        lines.append(line)
        if re.search(pattern, line):
            return
    raise AssertionError(f"ended before {pattern!r}:\n{''.join(lines)}")


def left_over(folder: Path) -> list[str]:
    """Command lines of processes that work in ``folder``."""
    found = []
    for process in psutil.process_iter():
        try:
            if Path(process.cwd()).is_relative_to(folder):
                found.append(" ".join(process.cmdline()))
        except (psutil.Error, OSError):
            continue
    return found


def test_ctrl_c_in_pretraining_saves_and_the_same_command_goes_on(
    tmp_path: Path, micro_recipe: Path, pictures: Any
) -> None:
    pictures.folder(tmp_path / "pictures", ["a", "b"], 16)
    arguments = [
        "run",
        *("--data", "pictures", "--recipe", str(micro_recipe), "--out", "out"),
        *("--set", "training.epochs=150", "--set", "training.checkpoint_steps=100000"),
    ]
    process, lines = start(tmp_path, *arguments)
    read_until(process, lines, r"^\[\d+/\d+\] pretrain")
    read_until(process, lines, r"[1-9]\d*/450|step [1-9]\d+")
    process.send_signal(signal.SIGINT)  # to the command line alone: it has to pass it on
    output, _ = process.communicate(timeout=60)
    text = "".join(lines) + output
    assert process.returncode == 130, text
    assert "Traceback" not in text
    assert "interrupted; the same command goes on from here:" in text
    assert text.rstrip().splitlines()[-1].endswith(" ".join(arguments[-4:]))
    assert left_over(tmp_path) == []

    process, lines = start(tmp_path, *arguments)
    output, _ = process.communicate(timeout=200)
    assert process.returncode == 0, output
    assert "already done: found" in output or "started before" in output
    resumed = re.search(r"resuming from step (\d+) of", output)
    assert resumed and int(resumed[1]) > 0
    assert left_over(tmp_path) == []


def test_the_steps_end_when_the_command_line_is_killed(tmp_path: Path, micro_recipe: Path, pictures: Any) -> None:
    pictures.folder(tmp_path / "pictures", ["a", "b"], 16)
    arguments = ["run", "--data", "pictures", "--recipe", str(micro_recipe), "--set", "training.epochs=500"]
    process, lines = start(tmp_path, *arguments)
    read_until(process, lines, r"^\[\d+/\d+\] pretrain")
    process.kill()
    process.wait()
    deadline = time.monotonic() + 60
    while (left := [line for line in left_over(tmp_path) if "weed" not in line]) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert left == []
    # The store is found by the next command; here it has to go.
    from esvit_core.storage.embedded import EmbeddedStore

    assert EmbeddedStore(tmp_path / "esvit-runs" / "store").stop()
