"""A step in its pod: repeated after an infrastructure failure, in real processes of KFP's own executor."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from esvit_core.errors import TRY_AGAIN_EXIT_CODE, USER_ERROR_EXIT_CODE
from esvit_core.repetition import LONGEST_WAIT_SECONDS, variables, wait_before

ROOT = Path(__file__).parents[1]
# As KFP writes it into the container: the source of the component, run by its executor.
COMPONENT = """
from kfp import dsl
from kfp.dsl import *

def flaky(starts: str, failures: str) -> str:
    from pathlib import Path
    from esvit_core import errors

    with errors.step("flaky"):
        with Path(starts).open("a") as file:
            file.write("started\\n")
        kinds = failures.split()
        number = len(Path(starts).read_text().splitlines())
        if number <= len(kinds):
            raise getattr(errors, kinds[number - 1])("s3://b/k: a reason")
    return f"done at start {number}"
"""


@pytest.fixture
def start(tmp_path: Path):
    """Start the step with these failures, one a start, and this environment."""
    (tmp_path / "component.py").write_text(COMPONENT)
    output = {
        "parameters": {"Output": {"outputFile": str(tmp_path / "parameter")}},
        "outputFile": str(tmp_path / "output.json"),
    }

    def started(failures: str, environment: dict[str, str]) -> subprocess.Popen[str]:
        given = {"parameterValues": {"starts": str(tmp_path / "starts"), "failures": failures}}
        executed = {"inputs": given, "outputs": output}
        command = ["--component_module_path", str(tmp_path / "component.py"), "--function_to_execute", "flaky"]
        return subprocess.Popen(
            [sys.executable, "-m", "kfp.dsl.executor_main", *command, "--executor_input", json.dumps(executed)],
            env=os.environ | {"_KFP_RUNTIME": "true", "PYTHONPATH": str(ROOT)} | environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    return started


def starts(folder: Path) -> int:
    path = folder / "starts"
    return len(path.read_text().splitlines()) if path.exists() else 0


def test_a_step_is_repeated_until_the_infrastructure_is_back(start, tmp_path: Path) -> None:
    step = start("InfrastructureError InfrastructureError", variables(5, 0.01))
    output, _ = step.communicate(timeout=240)
    assert step.returncode == 0, output
    assert starts(tmp_path) == 3
    assert json.loads((tmp_path / "output.json").read_text())["parameterValues"] == {"Output": "done at start 3"}
    lines = [line for line in output.splitlines() if line.startswith(("error:", "flaky:"))]
    assert lines == [
        "error: flaky: s3://b/k: a reason",
        "flaky: retrying in 0.01 s (1 of 5)",
        "error: flaky: s3://b/k: a reason",
        "flaky: retrying in 0.02 s (2 of 5)",
    ]
    assert "Traceback" not in output


@pytest.mark.parametrize(
    ("failures", "environment", "code", "number"),
    [
        ("InfrastructureError " * 9, variables(2, 0.01), TRY_AGAIN_EXIT_CODE, 3),  # as often as it may
        ("UserError", variables(5, 0.01), USER_ERROR_EXIT_CODE, 1),  # a mistake
        ("InfrastructureError UserError", variables(5, 0.01), USER_ERROR_EXIT_CODE, 2),
        ("InfrastructureError", {}, TRY_AGAIN_EXIT_CODE, 1),  # on one machine
    ],
)
def test_a_step_is_not_repeated(
    start, tmp_path: Path, failures: str, environment: dict[str, str], code: int, number: int
) -> None:
    step = start(failures, environment)
    output, _ = step.communicate(timeout=240)
    assert (step.returncode, starts(tmp_path)) == (code, number), output


def test_a_step_that_waits_ends_when_its_pod_does(start, tmp_path: Path) -> None:
    step = start("InfrastructureError", variables(5, 3600))
    end = time.monotonic() + 240
    while starts(tmp_path) < 1 and time.monotonic() < end:
        time.sleep(0.05)
    for line in step.stdout:
        if "retrying" in line:
            break
    step.send_signal(signal.SIGTERM)
    assert step.wait(60) == -signal.SIGTERM and starts(tmp_path) == 1


def test_waits_grow_up_to_ten_minutes() -> None:
    assert [wait_before(done, 30) for done in range(7)] == [30, 60, 120, 240, 480, 600, 600] and (
        LONGEST_WAIT_SECONDS == 600
    )
