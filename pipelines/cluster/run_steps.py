"""The steps of a run on a cluster: state, times, pods, and why one is waiting or failed.

KFP's run API (v2beta1) lists the nodes of a run without their pods, messages and order. The Argo workflow that the
server stores with each run has all of these; it is read through ``/apis/v1beta1/runs/<id>``, which KFP 2.16 and 2.17
both serve. If a server does not return it, the v2beta1 list is used, without pods and messages.
"""

from __future__ import annotations

import base64
import binascii
import datetime
import json
import re
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from esvit_pipelines.cluster.client import Connection

_EXECUTOR = "system-container-executor"  # template of the node of a step; a prefix names the pod settings
_IMPLEMENTATION = "system-container-impl"  # template of the pod that runs the component
_IMPORTER = "system-importer"
_DRIVER = "-driver"
# Argo appends the number of the attempt to the names of nodes. With KFP 2.17's defaults every node has attempts, even
# the workflow itself: `esvit-pretrain-x7k2p(0).root(0).knn(0).executor(1)`.
_ATTEMPT = re.compile(r"\(\d+\)(?=\.|$)")
_LONGEST_POD_NAME = 253
_HASH_LENGTH = 10
_PHASES = {"Pending": "waiting", "Running": "running", "Succeeded": "succeeded", "Skipped": "skipped"}
_FAILED = ("Failed", "Error")
UNFINISHED = ("preparing", "waiting", "running", "retrying")


@dataclass(frozen=True)
class Step:
    """One step of a run.

    Attributes:
        name: name of the task in the pipeline, prefixed with the names of its sub-pipelines.
        title: display name.
        state: ``not started``, ``preparing`` (KFP's driver resolves its inputs), ``waiting`` (for a node, an image, a
            volume), ``running``, ``retrying`` (an attempt failed; another one follows, or the step fails),
            ``succeeded``, ``cached``, ``skipped``, ``failed``, or ``stopped``.
        started, ended: None: not yet.
        pod: pod of the newest attempt; None: there is none, or the server does not report it.
        message: Argo's message: why the step is waiting, or how the newest attempt ended.
        attempts: number of pods that were started for it.
        previous_message: Argo's message about the attempt before the newest.
    """

    name: str
    title: str
    state: str
    started: datetime.datetime | None = None
    ended: datetime.datetime | None = None
    pod: str | None = None
    message: str = ""
    attempts: int = 0
    previous_message: str = ""

    @property
    def seconds(self) -> float | None:
        """Duration until the end or now; None before it has started."""
        if self.started is None:
            return None
        until = self.ended or datetime.datetime.now(datetime.UTC)
        return max(0.0, (until - self.started).total_seconds())


@dataclass(frozen=True)
class Workflow:
    """The workflow of a run.

    Attributes:
        namespace: namespace of its pods; empty: the server does not report it.
        steps: the started steps in the order of their start, then the others.
        message: Argo's message about how the workflow ended.
        terminated: a user terminated it.
    """

    namespace: str
    steps: tuple[Step, ...]
    message: str = ""
    terminated: bool = False

    def failed(self) -> Step | None:
        """Return the step that failed first; None: none failed."""
        failed = [step for step in self.steps if step.state == "failed"]
        return min(failed, key=lambda step: step.ended or _LATEST) if failed else None


_LATEST = datetime.datetime.max.replace(tzinfo=datetime.UTC)


def workflow_of(connection: Connection, run: Any) -> Workflow:
    """Read the workflow of a run from the server.

    Args:
        run: the run as KFP's client describes it.

    Raises:
        urllib3.exceptions.HTTPError: the server does not answer.
        kfp_server_api.ApiException: the server refuses the request.
    """
    import kfp_server_api

    try:
        response = json.loads(connection.request("GET", f"/apis/v1beta1/runs/{run.run_id}"))
        text = response["pipeline_runtime"]["workflow_manifest"]
        return read_workflow(json.loads(text))
    except kfp_server_api.ApiException as error:
        if error.status not in (404, 501):
            raise
    except (ValueError, KeyError, TypeError):
        pass  # the run has not reached the cluster yet, or the server stores no workflows
    return _from_details(run)


def read_workflow(manifest: Mapping[str, Any]) -> Workflow:
    """Parse the Argo workflow of a pipeline run.

    Args:
        manifest: the workflow as parsed JSON.
    """
    nodes = _nodes(manifest.get("status") or {})
    prefix = f"{manifest['metadata']['name']}."
    titles = _titles(manifest)
    nodes_by_step: dict[str, list[Mapping[str, Any]]] = {}
    step_names: set[str] = set()
    for node in nodes.values():
        name = _step_name(node, prefix)
        if name is not None:
            nodes_by_step.setdefault(name, []).append(node)
            if _is_step(node) or name in titles:
                step_names.add(name)
    steps = [_step(name, group, manifest, titles) for name, group in nodes_by_step.items() if name in step_names]
    steps.sort(key=lambda step: step.started or _LATEST)
    names = {step.name for step in steps}
    steps += [Step(name, title, "not started") for name, title in titles.items() if name not in names]
    spec = manifest.get("spec") or {}
    stopped = spec.get("activeDeadlineSeconds") == 0 or bool(spec.get("shutdown"))
    if stopped:
        steps = [replace(step, state="stopped") if step.state == "failed" else step for step in steps]
    return Workflow(
        str(manifest["metadata"].get("namespace") or ""),
        tuple(steps),
        _message(nodes) or str((manifest.get("status") or {}).get("message") or ""),
        stopped,
    )


def _message(nodes: Mapping[str, Any]) -> str:
    """Return why the last failed pod failed; the workflow's own message only says that the retries are used up."""
    failed = [node for node in nodes.values() if node.get("type") == "Pod" and node.get("phase") in _FAILED]
    failed.sort(key=lambda node: _time(node.get("finishedAt")) or _LATEST)
    return next((str(node["message"]) for node in reversed(failed) if node.get("message")), "")


def _nodes(status: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the nodes, which Argo compresses in a large workflow."""
    if packed := status.get("compressedNodes"):
        try:
            nodes: Mapping[str, Any] = json.loads(zlib.decompress(base64.b64decode(packed), zlib.MAX_WBITS | 16))
        except (ValueError, binascii.Error, zlib.error):
            return {}
        return nodes
    return status.get("nodes") or {}


def _titles(manifest: Mapping[str, Any]) -> dict[str, str]:
    """Return the titles of the top-level tasks by name, in the order of their dependencies."""
    arguments = ((manifest.get("spec") or {}).get("arguments") or {}).get("parameters") or []
    roots = [one["value"] for one in arguments if one.get("name") == "components-root" and one.get("value")]
    try:
        tasks = json.loads(roots[0])["dag"]["tasks"]
    except (IndexError, ValueError, KeyError, TypeError):
        return {}
    titles: dict[str, str] = {}
    waiting = dict(sorted(tasks.items()))
    while waiting:
        ready = [name for name, task in waiting.items() if not set(task.get("dependentTasks") or ()) & waiting.keys()]
        for name in ready or list(waiting):
            task = waiting.pop(name)
            titles[name] = str((task.get("taskInfo") or {}).get("name") or name)
    return titles


def _is_step(node: Mapping[str, Any]) -> bool:
    template = str(node.get("templateName") or "")
    return template.endswith(_EXECUTOR) or template == _IMPORTER


def _is_driver(node: Mapping[str, Any]) -> bool:
    return node.get("type") == "Pod" and str(node.get("templateName") or "").endswith(_DRIVER)


def _step_name(node: Mapping[str, Any], prefix: str) -> str | None:
    """Return the step that a node belongs to; a node's name is the path of tasks that leads to it."""
    name = _ATTEMPT.sub("", str(node.get("name") or ""))
    if not name.startswith(prefix):
        return None
    path = name.removeprefix(prefix)
    path = path.removeprefix("root.")
    if str(node.get("templateName") or "").endswith(_IMPLEMENTATION):
        return path.removesuffix(".executor")
    return path.removesuffix(_DRIVER) if _is_driver(node) else path


def _step(name: str, nodes: list[Any], manifest: Mapping[str, Any], titles: Mapping[str, str]) -> Step:
    drivers = [node for node in nodes if _is_driver(node)]
    wholes = [node for node in nodes if _is_step(node) or node.get("type") == "DAG"]
    wholes.sort(key=lambda node: node.get("type") != "Retry")  # the node that groups all attempts comes first
    pods = [n for n in nodes if n.get("type") == "Pod" and n not in drivers and n.get("phase") != "Omitted"]
    pods.sort(key=lambda node: (_time(node.get("startedAt")) or _LATEST, str(node.get("name"))))
    whole = wholes[0] if wholes else None
    newest = pods[-1] if pods else (drivers[-1] if drivers else None)
    phase = str((whole or {}).get("phase") or "")
    messages = [_node_message(node) for node in (newest, whole) if node]
    times = [time for node in nodes if (time := _time(node.get("startedAt")))]
    ended = _time((whole or newest or {}).get("finishedAt"))
    state = _state(phase, pods, drivers, whole)
    if state in ("skipped", "not started"):
        return Step(name, titles.get(name, name), state)
    return Step(
        name,
        titles.get(name, name),
        state,
        min(times) if times else None,
        ended if state not in UNFINISHED else None,
        pod_name(manifest, newest) if newest is not None else None,
        next((message for message in messages if message), ""),
        len(pods),
        _node_message(pods[-2]) if len(pods) > 1 else "",
    )


def _node_message(node: Mapping[str, Any]) -> str:
    return str(node.get("message") or "").removeprefix("main: ")


def _state(phase: str, pods: list[Any], drivers: list[Any], whole: Mapping[str, Any] | None) -> str:
    if whole is None:
        return "failed" if drivers and drivers[-1].get("phase") in _FAILED else "preparing"
    if phase in _FAILED:
        return "failed"
    if phase == "Omitted":
        return "not started"
    if phase == "Succeeded":
        return "succeeded" if pods or not _is_step(whole) else "cached"
    if pods and pods[-1].get("phase") in _FAILED:
        return "retrying"
    if pods and pods[-1].get("phase") == "Pending":
        return "waiting"
    return _PHASES.get(phase, "waiting")


def pod_name(manifest: Mapping[str, Any], node: Mapping[str, Any]) -> str:
    """Return the pod name of a node, which Argo builds from the workflow, the template and the node id."""
    workflow = str(manifest["metadata"]["name"])
    identity, name = str(node.get("id") or ""), str(node.get("name") or "")
    if (manifest["metadata"].get("annotations") or {}).get("workflows.argoproj.io/pod-name-format") == "v1":
        return identity
    if name == workflow:
        return workflow
    prefix = workflow if ".inline" in name else f"{workflow}-{node.get('templateName')}"
    return f"{prefix[: _LONGEST_POD_NAME - _HASH_LENGTH - 1]}-{identity.rpartition('-')[2]}"


def _time(text: Any) -> datetime.datetime | None:
    if not text:
        return None
    try:
        return datetime.datetime.fromisoformat(str(text).replace("Z", "+00:00"))
    except ValueError:
        return None


_DETAILS = {"SUCCEEDED": "succeeded", "SKIPPED": "skipped", "FAILED": "failed", "RUNNING": "running"}


def _from_details(run: Any) -> Workflow:
    """Build the workflow from the v2beta1 API, which has names, states and times only."""
    details = (run.run_details.task_details if run.run_details else None) or []
    steps = []
    for task in details:
        name = str(task.display_name or "")
        technical = name in ("", "root", "executor") or name.startswith("executor(") or name.endswith(_DRIVER)
        if technical or not task.start_time or task.start_time.year <= 1970:
            continue
        state = _DETAILS.get(str(task.state), "waiting")
        ended = task.end_time if task.end_time and task.end_time.year > 1970 and state not in UNFINISHED else None
        steps.append(Step(name, name, state, task.start_time, ended))
    steps.sort(key=lambda step: step.started or _LATEST)
    workflows = {
        step.name for step in steps if step.started == steps[0].started and re.search(r"-[a-z0-9]{5}$", step.name)
    }
    return Workflow("", tuple(step for step in steps if step.name not in workflows))
