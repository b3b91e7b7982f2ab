"""Reading the steps of a run: compressed workflows, sub-pipelines, and servers without workflows."""

from __future__ import annotations

import base64
import datetime
import gzip
import json
import sys
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).parent))
from kfp_server import KfpServer
from kfp_server_api import models
from kfp_workflow import BEGAN, RUN, Task, pod, workflow

from esvit_pipelines.cluster.client import Server, connected
from esvit_pipelines.cluster.run_steps import read_workflow, workflow_of
from esvit_pipelines.cluster.step_log import is_user_error, parse_log

DONE = Task("prepare-data", "prepare data", (), "Succeeded", [("Succeeded", "")])
LATER = Task("knn", "k-NN", ("prepare-data",))
BETWEEN = Task("extract", "extract features", ("prepare-data",), "Running", [("Running", "")])


def test_steps_are_ordered_by_start_and_then_by_dependency() -> None:
    found = read_workflow(workflow([Task("a-last", "last", ("knn",)), LATER, DONE]))
    assert [(step.title, step.state) for step in found.steps] == [
        ("prepare data", "succeeded"),
        ("k-NN", "not started"),
        ("last", "not started"),
    ]
    assert found.steps[0].pod == pod("prepare-data") and found.steps[0].seconds == 67.0
    assert found.namespace == "kubeflow" and not found.terminated


def test_the_steps_are_the_same_with_and_without_attempts_of_every_node() -> None:
    tasks = [DONE, BETWEEN, LATER, Task("cached", "cached", (), "Succeeded"), Task("begins", "begins", (), None)]
    with_attempts, without = (read_workflow(workflow(tasks, attempts=attempts)) for attempts in (True, False))
    assert [(step.name, step.state, step.attempts) for step in with_attempts.steps] == [
        ("prepare-data", "succeeded", 1),
        ("extract", "running", 1),
        ("cached", "cached", 0),
        ("begins", "preparing", 0),
        ("knn", "not started", 0),
    ]
    assert [step.state for step in with_attempts.steps] == [step.state for step in without.steps]


def test_a_run_without_started_steps_has_a_reason() -> None:
    manifest = workflow([DONE], message="No more retries left")
    driver = next(n for n in manifest["status"]["nodes"].values() if n["name"].endswith(".root-driver(0)"))
    driver.update(phase="Error", message='error looking up service account: serviceaccount "nobody" not found')
    found = read_workflow(manifest)
    assert found.failed() is None and found.message.endswith('serviceaccount "nobody" not found')


def test_compressed_nodes_are_read() -> None:
    plain = workflow([DONE, BETWEEN])
    packed = json.loads(json.dumps(plain))
    nodes = gzip.compress(json.dumps(packed["status"].pop("nodes")).encode())
    packed["status"]["compressedNodes"] = base64.b64encode(nodes).decode()
    assert read_workflow(packed).steps[0] == read_workflow(plain).steps[0]


def test_a_step_of_a_sub_pipeline_is_named_by_its_path() -> None:
    manifest = workflow([Task("inner", "inner", (), "Running", [])])
    nested = workflow([Task("inner.knn", "k-NN", (), "Running", [("Running", "")])])
    for node in manifest["status"]["nodes"].values():
        if node["templateName"].endswith("system-container-executor"):
            node["templateName"] = "comp-inner"
    manifest["status"]["nodes"].update(nested["status"]["nodes"])
    assert [(step.name, step.state) for step in read_workflow(manifest).steps] == [
        ("inner", "running"),
        ("inner.knn", "running"),
    ]


def test_without_a_workflow_the_list_of_tasks_is_used(server: KfpServer) -> None:
    began = datetime.datetime.fromisoformat(BEGAN.replace("Z", "+00:00"))
    never = datetime.datetime.fromtimestamp(0, datetime.UTC)
    names = [(RUN, "RUNNING"), ("root", "RUNNING"), ("root-driver", "SUCCEEDED"), ("knn", "RUNNING")]
    names += [("knn-driver", "SUCCEEDED"), ("executor", "RUNNING"), ("executor(0)", "RUNNING")]
    tasks = [
        models.V2beta1PipelineTaskDetail(display_name=name, state=state, start_time=began, end_time=never)
        for name, state in names
    ]
    run = SimpleNamespace(run_id="r", run_details=models.V2beta1RunDetails(task_details=tasks))
    server.kept["runs"]["r"] = run
    with connected(Server(server.url)) as connection:
        found = workflow_of(connection, run)
    assert [(step.name, step.state, step.pod) for step in found.steps] == [("knn", "running", None)]


def test_the_exit_code_is_that_of_the_step() -> None:
    log = parse_log(
        "E1128 10:01:05.1 18 launcher_v2.go:449] Component failed to execute successfully: exit status 75\n"
    )
    assert log is not None and log.exit_code == 75
    assert not is_user_error(log, "Error (exit code 2)")
    assert is_user_error(None, "Error (exit code 2)") and not is_user_error(None, "pod deleted")


def test_an_invalid_executor_output_has_no_metrics() -> None:
    log = parse_log("x\nI1128 10:01:05.1 18 launcher_v2.go:1230] ExecutorOutput: {broken\n")
    assert log is not None and log.metrics == {} and log.outputs == {}
    assert parse_log('{"error_message":"pods \\"a\\" not found","error_details":""}') is None
