"""Argo workflows as KFP stores them with its runs.

Nodes are named and nested as in KFP 2.17.0 with Argo 4.0.8, where every node has attempts; with ``attempts=False`` only
the pods of steps have them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

RUN = "esvit-evaluate-x7k2p"
BEGAN = "2026-11-28T10:00:00Z"
ENDED = "2026-11-28T10:01:07Z"
ENTRY = "metadata-0-3-retry-"  # prefix of templates whose pods have labels and retries


@dataclass(frozen=True)
class Task:
    """A task of the pipeline at one moment.

    Attributes:
        name: key of the task.
        title: display name.
        after: names of the tasks that it depends on.
        phase: phase of the step's node; None: KFP's driver is running; empty: it has not started.
        pods: phase and message of each attempt.
    """

    name: str
    title: str
    after: Sequence[str] = ()
    phase: str | None = ""
    pods: Sequence[tuple[str, str]] = ()


def pod(task: str, attempt: int = 0) -> str:
    """Return the name of the pod of an attempt."""
    node = f"{RUN}(0).root(0).{task}(0).executor({attempt})"
    return f"{RUN}-{ENTRY}system-container-impl-{_hash(node)}"


def workflow(
    tasks: Sequence[Task], *, terminated: bool = False, message: str = "", attempts: bool = True
) -> dict[str, Any]:
    """Build the workflow of a run."""
    nodes: dict[str, Any] = {}

    def node(name: str, kind: str, template: str, phase: str, message: str = "") -> None:
        identity = f"{RUN}-{_hash(name)}"
        nodes[identity] = {
            "id": identity,
            "name": name,
            "displayName": name.rpartition(".")[2],
            "type": kind,
            "templateName": template,
            "phase": phase,
            "message": message or None,
            "startedAt": BEGAN,
            "finishedAt": None if phase in ("Pending", "Running") else ENDED,
        }

    def add(name: str, kind: str, template: str, phase: str) -> str:
        """Add a node and that of its first attempt; returns the name prefix of its children."""
        if not attempts:
            node(name, kind, template, phase)
            return name
        node(name, "Retry", template, phase)
        node(f"{name}(0)", kind, template, phase)
        return f"{name}(0)"

    whole = add(RUN, "DAG", "entrypoint", "Running")
    add(f"{whole}.root-driver", "Pod", "system-dag-driver", "Succeeded")
    root = add(f"{whole}.root", "DAG", "root", "Running")
    for task in tasks:
        if task.phase == "":
            continue
        driver = "Running" if task.phase is None else "Succeeded"
        add(f"{root}.{task.name}-driver", "Pod", "system-container-driver", driver)
        if task.phase is None:
            continue
        step = add(f"{root}.{task.name}", "DAG", f"{ENTRY}system-container-executor", task.phase)
        kind, phase = ("Retry", task.phase) if task.pods else ("Skipped", "Skipped")
        node(f"{step}.executor", kind, f"{ENTRY}system-container-impl", phase)
        for number, (phase, why) in enumerate(task.pods):
            node(f"{step}.executor({number})", "Pod", f"{ENTRY}system-container-impl", phase, why)
    components = {"dag": {"tasks": {task.name: _task(task) for task in tasks}}}
    spec: dict[str, Any] = {"arguments": {"parameters": [{"name": "components-root", "value": json.dumps(components)}]}}
    if terminated:
        spec["activeDeadlineSeconds"] = 0
    metadata: Mapping[str, Any] = {"name": RUN, "namespace": "kubeflow"}
    return {"metadata": metadata, "spec": spec, "status": {"nodes": nodes, "message": message}}


def _task(task: Task) -> dict[str, Any]:
    return {"taskInfo": {"name": task.title}, "dependentTasks": list(task.after)}


def _hash(text: str) -> str:
    """Compute the 32-bit FNV-1a hash, which Argo uses in the names of nodes."""
    value = 0x811C9DC5
    for byte in text.encode():
        value = (value ^ byte) * 0x01000193 & 0xFFFFFFFF
    return str(value)


def handed_over(metrics: Mapping[str, float], outputs: Mapping[str, Any] | None = None) -> str:
    """Return the log lines in which the launcher prints a step's outputs."""
    output = {
        "artifacts": {"metrics": {"artifacts": [{"name": "metrics", "uri": "s3://b/m", "metadata": dict(metrics)}]}},
        "parameterValues": dict(outputs or {}),
    }
    line = "I1128 10:01:05.123456      18 launcher_v2.go:1230] ExecutorOutput: "
    return (
        line + json.dumps(output, indent=2) + "\nI1128 10:01:06.000000      18 launcher_v2.go:206] publish success.\n"
    )


def failure(line: str, code: int) -> str:
    """Return the end of the log of a failed step."""
    return (
        "step begins\n"
        f"{line}\n"
        f"E1128 10:01:05.1      18 launcher_v2.go:449] Component failed to execute successfully: exit status {code}\n"
        "I1128 10:01:06.0      18 launcher_v2.go:206] publish success.\n"
        f"F1128 10:01:06.1      18 main.go:49] failed to execute component: exit status {code}\n"
        'time="2026-11-28T10:01:07Z" level=info msg="sub-process exited" argo=true error="<nil>"\n'
        "Error: exit status 1\n"
    )
