"""What the Kubernetes API says of a step's pod, where that API can be reached: a kubeconfig, or in the cluster.

What Argo says of a waiting pod lacks the reasons that Kubernetes tells in events, such as a volume or a secret that is
not there, and gates of a queue. Nothing here is needed, so that nothing here fails.
"""

from __future__ import annotations

import contextlib
import logging
from typing import Any

_SECONDS = (2, 10)  # to connect, to answer


def pod_reason(namespace: str, pod: str) -> str:
    """Why the pod does not run yet, in the words of Kubernetes; empty: it runs, or nobody can say."""
    # The user's kubeconfig may name another cluster than KFP's, or one that is gone; both are no answer.
    with contextlib.suppress(Exception):
        return _reason(_api(), namespace, pod)
    return ""


def pod_log(namespace: str, pod: str) -> str | None:
    """The log of the container that runs the step; None: there is none, or it cannot be read."""
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
    logging.getLogger("urllib3.connectionpool").setLevel(logging.ERROR)  # it warns of every try
    settings = client.Configuration.get_default_copy()
    settings.retries = False
    return client.CoreV1Api(client.ApiClient(settings))


def _reason(api: Any, namespace: str, pod: str) -> str:
    found = api.read_namespaced_pod(pod, namespace, _request_timeout=_SECONDS)
    statuses = [*(found.status.init_container_statuses or ()), *(found.status.container_statuses or ())]
    for status in statuses:
        waiting = status.state.waiting if status.state else None
        if waiting and waiting.reason not in (None, "PodInitializing", "ContainerCreating"):
            return _words(waiting.reason, waiting.message)
    for condition in found.status.conditions or ():
        if condition.type == "PodScheduled" and condition.status == "False":
            return _words(condition.reason, condition.message)
    events = api.list_namespaced_event(
        namespace, field_selector=f"involvedObject.name={pod},type=Warning", _request_timeout=_SECONDS
    ).items
    if found.status.phase != "Pending" or not events:
        return ""
    return _words(events[-1].reason, events[-1].message)


def _words(reason: str | None, message: str | None) -> str:
    return " ".join(": ".join(part for part in (reason, message) if part).split())
