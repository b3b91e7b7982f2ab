"""A step that follows its Volcano job, against a server with the Kubernetes API."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from esvit_core.config import Config
from esvit_core.errors import EsvitError, InfrastructureError, UserError
from esvit_core.launch.kubernetes.follow import LAST_RUNNING, launch_on_cluster
from esvit_core.launch.kubernetes.training_pod import job_name
from esvit_core.launch.kubernetes.volcano import volcano_job
from esvit_core.runs.events import read_events
from esvit_core.runs.run import open_run, start_run

sys.path.insert(0, str(Path(__file__).parent))
from kube_server import KubeServer, Stage, launching, serving

RUNNING = Stage("Running", {0: "running", 1: "running"})
WORKFLOW = {"apiVersion": "argoproj.io/v1alpha1", "kind": "Workflow", "name": "esvit-pretrain-x", "uid": "uid-of-x"}
DONE = Stage("Completed", {0: "done", 1: "done"})
LOG = [
    "2026-11-25T04:00:06.100000000Z train: swin, 2 processes on cpu",
    "2026-11-25T04:00:06.100000001Z train  1/8 steps  12 %",
    "2026-11-25T04:00:06.100000001Z train  1/8 steps  12 %",
    "2026-11-25T04:00:07.000000000Z train: done, 8 steps",
]


@pytest.fixture
def kube(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[KubeServer]:
    with serving(tmp_path, monkeypatch) as server:
        yield server


@pytest.fixture
def train(kube: KubeServer, store_env: Any) -> Callable[..., None]:
    return launching(store_env, "volcano")


def test_a_training_is_followed_to_its_end(
    kube: KubeServer, train: Callable[..., None], store_env: Any, capfd: pytest.CaptureFixture[str]
) -> None:
    kube.log = LOG
    kube.script = [
        Stage("Pending", {0: "unscheduled", 1: "unscheduled"}, "full"),
        Stage("Pending", {0: "starting", 1: "starting"}),
        RUNNING,
        RUNNING,
        Stage("Restarting", {0: "running", 1: "parted"}),
        Stage("Pending", {0: "running", 1: "starting"}),
        RUNNING,
        Stage("Completing", {0: "done", 1: "running"}),
        DONE,
    ]
    train()
    output = capfd.readouterr()
    name = job_name(store_env.uri("runs/a"))
    lines = [line for line in output.out.splitlines() if line.startswith("train: ")]
    assert lines[0] == f"train: created the Volcano job esvit/{name}: nodes 1 to 2, processes on each 1"
    message = [line.partition(f"esvit/{name}: ")[2] for line in lines[1:] if f"esvit/{name}: " in line]
    assert message[0] == (
        "waiting: NotEnoughResources: 1/2 tasks in gang unschedulable: pod group is not ready, 2 Pending, "
        "1 minAvailable; Pending: 2 Unschedulable"
    )
    assert message[1:] == [
        "waiting",
        "running, 2 pods running",
        "restarting, 1 pod running",
        "waiting",
        "running, 2 pods running",
        "ending, 1 pod running",
        "succeeded",
    ]
    assert f"train: pod {name}-training-1-0: disconnected from the other nodes" in output.out
    assert output.out.count("train  1/8 steps  12 %\n") == 1  # what the API repeats is printed once
    assert "train: done, 8 steps\n" in output.out and "2026-11-25T04" not in output.out
    posted = next(body for method, _, body in kube.requests if method == "POST")
    credentials = store_env.address.environment()
    for text in (json.dumps(posted), output.out, output.err):
        for variable in ("ESVIT_S3_ACCESS_KEY", "ESVIT_S3_SECRET_KEY"):
            assert credentials[variable] not in text


def test_waiting_for_quota_is_reported_and_limited(
    kube: KubeServer, train: Callable[..., None], capfd: pytest.CaptureFixture[str]
) -> None:
    kube.script = [Stage("Pending", {}, "waiting", "quota")]
    with pytest.raises(UserError, match=r"waited for 0.005 minutes.*insufficient nvidia.com/gpu.*request fewer"):
        train("launch.pending_minutes=0.005", "launch.queue=small")
    assert (
        "waiting: queue small: queue resource quota insufficient: insufficient nvidia.com/gpu" in capfd.readouterr().out
    )
    assert not kube.jobs


HOUR_AGO = (datetime.now(UTC) - timedelta(hours=1)).strftime("%Y-%m-%dT%H:%M:%SZ")


def job_of_an_hour(uri: str, **annotations: str) -> dict[str, Any]:
    """A job that another step made an hour ago."""
    job = volcano_job(uri, Config.load("demo", ["launch.scheduler=volcano"]))
    job["metadata"]["creationTimestamp"] = HOUR_AGO
    job["metadata"]["annotations"] |= annotations
    return job


@pytest.mark.parametrize("phase", ["Pending", "Restarting"])
def test_a_repeated_step_continues_to_count_the_waiting_time(
    kube: KubeServer, train: Callable[..., None], store_env: Any, phase: str
) -> None:
    kube.put(job_of_an_hour(store_env.uri("runs/a")), phase)
    kube.script = [Stage(phase), Stage("Restarting"), Stage("Pending"), RUNNING, DONE]
    with pytest.raises(UserError, match="waited for 30 minutes"):
        train("launch.pending_minutes=30")
    assert not kube.jobs


def test_a_job_that_ran_lately_may_wait_again(kube: KubeServer, train: Callable[..., None], store_env: Any) -> None:
    lately = (datetime.now(UTC) - timedelta(minutes=10)).isoformat(timespec="seconds")
    kube.put(job_of_an_hour(store_env.uri("runs/a"), **{LAST_RUNNING: lately}), "Pending")
    kube.script = [Stage("Pending"), Stage("Pending"), RUNNING, Stage("Pending"), DONE]
    train("launch.pending_minutes=30")
    (job,) = kube.jobs.values()
    assert job["metadata"]["annotations"][LAST_RUNNING] > lately  # noted for the next step


def test_an_image_that_cannot_be_pulled_is_reported(
    kube: KubeServer, train: Callable[..., None], capfd: pytest.CaptureFixture[str]
) -> None:
    kube.script = [Stage("Pending", {0: "no-image"}), RUNNING, DONE]
    train()
    assert 'ImagePullBackOff: Back-off pulling image "registry.example/esvit/trainer:9"' in capfd.readouterr().out


@pytest.mark.parametrize(
    "phase, pods, words, code",
    [
        ("Terminated", {0: "lost", 1: "mistake"}, r"^data: expected images; add some$", 2),
        (
            "Failed",
            {0: "lost", 1: "killed"},
            r"^training: process 0 was killed by SIGKILL.*training-1-0\); rerun the command",
            75,
        ),
        ("Failed", {0: "memory", 1: "parted"}, r"ran out of memory; raise cluster.train.memory", 75),
        ("Terminated", {0: "crashed"}, r"exit code 1: ModuleNotFoundError: No module named 'esvit_core'", 1),
        ("Failed", {0: "evicted"}, r"Evicted: The node was low on resource: ephemeral-storage", 75),
        ("Failed", {}, r"the job ended and no pod has a reason \(Failed\)", 75),
        ("Aborted", {0: "parted"}, r"was aborted by somebody else", 75),
    ],
)
def test_the_first_failure_is_the_reason(
    kube: KubeServer,
    train: Callable[..., None],
    store_env: Any,
    phase: str,
    pods: dict[int, str],
    words: str,
    code: int,
) -> None:
    kube.script = [RUNNING, Stage(phase, pods)]
    with pytest.raises(EsvitError, match=words) as caught:
        train()
    assert caught.value.exit_code == code
    (entry,) = read_events(store_env, store_env.uri("runs/a"))
    assert (entry.kind, entry.reason) == ("failed", str(caught.value))


def test_a_pod_that_was_replaced_is_still_the_reason(kube: KubeServer, train: Callable[..., None]) -> None:
    kube.script = [Stage("Running", {0: "running", 1: "memory"}), RUNNING, Stage("Failed", {0: "parted", 1: "parted"})]
    with pytest.raises(InfrastructureError, match="ran out of memory"):
        train()


@pytest.mark.parametrize(
    "refusals, words",
    [
        (
            {("POST", "jobs"): (403, "jobs is forbidden")},
            "jobs is forbidden.*needs the verb create on jobs.batch.volcano",
        ),
        ({("GET", "jobs"): (404, "")}, "does not know jobs.batch.volcano.sh; install Volcano 1.11 or newer"),
        ({("GET", "jobs"): (401, "Unauthorized")}, "refused the token"),
        ({("POST", "jobs"): (422, "unable to find job queue")}, "could not create.*unable to find job queue"),
        ({("GET", "pods"): (403, "")}, "needs the verb list on pods"),
    ],
)
def test_a_refusal_of_the_cluster_is_reported_in_one_line(
    kube: KubeServer, train: Callable[..., None], refusals: dict[tuple[str, str], tuple[int, str]], words: str
) -> None:
    kube.refusals = refusals
    with pytest.raises(UserError, match=words):
        train()


def test_a_missing_permission_for_events_or_logs_does_not_end_the_training(
    kube: KubeServer, train: Callable[..., None], capfd: pytest.CaptureFixture[str]
) -> None:
    kube.script = [Stage("Pending", {0: "unscheduled"}), RUNNING, RUNNING, RUNNING, DONE]
    kube.refusals = {("GET", "podgroups"): (403, "no groups"), ("GET", "pods/log"): (403, "no logs")}
    train()
    output = capfd.readouterr().out
    assert "needs the verb get on podgroups.scheduling.volcano.sh" in output
    assert "needs the verb get on pods/log" in output


def test_requests_to_an_api_that_fails_are_retried(
    kube: KubeServer, train: Callable[..., None], capfd: pytest.CaptureFixture[str]
) -> None:
    kube.script = [RUNNING, RUNNING, DONE]
    kube.failing = {("GET", "pods"): 2}
    train()
    assert "the API answered 500 etcdserver: request timed out; retrying" in capfd.readouterr().out


def test_a_repeated_step_follows_the_existing_job(
    kube: KubeServer, train: Callable[..., None], store_env: Any, capfd: pytest.CaptureFixture[str]
) -> None:
    uri = store_env.uri("runs/a")
    kube.put(volcano_job(uri, Config.load("demo", ["launch.scheduler=volcano"])), "Running")
    kube.script = [RUNNING, RUNNING, DONE]
    train()
    assert f"found the Volcano job esvit/{job_name(uri)}, Running; following it" in capfd.readouterr().out
    assert "POST" not in {method for method, _, _ in kube.requests}


@pytest.mark.parametrize("phase", ["Failed", "Completed", "Aborted", "Terminated"])
def test_a_job_that_has_ended_is_replaced(
    kube: KubeServer, train: Callable[..., None], store_env: Any, capfd: pytest.CaptureFixture[str], phase: str
) -> None:
    kube.put(volcano_job(store_env.uri("runs/a"), Config.load("demo", ["launch.scheduler=volcano"])), phase)
    kube.script = [Stage(phase, {0: "killed"}), RUNNING, DONE]
    train()
    methods = [method for method, path in kube.verbs() if "/jobs" in path]
    assert methods.index("DELETE") < methods.index("POST")
    assert "a new job resumes from its checkpoint" in capfd.readouterr().out


def test_a_job_of_another_run_is_left_alone(kube: KubeServer, train: Callable[..., None], store_env: Any) -> None:
    job = volcano_job(store_env.uri("runs/a"), Config.load("demo", ["launch.scheduler=volcano"]))
    job["metadata"]["annotations"]["esvit.dev/run-uri"] = "s3://other/runs/a"
    kube.put(job, "Running")
    with pytest.raises(UserError, match="is of another run, s3://other/runs/a"):
        train()
    assert kube.jobs


def test_two_steps_at_once_share_one_job(kube: KubeServer, train: Callable[..., None]) -> None:
    kube.script = [RUNNING] * 20 + [DONE]
    others: list[BaseException | None] = []

    def other() -> None:
        try:
            train()
            others.append(None)
        except BaseException as error:
            others.append(error)

    thread = threading.Thread(target=other)
    thread.start()
    train()
    thread.join()
    assert others == [None]
    created = [body["metadata"]["name"] for method, path, body in kube.requests if method == "POST" and "/jobs" in path]
    assert len(kube.jobs) == 1 and len(set(created)) == 1


def test_a_job_that_vanishes_is_a_failure(kube: KubeServer, train: Callable[..., None]) -> None:
    kube.script = [RUNNING] * 1000
    kube.at[3] = kube.jobs.clear
    with pytest.raises(InfrastructureError, match="was deleted by somebody else; rerun the command to resume"):
        train()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stop_deletes_the_job_and_waits_for_its_pods(
    kube: KubeServer, train: Callable[..., None], capfd: pytest.CaptureFixture[str], number: signal.Signals
) -> None:
    kube.script, kube.lag = [RUNNING] * 1000, 0.3
    kube.at[3] = partial(os.kill, os.getpid(), number)
    before = signal.getsignal(number)
    with pytest.raises(SystemExit) as caught:
        train()
    assert caught.value.code == 128 + number
    assert not kube.jobs and not kube._pods()
    output = capfd.readouterr().out
    assert "stopping, writing a checkpoint" in output and "rerun the command to resume from step 0" in output
    assert signal.getsignal(number) is before


def test_a_stop_deletes_the_job_while_a_request_of_the_follower_hangs(
    kube: KubeServer, train: Callable[..., None]
) -> None:
    """A stopped step has about a second to live, and a busy API may take longer for an answer."""
    kube.script = [RUNNING] * 1000
    deleted = threading.Event()

    def hang() -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        for _ in range(1000):
            if not kube.jobs:
                deleted.set()
                return
            time.sleep(0.01)

    kube.at[3] = hang  # the answer to the third look at the job comes when the job is gone
    with pytest.raises(SystemExit):
        train()
    assert deleted.is_set()


@pytest.fixture
def own_pod(kube: KubeServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of the pod of KFP in which the step is; the cluster knows it."""
    (tmp_path / "namespace").write_text("team")
    monkeypatch.setattr("esvit_core.launch.kubernetes.client.NAMESPACE_FILE", tmp_path / "namespace")
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "10.0.0.1")
    monkeypatch.delenv("KUBERNETES_SERVICE_PORT", raising=False)  # no service account here: the kubeconfig is used
    monkeypatch.setenv("KFP_POD_NAME", "pretrain-1")
    kube.own["pretrain-1"] = {
        "name": "pretrain-1",
        "uid": "uid-1",
        "ownerReferences": [WORKFLOW | {"controller": True}],
    }
    return "pretrain-1"


def test_the_job_ends_with_the_workflow_that_launched_it(
    kube: KubeServer, train: Callable[..., None], own_pod: str
) -> None:
    kube.script = [RUNNING, DONE]
    train()
    (posted,) = [body for method, path, body in kube.requests if method == "POST"]
    assert posted["metadata"]["ownerReferences"] == [WORKFLOW]
    assert all("/namespaces/team/" in path for _, path, _ in kube.requests)


def test_outside_of_a_workflow_the_job_ends_with_the_pod_that_follows_it(
    kube: KubeServer, train: Callable[..., None], own_pod: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    kube.own = {name: {"name": name, "uid": f"uid of {name}"} for name in (own_pod, "pretrain-2")}
    kube.script = [RUNNING, DONE]
    train()
    (posted,) = [body for method, path, body in kube.requests if method == "POST"]
    owner = {"apiVersion": "v1", "kind": "Pod", "name": own_pod, "uid": f"uid of {own_pod}"}
    assert posted["metadata"]["ownerReferences"] == [owner]

    # The step is repeated in another pod: the first one's removal must not take the job along.
    kube.jobs.clear()
    kube.put(posted, "Running")
    kube.script = [RUNNING, RUNNING, DONE]
    monkeypatch.setenv("KFP_POD_NAME", "pretrain-2")
    train()
    bodies = [body["metadata"] for method, _, body in kube.requests if method == "PATCH"]
    (patched,) = [metadata for metadata in bodies if "ownerReferences" in metadata]
    assert patched["ownerReferences"] == [owner | {"name": "pretrain-2", "uid": "uid of pretrain-2"}]


@pytest.mark.parametrize("grace", [True, False])
def test_a_pod_that_is_deleted_leaves_the_job_to_the_next(
    kube: KubeServer, train: Callable[..., None], own_pod: str, grace: bool, capfd: pytest.CaptureFixture[str]
) -> None:
    def delete() -> None:
        if grace:
            kube.own[own_pod]["deletionTimestamp"] = "2026-11-28T23:41:00Z"
        else:
            del kube.own[own_pod]
        os.kill(os.getpid(), signal.SIGTERM)

    kube.script = [RUNNING] * 1000
    kube.at[3] = delete
    with pytest.raises(SystemExit) as caught:
        train()
    assert caught.value.code == 128 + signal.SIGTERM
    assert kube.jobs and not [path for method, path, _ in kube.requests if method == "DELETE"]
    assert "this pod is being deleted" in capfd.readouterr().out


def test_a_step_that_is_stopped_in_its_pod_deletes_the_job(
    kube: KubeServer, train: Callable[..., None], own_pod: str
) -> None:
    kube.script = [RUNNING] * 1000
    kube.at[3] = partial(os.kill, os.getpid(), signal.SIGTERM)
    with pytest.raises(SystemExit):
        train()
    assert not kube.jobs


def test_a_missing_cluster_is_reported(store_env: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "nothing"))
    config = Config.load("demo", ["launch.scheduler=volcano"])
    with pytest.raises(UserError, match=r"no Kubernetes cluster is configured.*launch.scheduler=local"):
        launch_on_cluster(store_env, store_env.uri("runs/a"), config)


def test_more_processes_than_images_in_a_batch_are_refused(train: Callable[..., None]) -> None:
    with pytest.raises(UserError, match=r"batch_size 2: expected at least launch.nodes times.*4"):
        train("training.batch_size=2", "launch.processes_per_node=2")


def test_a_run_uses_the_execution_settings_of_its_latest_start(store_env: Any, images: Path) -> None:
    uri = store_env.uri("runs/placed")
    first = Config.load("demo")
    elsewhere = ["launch.scheduler=volcano", "launch.nodes=4", "cluster.image=esvit/trainer:2"]
    moved = Config.load("demo", [*elsewhere, "training.workers=4", "training.keep_best=true"])
    assert first.digest() == moved.digest()
    run = start_run(first, str(images), uri, store_env)
    assert run.config == open_run(uri, store_env).config == first
    for wanted in (moved, first, moved):
        assert start_run(wanted, str(images), uri, store_env).config == wanted
        assert open_run(uri, store_env).config == wanted
    assert Config.from_yaml(store_env.get_bytes(f"{uri}/config.yaml").decode()) == first
    with pytest.raises(UserError, match=r"another configuration \(training\.epochs: 44 there, 45 here\)"):
        start_run(Config.load("demo", ["training.epochs=45"]), str(images), uri, store_env)
