"""The Kubeflow Trainer: a TrainJob, and the runtime that it names, which holds the pod.

The Trainer makes a JobSet of one indexed job from the two, and gives the pods names that are known beforehand. Nodes
are started as they find room, not all at once; those that are there wait for ``launch.min_nodes``. Requires Trainer 2.
"""

from __future__ import annotations

import hashlib
import json
from typing import Any

from esvit_core.config import Config
from esvit_core.errors import USER_ERROR_EXIT_CODE
from esvit_core.launch.kubernetes.client import Cluster, Kind, State
from esvit_core.launch.kubernetes.training_pod import (
    RUN_ANNOTATION,
    agent_command,
    complete_pod,
    job_name,
    labels,
    torchrun,
)
from esvit_core.launch.pod_metadata import queue_labels

GROUP = "trainer.kubeflow.org"
KIND = Kind(GROUP, "v1alpha1", "trainjobs", "TrainJob", "the Kubeflow Trainer, 2.0 or newer")
RUNTIME = Kind(GROUP, "v1alpha1", "trainingruntimes", "training runtime", "the Kubeflow Trainer, 2.0 or newer")
NODE = "node"  # what the Trainer calls the job and the container of a training
LONG = 30 * 24 * 60.0  # minutes; for what may wait without end


def train_job(
    run_uri: str, config: Config, owner: dict[str, Any] | None = None
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The runtime and the TrainJob that train the run, as they are sent to Kubernetes.

    Args:
        run_uri: ``s3://bucket/runs/<id>``.
        config: of the run.
        owner: reference to what both end with: the pod that launches them.
    """
    name = job_name(run_uri)
    metadata: dict[str, Any] = {
        "labels": labels(run_uri),
        "annotations": {RUN_ANNOTATION: run_uri},
        **({"ownerReferences": [owner]} if owner else {}),
    }
    spec = {"mlPolicy": {"numNodes": config.launch.nodes}, "template": {"spec": _job_set(run_uri, config)}}
    # A runtime that is there already says the same: its name is its content's.
    content = hashlib.sha256(json.dumps(spec, sort_keys=True).encode()).hexdigest()[:8]
    runtime: dict[str, Any] = {
        "apiVersion": f"{GROUP}/{RUNTIME.version}",
        "kind": "TrainingRuntime",
        "metadata": {"name": f"{name}-{content}", **metadata},
        "spec": spec,
    }
    job: dict[str, Any] = {
        "apiVersion": f"{GROUP}/{KIND.version}",
        "kind": "TrainJob",
        "metadata": {
            "name": name,
            **metadata,
            "labels": {**metadata["labels"], **queue_labels(config.launch.queue)},
        },
        "spec": {
            "runtimeRef": {"apiGroup": GROUP, "kind": "TrainingRuntime", "name": runtime["metadata"]["name"]},
            "trainer": {"numNodes": config.launch.nodes},
        },
    }
    return runtime, job


def _job_set(run_uri: str, config: Config) -> dict[str, Any]:
    """One indexed job. A pod that is lost comes back alone; the end of the first node is the end of all."""
    launch, name = config.launch, job_name(run_uri)
    pod: dict[str, Any] = {
        "metadata": {},
        "spec": {
            "containers": [
                {
                    "name": NODE,
                    "command": agent_command(
                        torchrun(run_uri, config),
                        endpoint=f"{name}-{NODE}-0-0.{name}",
                        # Kubernetes puts the number of the pod in place of this.
                        address=f"{name}-{NODE}-0-$(JOB_COMPLETION_INDEX).{name}",
                        job=name,
                        restarts=launch.restarts,
                        join_seconds=round(60 * (launch.pending_minutes or LONG)),
                    ),
                }
            ]
        },
    }
    complete_pod(pod, run_uri, config)
    if launch.priority_class:
        pod["spec"]["priorityClassName"] = launch.priority_class
    endings = {"operator": "In", "values": sorted({1, USER_ERROR_EXIT_CODE})}
    job = {
        "completionMode": "Indexed",
        "completions": launch.nodes,
        "parallelism": launch.nodes,
        "backoffLimit": launch.restarts,
        "podReplacementPolicy": "Failed",  # two pods of one name at a time would take each other's place
        "podFailurePolicy": {
            "rules": [
                # A machine that is taken away is no failure of ours and is not counted.
                {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]},
                # The agent ends so for a mistake of the user's, and when it has restarted as often as it may.
                {"action": "FailJob", "onExitCodes": {"containerName": NODE, **endings}},
            ]
        },
        "successPolicy": {"rules": [{"succeededIndexes": "0"}]},
        "template": pod,
    }
    return {
        # Nodes must find each other before they are ready.
        "network": {"enableDNSHostnames": True, "publishNotReadyAddresses": True},
        "failurePolicy": {"maxRestarts": 0},
        "replicatedJobs": [
            {
                "name": NODE,
                "replicas": 1,
                "template": {"metadata": {"labels": {f"{GROUP}/trainjob-ancestor-step": "trainer"}}, "spec": job},
            }
        ],
    }


class TrainJob:
    """How a TrainJob is created, and read."""

    kind = KIND

    def objects(self, run_uri: str, config: Config, owner: dict[str, Any] | None) -> list[tuple[Kind, dict[str, Any]]]:
        """What is created, the job last."""
        runtime, job = train_job(run_uri, config, owner)
        return [(RUNTIME, runtime), (KIND, job)]

    def state(self, job: dict[str, Any], pods: list[dict[str, Any]]) -> State:
        """Its own words for the end; before it, whether a pod runs."""
        if _holds(job, "Complete"):
            return State.SUCCEEDED
        if _holds(job, "Failed"):
            return State.FAILED
        phases = {pod.get("status", {}).get("phase") for pod in pods}
        if "Running" in phases:
            return State.RUNNING
        return State.ENDING if "Succeeded" in phases else State.WAITING

    def says(self, job: dict[str, Any]) -> str:
        """The condition that holds, in the Trainer's own words."""
        for name in ("Failed", "Complete", "Suspended"):
            if condition := _holds(job, name):
                return " ".join(str(condition[key]) for key in ("type", "reason", "message") if condition.get(key))
        return ""

    def selector(self, name: str) -> str:
        """Of the job's pods."""
        return f"jobset.sigs.k8s.io/jobset-name={name}"

    def first_pod(self, pods: list[dict[str, Any]]) -> dict[str, Any] | None:
        """That of rank 0, the newest if it was replaced."""
        first = [pod for pod in pods if pod["metadata"]["name"].rpartition("-")[0].endswith(f"-{NODE}-0-0")]
        return max(first, key=lambda pod: str(pod["metadata"].get("creationTimestamp", "")), default=None)

    def why_waiting(self, cluster: Cluster, job: dict[str, Any], pods: list[dict[str, Any]]) -> str:
        """What suspends it, which quota keeps its pods from being made, or why they find no node."""
        if _holds(job, "Suspended"):
            return self.says(job)
        name = job["metadata"]["name"]
        said = [*cluster.events(name), *cluster.events(f"{name}-{NODE}-0")]
        if quota := [text for text in said if "quota" in text]:
            return quota[-1]
        for pod in pods:
            for condition in pod.get("status", {}).get("conditions", []):
                if condition.get("type") == "PodScheduled" and condition.get("status") == "False":
                    return f"{condition.get('reason', '')}: {condition.get('message', '')}".strip(": ")
        return said[-1] if said else ""


def _holds(job: dict[str, Any], name: str) -> dict[str, Any] | None:
    """A condition of the job's, if it is true."""
    conditions = job.get("status", {}).get("conditions", [])
    return next((c for c in conditions if c.get("type") == name and c.get("status") == "True"), None)
