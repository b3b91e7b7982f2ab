"""The Volcano scheduler: a job with one task per node, gang-scheduled.

torchx describes the job (``dist.ddp``, scheduler ``kubernetes``); this module completes its dry-run request. Requires
Volcano 1.11, the first version that restarts a single task.
"""

from __future__ import annotations

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
    training_app,
)

KIND = Kind("batch.volcano.sh", "v1alpha1", "jobs", "Volcano job", "Volcano 1.11 or newer")
DEFAULT_QUEUE = "esvit"  # as in manifests/components/volcano
POD_GROUP = Kind("scheduling.volcano.sh", "v1beta1", "podgroups", "pod group")

# As defined in volcano.sh/apis/pkg/apis/batch/v1alpha1/job.go.
PHASES = {
    "Pending": State.WAITING,
    "Running": State.RUNNING,
    "Restarting": State.RESTARTING,
    "Aborting": State.ENDING,
    "Completing": State.ENDING,
    "Terminating": State.ENDING,
    "Completed": State.SUCCEEDED,
    "Failed": State.FAILED,
    "Terminated": State.FAILED,
    "Aborted": State.CANCELLED,
}


def volcano_job(run_uri: str, config: Config, owner: dict[str, Any] | None = None) -> dict[str, Any]:
    """Return the job that trains the run, as it is sent to Kubernetes.

    Args:
        run_uri: ``s3://bucket/runs/<id>``.
        config: of the run.
        owner: owner reference to the pod that launches the job, with which the job is deleted.
    """
    request = _dry_run(run_uri, config)
    resource: dict[str, Any] = request["resource"]
    launch, name = config.launch, job_name(run_uri)
    resource["metadata"] = {
        "name": name,
        "labels": labels(run_uri),
        "annotations": {RUN_ANNOTATION: run_uri},
        **({"ownerReferences": [owner]} if owner else {}),
    }
    spec = resource["spec"]
    spec |= {
        "minAvailable": launch.fewest_nodes,
        "maxRetry": launch.restarts + 1,  # number of attempts; Volcano replaces 0 by its default
        "ttlSecondsAfterFinished": round(60 * launch.ttl_minutes),
        # The agent's exit codes for a user error, and for too many restarts. Any other failure concerns one node only.
        "policies": [
            {"exitCode": USER_ERROR_EXIT_CODE, "action": "TerminateJob"},
            {"exitCode": 1, "action": "TerminateJob"},
            {"events": ["PodFailed", "PodEvicted"], "action": "RestartTask"},
        ],
    }
    # The job is complete when the first node ends, even if other nodes never found room.
    spec["tasks"][0]["policies"] = [{"event": "TaskCompleted", "action": "CompleteJob"}]
    first = f"{pod_name(run_uri, 0)}.{name}"
    for number, task in enumerate(spec["tasks"]):
        task.setdefault("minAvailable", 1)
        template = task["template"]
        template["metadata"]["labels"]["app.kubernetes.io/instance"] = name
        (container,) = template["spec"]["containers"]
        container["env"] = [item for item in container["env"] if not item["name"].startswith("TORCHX_")]
        container["command"] = agent_command(
            container["command"][2],
            endpoint=first,
            address=f"{pod_name(run_uri, number)}.{name}",
            job=name,
            restarts=launch.restarts,
        )
        complete_pod(template, run_uri, config)
    return resource


class Volcano:
    """Creates Volcano jobs and reads their state."""

    kind = KIND

    def objects(self, run_uri: str, config: Config, owner: dict[str, Any] | None) -> list[tuple[Kind, dict[str, Any]]]:
        """Return the objects to create, the job last."""
        return [(KIND, volcano_job(run_uri, config, owner))]

    def state(self, job: dict[str, Any], pods: list[dict[str, Any]]) -> State:
        """Return the state; a job without a phase, or with an unknown one, is waiting."""
        return PHASES.get(_state(job).get("phase", ""), State.WAITING)

    def message(self, job: dict[str, Any]) -> str:
        """Return the state in Volcano's words."""
        state = _state(job)
        return " ".join(str(state[key]) for key in ("phase", "reason", "message") if state.get(key))

    def selector(self, name: str) -> str:
        """Return the label selector of the job's pods."""
        return f"volcano.sh/job-name={name}"

    def first_pod(self, pods: list[dict[str, Any]]) -> dict[str, Any] | None:
        """Return the pod of rank 0; None if there is none."""
        return next((pod for pod in pods if pod["metadata"]["name"].endswith("-training-0-0")), None)

    def waiting_reason(self, cluster: Cluster, job: dict[str, Any], pods: list[dict[str, Any]]) -> str:
        """Return why the job waits, from the condition of its pod group and from Kubernetes events."""
        metadata = job["metadata"]
        group = f"{metadata['name']}-{metadata['uid']}"
        pod_group = cluster.get(POD_GROUP, group) or {}
        conditions = {c.get("type"): c for c in pod_group.get("status", {}).get("conditions", [])}
        messages = [*cluster.events(metadata["name"]), *cluster.events(group)]
        if quota := [text for text in messages if "quota" in text]:
            return f"queue {job['spec']['queue']}: {quota[-1]}"
        condition = conditions.get("Unschedulable")
        if condition and condition.get("status") == "True":
            return f"{condition.get('reason', '')}: {condition.get('message', '')}".strip(": ")
        return messages[-1] if messages else ""


def pod_name(run_uri: str, node: int) -> str:
    """Return the name that Volcano gives the pod of a node: job, task, and index within the task."""
    return f"{job_name(run_uri)}-training-{node}-0"


def _state(job: dict[str, Any]) -> dict[str, Any]:
    return job.get("status", {}).get("state", {})


def _dry_run(run_uri: str, config: Config) -> dict[str, Any]:
    """Return torchx's request as a plain dictionary."""
    from torchx.schedulers.kubernetes_scheduler import create_scheduler, sanitize_for_serialization

    launch = config.launch
    options = {"queue": launch.queue or DEFAULT_QUEUE, "priority_class": launch.priority_class}
    request = create_scheduler("esvit").submit_dryrun(training_app(run_uri, config), options).request
    return {"resource": sanitize_for_serialization(request.resource)}
