"""Runs that wait in a queue of Kueue."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from evidence import Saw
from kube import Kube, wait_for
from runs import TRAINER, Cli, Runs, run_id_in

QUEUE = "esvit-test"
LABEL = "kueue.x-k8s.io/queue-name"


@pytest.fixture
def hold(kube: Kube, needs: Callable[..., None]) -> Iterator[Callable[[bool], None]]:
    """A queue that admits nothing until ``hold(False)`` is called."""
    needs(kind="localqueues.kueue.x-k8s.io", what="Kueue")
    served = kube.run("api-versions").split()
    version = next(v for v in ("kueue.x-k8s.io/v1beta2", "kueue.x-k8s.io/v1beta1") if v in served)

    def set_queue(held: bool) -> None:
        quota = [{"name": name, "nominalQuota": amount} for name, amount in (("cpu", "16"), ("memory", "64Gi"))]
        flavors = [{"name": QUEUE, "resources": quota}]
        named: dict[str, Any] = {"apiVersion": version, "metadata": {"name": QUEUE}}
        kube.apply(
            {**named, "kind": "ResourceFlavor"},
            {
                **named,
                "kind": "ClusterQueue",
                "spec": {
                    "namespaceSelector": {},
                    "stopPolicy": "Hold" if held else "None",
                    "resourceGroups": [{"coveredResources": ["cpu", "memory"], "flavors": flavors}],
                },
            },
            {**named, "kind": "LocalQueue", "spec": {"clusterQueue": QUEUE}},
        )

    set_queue(True)
    yield set_queue
    for kind in ("localqueue", "clusterqueue", "resourceflavor"):
        kube.run("delete", f"{kind}.kueue.x-k8s.io", QUEUE, "--ignore-not-found", "--wait=false")


def admitted(kube: Kube) -> dict[str, bool]:
    """Whether each workload of the queue is admitted, by its name."""
    return {
        one["metadata"]["name"]: any(c["type"] == "Admitted" and c["status"] == "True" for c in conditions)
        for one in kube.list("workloads.kueue.x-k8s.io")
        if one["spec"].get("queueName") == QUEUE
        for conditions in [one.get("status", {}).get("conditions", [])]
    }


def test_queue(
    cli: Cli, runs: Runs, kube: Kube, hold: Callable[[bool], None], unlabelled: str, stamp: str, saw: Saw
) -> None:
    """The pods of the steps and a TrainJob wait until their queue admits them, and the command says so."""
    name = f"queued-{stamp}"
    settings = [f"recipe={name}", f"cluster.queue={QUEUE}"]
    if kube.has("trainjobs.trainer.kubeflow.org"):
        settings += ["launch.scheduler=trainjob", "launch.nodes=2", f"launch.queue={QUEUE}", "training.epochs=60"]
    process = cli.start(
        *cli.submission("pretrain", unlabelled, "--wait", "--name", name, "--inline", settings=tuple(settings))
    )
    lines: list[str] = []
    assert process.stdout
    for line in process.stdout:
        lines.append(line)
        if "waiting" in line:
            break
    saw(lines[-1].rstrip())
    run_id = run_id_in("".join(lines))
    try:
        assert "Gated" in lines[-1]
        assert admitted(kube) and not any(admitted(kube).values())
        time.sleep(10)
        assert not runs.pods(run_id)
        hold(False)
        queued: set[str] = set()

        def ended() -> bool | None:
            queued.update(
                pod["metadata"]["labels"].get("esvit.dev/role", "step")
                for pod in [*runs.pods(run_id, phase=None), *kube.pods(TRAINER, None)]
                if pod["metadata"]["labels"].get(LABEL) == QUEUE
            )
            return process.poll() is not None or None

        wait_for(f"the end of {name}", ended, 1200)
        for line in process.stdout.read().splitlines()[-12:]:
            saw(line)
        done = admitted(kube)
        saw(
            f"{sum(done.values())} of {len(done)} workloads admitted, of pods with the roles {', '.join(sorted(queued))}"
        )
        assert process.returncode == 0
        assert any("trainjob" in workload for workload in done) or len(settings) == 2
    except subprocess.TimeoutExpired:
        process.kill()
        raise
    finally:
        process.kill()
        runs.terminate(run_id)
