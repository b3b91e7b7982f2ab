"""Labels, annotations, security context and writable folders of every pod that this project creates.

They apply to the steps of a pipeline, as far as KFP supports them, and to the pods of a training job; a test checks
that the pods of the manifests have the same.
"""

from __future__ import annotations

from typing import Any, Literal

Component = Literal["step", "trainer", "prune", "bucket"]

METRICS_PORT = 9400  # of every training on a cluster; monitors and network policies refer to it
METRICS_PORT_VARIABLE = "ESVIT_METRICS_PORT"
# A sidecar keeps the pod of a finished step or job running. Istio reads the label, versions before 1.10 the annotation.
NO_SIDECAR = {"sidecar.istio.io/inject": "false"}
SCRATCH, TEMPORARY = "/work", "/tmp"  # writable folders; everything large is in the first
TEMPORARY_SIZE = "1Gi"
METRICS_LABEL = "esvit.dev/metrics"  # label of a step's pod that trains itself and serves metrics


def pod_labels(component: Component, **more: str) -> dict[str, str]:
    """Return the labels by which network policies, monitors and people find the pod."""
    return {"app.kubernetes.io/name": "esvit", "app.kubernetes.io/component": component, **NO_SIDECAR, **more}


def queue_labels(queue: str | None, priority: str | None = None) -> dict[str, str]:
    """Return the labels with which Kueue admits a pod or a job.

    Args:
        queue: local queue; None: Kueue ignores the pod.
        priority: a workload priority class.
    """
    labels = {"kueue.x-k8s.io/queue-name": queue, "kueue.x-k8s.io/priority-class": priority}
    return {name: value for name, value in labels.items() if value}


def scratch_variables(cache_gib: str) -> dict[str, str]:
    """Return the environment that directs caches and temporary files to the scratch folder.

    A volume that grows beyond its size limit makes the kubelet evict the pod. A checkpoint, which a resumed training
    reads into a temporary folder, can be larger than ``/tmp``.

    Args:
        cache_gib: size limit of the shard cache, GiB.
    """
    return {"TMPDIR": SCRATCH, "XDG_CACHE_HOME": f"{SCRATCH}/.cache", "ESVIT_CACHE_GIB": cache_gib}


def pod_annotations() -> dict[str, str]:
    """Return the annotations of every pod."""
    return dict(NO_SIDECAR)


def container_security(*capabilities: str) -> dict[str, Any]:
    """Return the security context of each container, which has only the given capabilities."""
    added = {"add": list(capabilities)} if capabilities else {}
    return {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"], **added},
    }


def pod_security(user: int | None) -> dict[str, Any]:
    """Return the security context of a pod.

    Args:
        user: user and group of its processes and volumes; None: those of the image, or what the cluster assigns.
    """
    ids = {} if user is None else dict.fromkeys(("runAsUser", "runAsGroup", "fsGroup"), user)
    return {"runAsNonRoot": True, **ids, "seccompProfile": {"type": "RuntimeDefault"}}
