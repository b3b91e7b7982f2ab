"""The TrainJob and its runtime, and the step that follows them."""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from esvit_core.config import Config
from esvit_core.errors import UserError
from esvit_core.launch.kubernetes.client import State
from esvit_core.launch.kubernetes.train_job import TrainJob, train_job
from esvit_core.launch.kubernetes.training_pod import job_name

sys.path.insert(0, str(Path(__file__).parent))
from kube_server import KubeServer, Stage, launching, recorded, serving

GOLDEN = Path(__file__).parent / "recorded" / "train_job.yaml"
RUN = "s3://esvit/runs/factory-2f3a9c"
SETTINGS = [
    "cluster.image=registry.example/esvit/trainer@sha256:" + "5" * 64,
    "training.batch_size=256",
    "launch.scheduler=trainjob",
    "launch.nodes=4",
    "launch.min_nodes=2",
    "cluster.train.accelerators=8",
    "cluster.train.cpu=64",
    "cluster.train.cpu_limit=64",
    "cluster.train.memory=512Gi",
    "cluster.train.shared_memory=16Gi",
    "launch.priority_class=esvit-training",
    "launch.queue=vision",
]
RUNNING = Stage("Running", {0: "running", 1: "running"})
DONE = Stage("Complete", {0: "done", 1: "done"})


@pytest.fixture(scope="module")
def made() -> tuple[dict[str, Any], dict[str, Any]]:
    return train_job(RUN, Config.load("imagenet_swin_tiny_w7", SETTINGS))


@pytest.fixture(scope="module")
def node_job(made: tuple[dict[str, Any], dict[str, Any]]) -> dict[str, Any]:
    """The indexed job of the runtime's JobSet."""
    (replicated,) = made[0]["spec"]["template"]["spec"]["replicatedJobs"]
    assert replicated["template"]["metadata"]["labels"] == {"trainer.kubeflow.org/trainjob-ancestor-step": "trainer"}
    return replicated["template"]["spec"]


@pytest.fixture
def kube(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[KubeServer]:
    with serving(tmp_path, monkeypatch, "trainjobs") as server:
        yield server


@pytest.fixture
def train(kube: KubeServer, store_env: Any) -> Callable[..., None]:
    return launching(store_env, "trainjob")


def test_the_golden_objects_are_current(made: tuple[dict[str, Any], dict[str, Any]]) -> None:
    text = yaml.safe_dump_all(made, sort_keys=False)
    assert GOLDEN.read_text(encoding="utf-8") == text, (
        f"they have changed; if that is meant, write to {GOLDEN}:\n{text}"
    )


@pytest.mark.parametrize("version", ["1.35", "1.36", "1.37"])
def test_the_job_passes_the_schemas_of_kubernetes(node_job: dict[str, Any], version: str) -> None:
    named = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "x"}, "spec": node_job}
    kubernetes_validate.validate(named, version, strict=True)


def test_nodes_meet_at_the_first_and_wait_for_the_fewest(node_job: dict[str, Any]) -> None:
    (container,) = node_job["template"]["spec"]["containers"]
    command, name = container["command"], job_name(RUN)
    message = dict(itertools.pairwise(command))
    assert message["--rdzv_endpoint"] == f"{name}-node-0-0.{name}:29500"
    assert message["--local_addr"] == f"{name}-node-0-$(JOB_COMPLETION_INDEX).{name}"
    assert (message["--nnodes"], message["--nproc_per_node"]) == ("2:4", "8")
    assert message["--rdzv_conf"] == "join_timeout=86400"  # as long as launch.pending_minutes
    assert len(f"{name}-node-0-999-abcde") <= 63


def test_pods_are_given_the_names_that_the_trainer_makes(made: tuple[dict[str, Any], dict[str, Any]]) -> None:
    runtime, job = made
    assert job["spec"]["runtimeRef"]["name"] == runtime["metadata"]["name"]
    assert job["metadata"]["name"] == job_name(RUN)
    assert runtime["spec"]["template"]["spec"]["replicatedJobs"][0]["name"] == "node"


def test_kueue_admits_the_job_and_not_its_pods(made: tuple[dict[str, Any], dict[str, Any]]) -> None:
    runtime, job = made
    assert job["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "vision"
    assert "kueue" not in json.dumps(runtime)


def test_pods_without_a_sidecar(node_job: dict[str, Any]) -> None:
    metadata = node_job["template"]["metadata"]
    assert metadata["annotations"]["sidecar.istio.io/inject"] == "false"
    assert metadata["labels"]["sidecar.istio.io/inject"] == "false"


def test_other_settings_give_another_runtime_for_the_same_job() -> None:
    few = train_job(RUN, Config.load("demo", ["launch.scheduler=trainjob", "launch.nodes=2"]))
    many = train_job(RUN, Config.load("demo", ["launch.scheduler=trainjob", "launch.nodes=3"]))
    assert few[0]["metadata"]["name"] != many[0]["metadata"]["name"]
    assert few[1]["metadata"]["name"] == many[1]["metadata"]["name"]


@pytest.mark.parametrize(
    "status, phases, state",
    [
        ("Created", [], State.WAITING),
        ("Suspended", [], State.WAITING),
        ("Started", ["Pending", "Pending"], State.WAITING),
        ("Started", ["Running", "Pending"], State.RUNNING),
        ("Running", ["Running", "Running"], State.RUNNING),
        ("Running", ["Succeeded", "Failed"], State.ENDING),
        ("Complete", [], State.SUCCEEDED),
        ("Failed", ["Running"], State.FAILED),
    ],
)
def test_states(status: str, phases: list[str], state: State) -> None:
    pods = [{"status": {"phase": phase}} for phase in phases]
    assert TrainJob().state({"status": recorded("trainjobs")[status]}, pods) is state


def test_a_training_is_followed_to_its_end(
    kube: KubeServer, train: Callable[..., None], store_env: Any, capfd: pytest.CaptureFixture[str]
) -> None:
    kube.log = ["2026-11-25T04:00:06.100000000Z train: swin, 2 processes on cpu"]
    kube.script = [
        Stage("Created"),
        Stage("Suspended"),
        Stage("Started", {0: "unscheduled", 1: "unscheduled"}),
        Stage("Started", {0: "running", 1: "unscheduled"}),
        RUNNING,
        Stage("Running", {0: "running", 1: "killed"}),
        DONE,
    ]
    train()
    output, name = capfd.readouterr().out, job_name(store_env.uri("runs/a"))
    message = [line.partition(f"esvit/{name}: ")[2] for line in output.splitlines() if f"esvit/{name}: " in line]
    assert message == [
        "nodes 1 to 2, processes on each 1",
        "waiting",
        "waiting: Suspended Suspended TrainJob is suspended",
        "waiting: Unschedulable: 0/3 nodes are available",
        "running, 1 pod running",
        "running, 2 pods running",
        "running, 1 pod running",
        "succeeded",
    ]
    assert f"pod {name}-node-0-1-kille: process 0 was killed by SIGKILL" in output
    assert "train: swin, 2 processes on cpu\n" in output
    posted = [(path.rpartition("/")[2], body) for method, path, body in kube.requests if method == "POST"]
    assert [plural for plural, _ in posted] == ["trainingruntimes", "trainjobs"]
    credentials = store_env.address.environment()
    for text in (json.dumps(posted), output):
        assert not [v for v in ("ESVIT_S3_ACCESS_KEY", "ESVIT_S3_SECRET_KEY") if credentials[v] in text]


def test_a_repeated_step_follows_the_existing_job_which_has_no_state_while_it_runs(
    kube: KubeServer, train: Callable[..., None], store_env: Any, capfd: pytest.CaptureFixture[str]
) -> None:
    uri = store_env.uri("runs/a")
    kube.put(train_job(uri, Config.load("demo", ["launch.scheduler=trainjob"]))[1], "Running")
    kube.script = [RUNNING, DONE]
    train()
    assert f"found the TrainJob esvit/{job_name(uri)}; following it" in capfd.readouterr().out


def test_a_user_error_is_the_reason(kube: KubeServer, train: Callable[..., None]) -> None:
    kube.script = [RUNNING, Stage("Failed", {0: "lost", 1: "mistake"})]
    with pytest.raises(UserError, match=r"^data: expected images; add some$"):
        train()


def test_a_missing_trainer_is_reported(kube: KubeServer, train: Callable[..., None]) -> None:
    kube.refusals = {("GET", "trainjobs"): (404, "")}
    with pytest.raises(
        UserError, match=r"does not know trainjobs\.trainer\.kubeflow\.org; install the Kubeflow Trainer"
    ):
        train()
