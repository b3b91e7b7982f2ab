"""Training on two nodes, with Volcano and with the Kubeflow Trainer, and what is killed meanwhile."""

from __future__ import annotations

import contextlib
import subprocess
from collections.abc import Callable, Iterator

import pytest
from cluster_settings import Settings
from evidence import Saw
from kube import Kube, wait_for
from runs import TRAIN_STEP, TRAINER, Cli, Runs, progress, step_in, wait_for_line, wait_for_step

from conftest import ENDLESS

SCHEDULERS = {
    "volcano": ("jobs.batch.volcano.sh", "Volcano"),
    "trainjob": ("trainjobs.trainer.kubeflow.org", "the Kubeflow Trainer"),
}
LONG = ("training.epochs=120",)


@pytest.fixture(params=SCHEDULERS)
def scheduler(request: pytest.FixtureRequest, needs: Callable[..., None]) -> str:
    """A scheduler of training pods that the cluster has."""
    kind, what = SCHEDULERS[request.param]
    needs(kind=kind, what=what)
    return str(request.param)


def of_two_nodes(scheduler: str, name: str, *more: str) -> tuple[str, ...]:
    """Settings of a run on two nodes; its recipe's name makes it a run of its own."""
    return (f"recipe={name}", f"launch.scheduler={scheduler}", "launch.nodes=2", *LONG, *more)


def trainers(kube: Kube, name: str) -> list[dict]:
    """Running training pods of the run whose recipe has this name."""
    found = kube.pods(TRAINER)
    return [p for p in found if p["metadata"]["labels"]["esvit.dev/run"].startswith(name)]


@pytest.fixture
def two_nodes(
    cli: Cli, runs: Runs, kube: Kube, scheduler: str, unlabelled: str, stamp: str, unfinished: dict[str, str]
) -> Iterator[Callable[..., tuple[str, str]]]:
    """Starts a run on two nodes and waits until both train: its id and its name."""
    started: list[str] = []

    def start(what: str, *more: str) -> tuple[str, str]:
        name = f"{what}-{scheduler}-{stamp}"
        run_id = cli.submit(
            "pretrain", unlabelled, "--name", name, "--inline", settings=of_two_nodes(scheduler, name, *more)
        )
        started.append(run_id)
        wait_for(f"two training pods of {name}", lambda: len(trainers(kube, name)) == 2 or None, 600)
        return run_id, name

    yield start
    runs.terminate(*set(started).difference(unfinished.values()))


def first(pods: list[dict]) -> dict:
    return min(pods, key=lambda pod: pod["metadata"]["name"])


def test_two_nodes_and_a_killed_worker(
    two_nodes: Callable[..., tuple[str, str]],
    runs: Runs,
    kube: Kube,
    scheduler: str,
    unfinished: dict[str, str],
    saw: Saw,
) -> None:
    """Two nodes train; a worker that is killed comes back; the successor of a killed follower finds the job."""
    run_id, name = two_nodes("killed")
    pods = trainers(kube, name)
    wait_for_line(kube, first(pods), "images/s")
    injected = {pod["metadata"]["annotations"].get("sidecar.istio.io/inject") for pod in pods} | {
        pod["metadata"]["labels"].get("sidecar.istio.io/inject") for pod in pods
    }
    saw(
        f"{scheduler}: {', '.join(pod['metadata']['name'] for pod in pods)}; sidecar.istio.io/inject: {injected - {None}}"
    )
    assert "false" in injected
    victim = max(pods, key=lambda pod: pod["metadata"]["name"])
    kube.delete_pod(victim, force=True)
    known = {pod["metadata"]["uid"] for pod in pods}
    back = wait_for(
        "the worker to be back",
        lambda: next((pod for pod in trainers(kube, name) if pod["metadata"]["uid"] not in known), None),
        180,
    )
    saw(
        f"{victim['metadata']['name']} was deleted without grace; {back['metadata']['name']} runs on {back['spec']['nodeName']}"
    )
    follower = runs.pod(run_id, TRAIN_STEP)
    kube.delete_pod(follower, force=True)
    again = wait_for(
        "another follower",
        lambda: next(
            (p for p in runs.pods(run_id, TRAIN_STEP) if p["metadata"]["uid"] != follower["metadata"]["uid"]), None
        ),
        300,
    )
    line = wait_for_line(kube, again, "following it")
    saw(f"the follower was deleted; its successor: {line.strip()}")
    unfinished[f"{scheduler}, a worker and the follower killed"] = run_id


def test_node_lost_and_terminated(
    settings: Settings, two_nodes: Callable[..., tuple[str, str]], runs: Runs, kube: Kube, saw: Saw
) -> None:
    """The kubelet under a worker stops for a while and the training goes on; Terminate leaves no job and no pod."""
    # On a busy node the stopped step may not come to delete its job; the job then ends because nobody follows it.
    bound = "launch.unfollowed_minutes=2"
    run_id, name = two_nodes("lost", "launch.min_nodes=1", f"training.epochs={ENDLESS}", bound)
    pods = trainers(kube, name)
    wait_for_line(kube, first(pods), "images/s")
    leave_a_node(settings, kube, pods, saw)
    pods = trainers(kube, name)
    node, reason = node_that_can_go(settings, kube, pods)
    if node:
        stop_and_start(settings, kube, node, first(pods), saw)
    else:
        saw(f"no node was stopped: {reason}")
    runs.terminate(run_id)
    wait_for("the training pods to go", lambda: not trainers(kube, name) or None, 420)
    wait_for("the end of the run", lambda: runs.state(run_id) in ("FAILED", "CANCELED") or None, 180)
    left = [job for kind, _ in SCHEDULERS.values() if kube.has(kind) for job in wait_for_none(kube, kind, name)]
    saw(f"terminated: run {runs.state(run_id)}; no training pod is left, {f'ended: {left}' if left else 'and no job'}")


def leave_a_node(settings: Settings, kube: Kube, pods: list[dict], saw: Saw) -> None:
    """Bring about that a worker is on a node that can be stopped: move the store away from it, or a worker to it."""
    if not settings.stop_kubelet or node_that_can_go(settings, kube, pods)[0]:
        return
    api = {pod["spec"].get("nodeName") for pod in kube.list("pods", "app=ml-pipeline")}
    node = next((pod["spec"]["nodeName"] for pod in pods if pod["spec"]["nodeName"] not in api), None)
    if node is not None:
        with cordoned(kube, {node}):
            kube.run("delete", "pod", "esvit-object-store-0", "--timeout=120s", seconds=150)
            kube.run("rollout", "status", "statefulset/esvit-object-store", "--timeout=180s", seconds=200)
        saw(f"the store was moved away from {node}")
        return
    needed = nodes_in_use(kube)
    if not {one["metadata"]["name"] for one in kube.list("nodes")} - needed:
        return
    moved, known = max(pods, key=lambda pod: pod["metadata"]["name"]), {pod["metadata"]["uid"] for pod in pods}
    run = moved["metadata"]["labels"]["esvit.dev/run"]
    with cordoned(kube, needed):
        kube.delete_pod(moved, force=True)
        back = wait_for(
            "the worker on another node",
            lambda: next((pod for pod in trainers(kube, run) if pod["metadata"]["uid"] not in known), None),
            180,
        )
    saw(f"a worker was moved to {back['spec']['nodeName']}")


@contextlib.contextmanager
def cordoned(kube: Kube, nodes: set[str]) -> Iterator[None]:
    """Let no pod start on the nodes."""
    for node in nodes:
        kube.run("cordon", node)
    try:
        yield
    finally:
        for node in nodes:
            kube.run("uncordon", node)


def nodes_in_use(kube: Kube) -> set[str]:
    """Nodes that cannot be stopped, because the store or Kubeflow Pipelines is on them."""
    served = [*kube.list("pods", "app.kubernetes.io/name=esvit-object-store"), *kube.list("pods", "app=ml-pipeline")]
    return {pod["spec"].get("nodeName") for pod in served}


def node_that_can_go(settings: Settings, kube: Kube, pods: list[dict]) -> tuple[str, str]:
    """A worker's node that can be stopped, or the reason why there is none."""
    if not settings.stop_kubelet or not settings.start_kubelet:
        return "", "ESVIT_TEST_STOP_KUBELET and ESVIT_TEST_START_KUBELET are not set"
    needed = nodes_in_use(kube)
    found = [pod["spec"]["nodeName"] for pod in pods if pod["spec"]["nodeName"] not in needed]
    return (found[0], "") if found else ("", f"all workers are on {needed}, with the store or Kubeflow Pipelines")


def stop_and_start(settings: Settings, kube: Kube, node: str, first_pod: dict, saw: Saw) -> None:
    """Stop the kubelet of a node until the node is NotReady, and start it again: the training has gone on meanwhile."""
    before = step_in(progress(kube, first_pod)[-1])
    subprocess.run(settings.stop_kubelet.format(node=node), shell=True, check=True)
    try:
        wait_for(f"node {node} to be not ready", lambda: not _ready(kube, node) or None, 180)
    finally:
        subprocess.run(settings.start_kubelet.format(node=node), shell=True, check=True)
        wait_for(f"node {node} to be ready", lambda: _ready(kube, node) or None, 180)
    after = wait_for_step(kube, first_pod, before)
    saw(
        f"the kubelet of {node} was stopped, the node was NotReady, and came back; step {before:,} before, {after:,} after"
    )


def wait_for_none(kube: Kube, kind: str, name: str) -> list[str]:
    """Names of the objects of a kind that are still there after a while."""

    def names() -> list[str]:
        return [one["metadata"]["name"] for one in kube.list(kind) if name in one["metadata"]["name"]]

    try:
        wait_for(f"no {kind} of {name}", lambda: not names() or None, 90)
    except AssertionError:
        return names()
    return []


def _ready(kube: Kube, node: str) -> bool:
    conditions = (kube.get("node", node) or {})["status"]["conditions"]
    return next(c["status"] for c in conditions if c["type"] == "Ready") == "True"
