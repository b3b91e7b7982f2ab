"""The Kubeflow Trainer scheduler: a TrainJob, and the runtime with the pod template that it refers to.

The Trainer creates a JobSet with one indexed job from the two, whose pods have predictable names. Nodes are started as
they find room, not all at once; they wait until ``launch.min_nodes`` are there. Requires Trainer 2.
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
NODE = "node"  # the Trainer's name for the job and the container of a training
LONG = 30 * 24 * 60.0  # minutes; instead of no limit


def train_job(
    run_uri: str, config: Config, owner: dict[str, Any] | None = None
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the runtime and the TrainJob that train the run, as they are sent to Kubernetes.

    Args:
        run_uri: ``s3://bucket/runs/<id>``.
        config: of the run.
        owner: owner reference to the pod that launches them, with which both are deleted.
    """
    name = job_name(run_uri)
    metadata: dict[str, Any] = {
        "labels": labels(run_uri),
        "annotations": {RUN_ANNOTATION: run_uri},
        **({"ownerReferences": [owner]} if owner else {}),
    }
    spec = {"mlPolicy": {"numNodes": config.launch.nodes}, "template": {"spec": _job_set(run_uri, config)}}
    # A runtime of this name already has this content, because the name contains its hash.
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
    """Return a JobSet with one indexed job. A lost pod is replaced alone; the job ends when the first node ends."""
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
                        # Kubernetes substitutes the index of the pod.
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
    exit_codes = {"operator": "In", "values": sorted({1, USER_ERROR_EXIT_CODE})}
    job = {
        "completionMode": "Indexed",
        "completions": launch.nodes,
        "parallelism": launch.nodes,
        "backoffLimit": launch.restarts,
        "podReplacementPolicy": "Failed",  # two pods with the same host name at a time would conflict
        "podFailurePolicy": {
            "rules": [
                # A disruption of the node does not count as a failure.
                {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]},
                # The agent's exit codes for a user error, and for too many restarts.
                {"action": "FailJob", "onExitCodes": {"containerName": NODE, **exit_codes}},
            ]
        },
        "successPolicy": {"rules": [{"succeededIndexes": "0"}]},
        "template": pod,
    }
    return {
        # Nodes have to resolve each other before they are ready.
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
    """Creates TrainJobs and reads their state."""

    kind = KIND

    def objects(self, run_uri: str, config: Config, owner: dict[str, Any] | None) -> list[tuple[Kind, dict[str, Any]]]:
        """Return the objects to create, the job last."""
        runtime, job = train_job(run_uri, config, owner)
        return [(RUNTIME, runtime), (KIND, job)]

    def state(self, job: dict[str, Any], pods: list[dict[str, Any]]) -> State:
        """Return the state: the job's condition if it has ended, otherwise from the phases of its pods."""
        if _true_condition(job, "Complete"):
            return State.SUCCEEDED
        if _true_condition(job, "Failed"):
            return State.FAILED
        phases = {pod.get("status", {}).get("phase") for pod in pods}
        if "Running" in phases:
            return State.RUNNING
        return State.ENDING if "Succeeded" in phases else State.WAITING

    def message(self, job: dict[str, Any]) -> str:
        """Return the condition that is true, in the Trainer's words."""
        for name in ("Failed", "Complete", "Suspended"):
            if condition := _true_condition(job, name):
                return " ".join(str(condition[key]) for key in ("type", "reason", "message") if condition.get(key))
        return ""

    def selector(self, name: str) -> str:
        """Return the label selector of the job's pods."""
        return f"jobset.sigs.k8s.io/jobset-name={name}"

    def first_pod(self, pods: list[dict[str, Any]]) -> dict[str, Any] | None:
        """Return the pod of rank 0, the newest if it was replaced; None if there is none."""
        first = [pod for pod in pods if pod["metadata"]["name"].rpartition("-")[0].endswith(f"-{NODE}-0-0")]
        return max(first, key=lambda pod: str(pod["metadata"].get("creationTimestamp", "")), default=None)

    def waiting_reason(self, cluster: Cluster, job: dict[str, Any], pods: list[dict[str, Any]]) -> str:
        """Return why the job is suspended, which quota blocks its pods, or why they find no node."""
        if _true_condition(job, "Suspended"):
            return self.message(job)
        name = job["metadata"]["name"]
        messages = [*cluster.events(name), *cluster.events(f"{name}-{NODE}-0")]
        if quota := [text for text in messages if "quota" in text]:
            return quota[-1]
        for pod in pods:
            for condition in pod.get("status", {}).get("conditions", []):
                if condition.get("type") == "PodScheduled" and condition.get("status") == "False":
                    return f"{condition.get('reason', '')}: {condition.get('message', '')}".strip(": ")
        return messages[-1] if messages else ""


def _true_condition(job: dict[str, Any], name: str) -> dict[str, Any] | None:
    """Return a condition of the job if it is true, otherwise None."""
    conditions = job.get("status", {}).get("conditions", [])
    return next((c for c in conditions if c.get("type") == name and c.get("status") == "True"), None)
