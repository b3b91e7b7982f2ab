"""Following runs over HTTP: printed state changes, outcomes, and broken connections."""

from __future__ import annotations

import json
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from cli_checks import Call, assert_error, only
from kfp_server import KfpServer
from kfp_workflow import Task, failure, handed_over, pod, workflow

WAITING = "Unschedulable: 0/1 nodes are available: 1 Insufficient cpu."
RECEIVED = '[KFP Executor 2026-11-28 10:00:01,000 INFO]: Got executor_input:\n{\n    "inputs": {\n    }\n}\n'
PREPARED = Task("prepare-data", "prepare data", (), "Succeeded", [("Succeeded", "")])


@pytest.fixture(autouse=True)
def at_once(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Replace sleeping; returns the requested pauses. The Kubernetes API is unreachable."""
    pauses: list[float] = []
    thread, sleep = threading.current_thread(), time.sleep

    def pause(seconds: float) -> None:
        """Other threads of this process, such as those of an object store's client, sleep as they did."""
        if threading.current_thread() is thread:
            pauses.append(seconds)
        else:
            sleep(seconds)

    monkeypatch.setattr("time.sleep", pause)
    monkeypatch.setenv("KUBECONFIG", "/nowhere")
    return pauses


def measured(phase: str | None, *pods: tuple[str, str]) -> Task:
    return Task("knn", "k-NN", ("prepare-data",), phase, pods)


def moments(*last: Task) -> list[dict[str, Any]]:
    """Return the workflows of a run whose first step is done, one for each state of the second step."""
    return [workflow([PREPARED, task]) for task in last]


def submitted(call: Call, compiled: Path, *options: str) -> tuple[int, list[str], str]:
    code, out, error = call("submit", compiled, "--inline", "--data", "s3://b/p", "--name", "mine", "--wait", *options)
    return code, out.splitlines(), error


def without_times(lines: list[str]) -> list[str]:
    return [line[10:] if line[2:3] == ":" and line[5:6] == ":" else line for line in lines]


# Steps and outcomes


def test_state_changes_of_steps_are_printed(server: KfpServer, call: Call, compiled: Path) -> None:
    server.states = ["PENDING", "RUNNING", "RUNNING", "RUNNING", "RUNNING", "SUCCEEDED"]
    server.workflows = [
        {},
        *moments(
            measured(None),
            measured("Running", ("Pending", WAITING)),
            measured("Running", ("Running", "")),
            measured("Running", ("Running", "")),
            measured("Succeeded", ("Succeeded", "")),
        ),
    ]
    server.logs[pod("knn")] = "k-NN ...\n" + handed_over({"accuracy_k20": 36.31, "images": 50000.0})
    code, lines, error = submitted(call, compiled)
    assert (code, error) == (0, "")
    assert without_times(lines[2:-2]) == [
        "pending",
        "prepare data  succeeded after 1:07",
        f"k-NN          waiting: {WAITING}",
        "k-NN          running",
        "k-NN          succeeded after 1:07: accuracy_k20 36.31, images 50,000",
    ]
    assert lines[-2] == "succeeded" and lines[-1] == server.url + f"/#/runs/details/{only(server.kept['runs']).run_id}"


def test_the_reason_of_the_promotion_is_printed_last(server: KfpServer, call: Call, compiled: Path) -> None:
    promote = Task("promote", "promote", (), "Succeeded", [("Succeeded", "")])
    server.states, server.workflows = ["SUCCEEDED"], [workflow([promote])]
    server.logs[pod("promote")] = handed_over({}, {"promoted": True, "reason": "36.3 beats 34.9 by 1.4"})
    code, lines, _ = submitted(call, compiled)
    assert (code, lines[-2]) == (0, "succeeded: 36.3 beats 34.9 by 1.4")


def test_cached_and_retried_steps_are_printed(server: KfpServer, call: Call, compiled: Path) -> None:
    cached = Task("prepare-data", "prepare data", (), "Succeeded")
    lost = ("Failed", "pod deleted")
    server.states = ["RUNNING", "RUNNING", "RUNNING", "SUCCEEDED"]
    server.workflows = [
        workflow([cached, measured("Running", ("Running", ""))]),
        workflow([cached, measured("Running", lost)]),
        workflow([cached, measured("Running", lost, ("Running", ""))]),
        workflow([cached, measured("Succeeded", lost, ("Succeeded", ""))]),
    ]
    _, lines, _ = submitted(call, compiled)
    assert without_times(lines[2:-2]) == [
        "prepare data  cached",
        "k-NN          running",
        "k-NN          attempt 1 failed: pod deleted",
        "k-NN          running, attempt 2; the previous one failed: pod deleted",
        "k-NN          succeeded after 1:07",
    ]


def test_a_failed_run_prints_the_last_lines_of_its_step(server: KfpServer, call: Call, compiled: Path) -> None:
    server.states = ["FAILED"]
    server.workflows = moments(measured("Failed", ("Failed", "Error (exit code 1)")))
    server.logs[pod("knn")] = failure("error: k-NN: --data s3://b/p: no images; name a prefix that has some", 2)
    code, lines, _ = submitted(call, compiled)
    assert code == 1
    start = lines.index("last lines of k-NN:")
    assert [line.strip() for line in lines[start + 1 : start + 4]] == [
        "step begins",
        "error: k-NN: --data s3://b/p: no images; name a prefix that has some",
        "Error: exit status 1",
    ]
    assert lines[-3] == "failed: k-NN: --data s3://b/p: no images; name a prefix that has some"
    assert f"runs logs {only(server.kept['runs']).run_id} knn" in lines[-2]


def test_without_an_error_line_the_reason_is_the_exit_code_of_the_step(
    server: KfpServer, call: Call, compiled: Path
) -> None:
    failed_with(server, "main: Error (exit code 1)", RECEIVED + failure("the store does not answer", 75))
    _, lines, _ = submitted(call, compiled)
    assert lines[-3] == "failed: step k-NN: exit code 75"
    start = lines.index("last lines of k-NN:")
    assert [line.strip() for line in lines[start + 1 : start + 3]] == ["step begins", "the store does not answer"]


def test_a_failed_step_without_a_log_is_named(server: KfpServer, call: Call, compiled: Path) -> None:
    server.states = ["FAILED"]
    server.workflows = moments(measured("Failed", ("Error", "pod deleted")))
    code, lines, _ = submitted(call, compiled)
    assert code == 1
    assert lines[-3:-1] == ["the log of k-NN was deleted with its pod", "failed: step k-NN: pod deleted"]


def test_a_run_without_a_workflow_is_followed_by_its_state(server: KfpServer, call: Call, compiled: Path) -> None:
    for end, code in (("SUCCEEDED", 0), ("FAILED", 1), ("CANCELED", 1)):
        server.states = ["PENDING", "RUNNING", "RUNNING", end]
        done, lines, _ = submitted(call, compiled)
        assert done == code
        assert without_times(lines[2:5]) == ["pending", "running", end.lower()]


# Outages


def test_following_survives_a_lost_connection(
    server: KfpServer, call: Call, compiled: Path, at_once: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    def later(seconds: float) -> None:
        at_once.append(seconds)
        if server.states == ["RUNNING", "SUCCEEDED"]:
            server.lost = 4
            server.states.pop(0)

    monkeypatch.setattr("time.sleep", later)
    server.states = ["RUNNING", "RUNNING", "SUCCEEDED"]
    server.workflows = moments(measured("Running", ("Running", "")), measured("Succeeded", ("Succeeded", "")))
    code, lines, error = submitted(call, compiled)
    assert (code, error) == (0, "")
    lost = [line for line in lines if "no response from the server" in line]
    assert len(lost) == 1 and "the run is not affected" in lost[0]
    assert len([line for line in lines if "the server responds again" in line]) == 1
    assert [pause for pause in at_once if pause != 5.0] == [1.0, 2.0, 4.0, 8.0]


def test_retries_during_an_outage_are_limited(
    server: KfpServer, call: Call, compiled: Path, at_once: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("esvit_pipelines.cluster.follow.OUTAGE_SECONDS", 3600)
    server.states = ["RUNNING"]
    call("submit", compiled, "--inline", "--data", "s3://b/p", "--name", "mine")
    run = only(server.kept["runs"])
    from esvit_core.errors import UserError
    from esvit_pipelines.cluster.client import Server, connected
    from esvit_pipelines.cluster.follow import follow

    with connected(Server(server.url)) as connection:
        server.down = 503
        with pytest.raises(UserError, match=f"no answer for 1:00:.*runs show {run.run_id} --wait"):
            follow(connection, run.run_id)
    assert sum(at_once) >= 3600 and max(at_once) == 30.0


def test_a_refused_request_is_not_retried(server: KfpServer, call: Call, at_once: list[float]) -> None:
    assert_error(call("runs", "show", "00000000-0000-0000-0000-000000000000", "--wait"), "it does not exist (404")
    assert at_once == []


def test_the_token_is_read_for_every_request(server: KfpServer, call: Call, compiled: Path, tmp_path: Path) -> None:
    """Kubernetes renews the token in a pod within the hour."""
    from esvit_pipelines.cluster.client import Server, connected

    token = tmp_path / "token"
    token.write_text("first")
    server.token = "first"
    with connected(Server(server.url, token_file=token)) as connection:
        server.token = "second"
        token.write_text("second")
        connection.request("GET", "/apis/v2beta1/healthz")
    assert server.authorization[-1] == "Bearer second"


def test_ctrl_c_leaves_the_run_alone_and_prints_how_to_follow_it_again(
    server: KfpServer, call: Call, compiled: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(seconds: float) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("time.sleep", interrupt)
    server.states = ["RUNNING"]
    code, lines, _ = submitted(call, compiled)
    run = only(server.kept["runs"])
    assert code == 130 and run.state == "RUNNING"
    assert f"runs show {run.run_id} --wait" in lines[-3] and f"runs terminate {run.run_id}" in lines[-1]


# Resubmission


def failed_with(server: KfpServer, message: str, log: str | None) -> None:
    server.states = ["FAILED"]
    server.workflows = moments(measured("Failed", ("Failed", message)))
    server.logs = {} if log is None else {pod("knn"): log}


@pytest.mark.parametrize(
    ("message", "log"),
    [
        ("pod deleted", None),
        ("The node was low on resource: memory.", None),
        ("main: Error (exit code 1)", failure("the store does not answer", 75)),
        ("OOMKilled (exit code 137)", failure("Killed", 137)),
    ],
)
def test_a_run_that_failed_because_of_the_cluster_is_resubmitted(
    server: KfpServer, call: Call, compiled: Path, message: str, log: str | None
) -> None:
    failed_with(server, message, log)
    code, lines, _ = submitted(call, compiled, "--resubmit", "2")
    runs = list(server.kept["runs"].values())
    assert code == 1
    assert [run.display_name for run in runs] == ["mine", "mine (attempt 2)", "mine (attempt 3)"]
    assert len({json.dumps(run.runtime_config.parameters) for run in runs}) == 1
    assert len([line for line in lines if line.startswith("resubmitting, ")]) == 2


def test_resubmission_waits_for_the_server_and_uses_the_current_token(
    server: KfpServer, call: Call, compiled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    token = tmp_path / "token"
    token.write_text("first")
    server.token = "first"
    failed_with(server, "pod deleted", None)
    from esvit_pipelines.cluster import follow

    end = follow.print_end

    def lose(*given: Any) -> None:
        end(*given)
        token.write_text("second")
        server.token, server.lost = "second", 2

    monkeypatch.setattr(follow, "print_end", lose)
    code, lines, error = submitted(call, compiled, "--resubmit", "1", "--token-file", str(token))
    assert (code, error) == (1, "") and len(server.kept["runs"]) == 2
    assert len([line for line in lines if "the server responds again" in line]) == 1


def test_a_run_with_invalid_input_is_not_resubmitted(server: KfpServer, call: Call, compiled: Path) -> None:
    failed_with(server, "Error (exit code 1)", failure("error: k-NN: no labels", 2))
    code, lines, _ = submitted(call, compiled, "--resubmit", "2")
    assert code == 1 and len(server.kept["runs"]) == 1
    assert lines[-1] == "not resubmitted: another attempt would fail in the same way"


def test_a_terminated_run_is_not_resubmitted(server: KfpServer, call: Call, compiled: Path) -> None:
    server.states = ["FAILED"]
    stopped = measured("Failed", ("Failed", "workflow shutdown with strategy: Terminate"))
    server.workflows = [workflow([PREPARED, stopped], terminated=True)]
    code, lines, _ = submitted(call, compiled, "--resubmit", "2")
    assert code == 1 and len(server.kept["runs"]) == 1
    assert "the run was terminated" in lines


def test_resubmit_requires_wait(server: KfpServer, call: Call, compiled: Path) -> None:
    assert_error(call("submit", compiled, "--data", "s3://b/p", "--resubmit", "1"), "--resubmit", "--wait")
    assert server.requests == []


# One run


@pytest.fixture
def run(server: KfpServer, call: Call, compiled: Path) -> Any:
    """A run whose second step is running."""
    call("submit", compiled, "--inline", "--data", "s3://b/p", "--name", "mine")
    found = only(server.kept["runs"])
    found.state = "RUNNING"
    server.workflows = moments(measured("Running", ("Running", "")))
    server.logs = {pod("prepare-data"): "preparing\n" + handed_over({"images": 800}), pod("knn"): "measuring\n"}
    return found


def test_runs_show_prints_the_steps(server: KfpServer, call: Call, run: Any) -> None:
    code, out, error = call("runs", "show", "mine")
    assert (code, error) == (0, "")
    lines = out.splitlines()
    assert lines[0].startswith("mine: running, ") and lines[1].split() == [
        "step",
        "state",
        "started",
        "duration",
        "attempts",
    ]
    assert lines[2].startswith("prepare data  succeeded") and lines[2].rstrip().endswith("images 800")
    assert lines[3].startswith("k-NN          running")
    shown = json.loads(call("runs", "show", run.run_id[:8], "--json")[1])
    assert [(step["name"], step["state"], step["metrics"]) for step in shown["steps"]] == [
        ("prepare-data", "succeeded", {"images": 800.0}),
        ("knn", "running", {}),
    ]
    assert shown["steps"][1]["pod"] == pod("knn") and shown["reason"] is None


def test_a_run_is_found_by_its_link(server: KfpServer, call: Call, run: Any) -> None:
    assert call("runs", "show", f"{server.url}/#/runs/details/{run.run_id}")[1].startswith("mine: running")


def test_a_missing_or_ambiguous_run_is_an_error(server: KfpServer, call: Call, run: Any, compiled: Path) -> None:
    assert_error(call("runs", "show", "yours"), "run yours: it does not exist", "`esvit runs` lists", "`esvit status`")
    call("submit", compiled, "--inline", "--data", "s3://b/p", "--name", "mine")
    assert_error(call("runs", "show", "mine"), "2 runs match", run.run_id)


def test_the_log_of_a_step(server: KfpServer, call: Call, run: Any) -> None:
    assert call("runs", "logs", "mine") == (0, "measuring\n", "")
    assert call("runs", "logs", "mine", "prepare data")[1].startswith("preparing\n")
    assert_error(call("runs", "logs", "mine", "knm"), "step knm", "did you mean 'knn'")
    del server.logs[pod("knn")]
    assert_error(call("runs", "logs", "mine"), "step k-NN (running) has no log", "--ui", "KUBECONFIG")


def test_behind_the_gateway_the_log_is_read_from_the_user_interface(server: KfpServer, call: Call, run: Any) -> None:
    server.gateway = True
    assert call("runs", "logs", "mine") == (0, "measuring\n", "")
    asked = server.queries[-1]
    assert (asked["podname"], asked["podnamespace"], asked["createdat"]) == (pod("knn"), "kubeflow", "2026-11-28")


def test_a_log_is_followed_until_the_step_ends(
    server: KfpServer, call: Call, run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def more(seconds: float) -> None:
        server.logs[pod("knn")] += "measured\n"
        server.workflows = moments(measured("Succeeded", ("Succeeded", "")))
        server.lost = 1 if seconds == 5.0 else 0

    monkeypatch.setattr("time.sleep", more)
    code, out, error = call("runs", "logs", "mine", "--follow")
    assert (code, out) == (0, "measuring\nmeasured\nmeasured\n")
    assert "no response from the server" in error and "the server responds again" in error


def test_only_an_active_run_can_be_terminated(server: KfpServer, call: Call, run: Any) -> None:
    code, out, _ = call("runs", "terminate", "mine")
    assert code == 0 and run.state == "CANCELING"
    assert out.startswith("terminating mine; to follow it:\n") and f"runs show {run.run_id} --wait" in out
    run.state = "FAILED"
    assert_error(call("runs", "terminate", "mine"), "run mine: it has already ended (failed)")


def test_only_a_failed_run_can_be_retried(server: KfpServer, call: Call, run: Any) -> None:
    assert_error(call("runs", "retry", "mine"), "run mine: it is running", "only a failed or canceled run")
    run.state = "FAILED"
    server.workflows = moments(measured("Running", ("Running", "")), measured("Succeeded", ("Succeeded", "")))
    server.states = ["FAILED", "RUNNING", "SUCCEEDED"]
    code, out, _ = call("runs", "retry", "mine", "--wait")
    assert code == 0 and out.startswith("retrying mine\n") and "succeeded" in out
    assert f"POST /apis/v2beta1/runs/{run.run_id}:retry" in server.requests


def test_an_option_before_the_command_is_an_error(server: KfpServer, call: Call) -> None:
    assert_error(call("runs", "--host", server.url, "show", "mine"), "--host", "put it after the command")
