"""`esvit status` and `esvit logs` on a finished run, with no server running."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from esvit_core.errors import UserError
from esvit_core.storage.address import VARIABLES
from esvit_pipelines.cli import status_commands
from esvit_pipelines.local.attempt import in_progress


@pytest.fixture
def location(finished_run: Any, monkeypatch: pytest.MonkeyPatch) -> status_commands.RunLocation:
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    return status_commands.RunLocation(finished_run.out, "esvit")


def test_the_runs_of_a_store(
    location: status_commands.RunLocation, finished_run: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    status_commands.show_runs(location, as_json=False)
    assert f"{finished_run.name} finished" in " ".join(capsys.readouterr().out.split())
    status_commands.show_runs(location, as_json=True)
    (run,) = json.loads(capsys.readouterr().out)
    assert (run["name"], run["state"], run["restarts"]) == (finished_run.name, "finished", 0)


def test_a_run_is_found_by_a_prefix_of_its_name(
    location: status_commands.RunLocation, finished_run: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    status_commands.show_status(location, "micro", follow=True, as_json=False)  # it has ended, so this does not wait
    text = capsys.readouterr().out
    assert finished_run.name in text and "100 %" in text and "pretrain started  from step 0" in text


def test_the_log_has_every_line_in_order(
    location: status_commands.RunLocation, capsys: pytest.CaptureFixture[str]
) -> None:
    status_commands.show_logs(location, None, follow=True, as_json=True)
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert lines[0]["kind"] == "started"
    steps = [line["step"] for line in lines if line["kind"] == "log"]
    assert steps == list(range(1, len(steps) + 1)) and len(steps) > 5
    status_commands.show_logs(location, None, follow=False, as_json=False)
    assert len(capsys.readouterr().out.splitlines()) == len(lines)


def test_lines_with_equal_times_are_all_printed(
    location: status_commands.RunLocation, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    read_log = status_commands.read_log
    monkeypatch.setattr(
        status_commands, "read_log", lambda *given: [{**line, "time": 1.8e9} for line in read_log(*given)]
    )
    status_commands.show_logs(location, None, follow=True, as_json=True)
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    steps = [line["step"] for line in lines if line["kind"] == "log"]
    assert steps == list(range(1, len(steps) + 1)) and len(steps) > 5


def test_an_active_command_is_detected_on_its_machine(tmp_path: Path) -> None:
    location = status_commands.RunLocation(tmp_path, "esvit")
    assert location._alive("run-a") is None  # it was started on another machine
    (tmp_path / "run-a").mkdir()
    with in_progress(tmp_path / "run-a"):
        assert location._alive("run-a") is True
    assert location._alive("run-a") is False


def test_a_run_that_does_not_exist_is_one_line_with_the_nearest_name(esvit: Any, finished_run: Any) -> None:
    wrong = finished_run.name[:-1] + "#"
    for command in ("status", "logs"):
        done = esvit(command, wrong, "--out", finished_run.out)
        assert done.returncode == 2 and not done.stdout
        (line,) = done.stderr.splitlines()
        assert line.startswith(f"error: run {wrong}: ") and f"did you mean {finished_run.name!r}?" in line


def test_mistakes_are_told_and_leave_nothing(location: status_commands.RunLocation, tmp_path: Any) -> None:
    with pytest.raises(UserError, match="there is no store"):
        status_commands.show_runs(status_commands.RunLocation(tmp_path, "esvit"), as_json=False)
    assert not list(tmp_path.iterdir())
    with pytest.raises(UserError, match="bucket other: it is not in the store"):
        status_commands.show_runs(status_commands.RunLocation(location.out, "other"), as_json=False)
