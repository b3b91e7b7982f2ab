"""What every pod that we make carries, whoever creates it: labels, annotations, security context.

Used for the steps of a pipeline (as far as KFP lets a pipeline say it) and for the pods of a training job; a test holds
the pods of the manifests to the same.
"""

from __future__ import annotations

from typing import Any, Literal

Component = Literal["step", "trainer", "prune", "bucket"]

METRICS_PORT = 9400  # of every training on a cluster: monitors and network policies name it
METRICS_PORT_VARIABLE = "ESVIT_METRICS_PORT"
# A sidecar keeps the pod of a finished step or job running. Istio reads the label, versions before 1.10 the annotation.
NO_SIDECAR = {"sidecar.istio.io/inject": "false"}
METRICS_LABEL = "esvit.dev/metrics"  # of a step's pod that serves metrics, because it trains by itself


def pod_labels(component: Component, **more: str) -> dict[str, str]:
    """Labels that network policies, monitors and people find the pod by."""
    return {"app.kubernetes.io/name": "esvit", "app.kubernetes.io/component": component, **NO_SIDECAR, **more}


def queue_labels(queue: str | None, priority: str | None = None) -> dict[str, str]:
    """Labels with which Kueue admits a pod or a job.

    Args:
        queue: its local queue; None: none, and Kueue leaves the pod alone.
        priority: a workload priority class.
    """
    labels = {"kueue.x-k8s.io/queue-name": queue, "kueue.x-k8s.io/priority-class": priority}
    return {name: value for name, value in labels.items() if value}


def pod_annotations() -> dict[str, str]:
    """Annotations of every pod."""
    return dict(NO_SIDECAR)


def container_security() -> dict[str, Any]:
    """The security context of each container."""
    return {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }


def pod_security(user: int | None) -> dict[str, Any]:
    """The security context of a pod.

    Args:
        user: user and group of its processes and of its volumes; None: the image's, or what the cluster assigns.
    """
    ids = {} if user is None else dict.fromkeys(("runAsUser", "runAsGroup", "fsGroup"), user)
    return {"runAsNonRoot": True, **ids, "seccompProfile": {"type": "RuntimeDefault"}}
