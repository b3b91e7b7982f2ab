"""The lines of a run that the screen shows, and those that only the log has."""

from __future__ import annotations

import io
import logging

from esvit_pipelines.local.step_console import KfpRecords, LineFilter, StepConsole


def shown(text: str) -> list[str]:
    lines = LineFilter()
    return [line for line in text.splitlines() if lines.shows(line)]


def test_lines_of_the_executor_are_not_shown() -> None:
    text = """[KFP Executor 2026-01-01 00:00:00,000 INFO]: Looking for component `knn` in --component_module_path
[KFP Executor 2026-01-01 00:00:00,000 INFO]: Got executor_input:
{
    "inputs": {
        "parameterValues": {}
    }
}
prepare  1/2 images
[KFP Executor 2026-01-01 00:00:00,000 INFO]: Wrote executor output file to /x."""
    assert shown(text) == ["prepare  1/2 images"]


def test_warnings_are_not_shown() -> None:
    text = """/x/torch/nn.py:12: FutureWarning: this changes
  warnings.warn("this changes")
step 1
W1123 20:00:00.000000 12 torch/distributed/run.py:803] note
[rank0]:[W1123 something]"""
    assert shown(text) == ["step 1"]


def test_a_traceback_is_not_shown_but_its_last_line_is_kept() -> None:
    lines = LineFilter()
    text = """step 1
Traceback (most recent call last):
  File "x.py", line 1, in f
    raise KeyError("a")
KeyError: 'a'

During handling of the above exception, another exception occurred:

Traceback (most recent call last):
  File "x.py", line 3, in g
ValueError: out of cheese
step 2"""
    assert [line for line in text.splitlines() if line and lines.shows(line)] == ["step 1", "step 2"]
    assert lines.last_error == "ValueError: out of cheese"


def test_error_lines_are_left_to_the_command_line() -> None:
    assert shown("error: prepare data: /x: no images\nnote") == ["note"]


def test_headers_count_the_steps_and_everything_is_in_the_log() -> None:
    screen, log = io.StringIO(), io.StringIO()
    console = StepConsole(["prepare data", "k-NN"], screen, log)
    records = KfpRecords(console)
    root = logging.LogRecord("root", logging.INFO, "", 0, "Executing task \x1b[96m'prepare-data'\x1b[0m", None, None)
    assert not records.filter(root)
    console.write("    prepare  1/2 ima")
    console.write("ges\n    [KFP Executor x]: secret of the machinery\n\n----------\n")
    root.msg = "Executing task \x1b[96m'knn'\x1b[0m"
    records.filter(root)
    assert screen.getvalue().splitlines() == ["[1/2] prepare data", "  prepare  1/2 images", "[2/2] k-NN"]
    assert "secret of the machinery" in log.getvalue() and "step 2: k-NN" in log.getvalue()


class Closed(io.StringIO):
    """A terminal that was closed."""

    def write(self, text: str) -> int:
        raise BrokenPipeError


def test_a_closed_screen_does_not_stop_the_run() -> None:
    log = io.StringIO()
    console = StepConsole(["k-NN"], Closed(), log)
    console.start_step("knn")
    console.write("    measured\n")
    assert "measured" in log.getvalue()
