"""State and log of a step's pod from the Kubernetes API, if it can be reached: by a kubeconfig, or in the cluster.

Argo's message for a pending pod lacks the reasons that Kubernetes reports as events, such as a missing volume or secret,
and scheduling gates of a queue. These details are optional, so nothing here raises.
"""

from __future__ import annotations

import contextlib
import logging
from typing import Any

_SECONDS = (2, 10)  # to connect, to answer


def pod_reason(namespace: str, pod: str) -> str:
    """Return why the pod does not run yet, as Kubernetes reports it; empty: it runs, or the reason is unknown."""
    # The user's kubeconfig may name another cluster than KFP's, or one that no longer exists.
    with contextlib.suppress(Exception):
        return _reason(_api(), namespace, pod)
    return ""


def pod_log(namespace: str, pod: str) -> str | None:
    """Return the log of the container that runs the step; None: there is none, or it cannot be read."""
    with contextlib.suppress(Exception):
        answer = _api().read_namespaced_pod_log(
            pod, namespace, container="main", _request_timeout=_SECONDS, _preload_content=False
        )
        return str(answer.data.decode(errors="replace"))
    return None


def _api() -> Any:
    from kubernetes import client, config

    try:
        config.load_incluster_config()
    except config.ConfigException:
        config.load_kube_config()
    logging.getLogger("urllib3.connectionpool").setLevel(logging.ERROR)  # it warns of every attempt
    settings = client.Configuration.get_default_copy()
    settings.retries = False
    return client.CoreV1Api(client.ApiClient(settings))


def _reason(api: Any, namespace: str, pod: str) -> str:
    pod_state = api.read_namespaced_pod(pod, namespace, _request_timeout=_SECONDS)
    statuses = [*(pod_state.status.init_container_statuses or ()), *(pod_state.status.container_statuses or ())]
    for status in statuses:
        waiting = status.state.waiting if status.state else None
        if waiting and waiting.reason not in (None, "PodInitializing", "ContainerCreating"):
            return _join(waiting.reason, waiting.message)
    for condition in pod_state.status.conditions or ():
        if condition.type == "PodScheduled" and condition.status == "False":
            return _join(condition.reason, condition.message)
    events = api.list_namespaced_event(
        namespace, field_selector=f"involvedObject.name={pod},type=Warning", _request_timeout=_SECONDS
    ).items
    if pod_state.status.phase != "Pending" or not events:
        return ""
    return _join(events[-1].reason, events[-1].message)


def _join(reason: str | None, message: str | None) -> str:
    return " ".join(": ".join(part for part in (reason, message) if part).split())
