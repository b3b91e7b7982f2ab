"""The section for the pods of a compiled pipeline: image, secrets and resources.

It defines the resources of the pods of the steps and of a training job (:mod:`launch_settings`). None of it changes what
a run computes, so it is not part of the run's identity (:meth:`Config.digest`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, Self

from pydantic import Field, model_validator

from esvit_core.config.kubernetes_names import (
    AUTO,
    AutoBytes,
    AutoCpu,
    LabelName,
    LabelValue,
    LimitBytes,
    ObjectName,
    QualifiedName,
    quantity_bytes,
    quantity_cores,
)
from esvit_core.config.section import Section

TOKEN_FOLDER = "/var/run/secrets/esvit.dev/store"  # mount point of the service account token
CA_FOLDER = "/etc/esvit/ca"  # mount point of cluster.ca_config_map

Role = Literal["prepare", "train", "evaluate", "publish"]


class Toleration(Section):
    """A toleration of a node taint, as in a pod specification."""

    key: QualifiedName | None = None
    operator: Literal["Exists", "Equal"] = "Equal"
    value: LabelValue | None = None
    effect: Literal["NoSchedule", "PreferNoSchedule", "NoExecute"] | None = None

    @model_validator(mode="after")
    def _complete(self) -> Self:
        if self.key is None and self.operator == "Equal":
            raise ValueError("a toleration without a key tolerates every taint and requires operator: Exists")
        return self


class PodConfig(Section):
    """The pods of one kind of step. `auto` is computed from the recipe (:mod:`esvit_core.planning.pod_sizes`)."""

    cpu: AutoCpu = Field(AUTO, description="CPU request. auto: less for a small network.")
    cpu_limit: AutoCpu | None = Field(
        AUTO, description="CPU limit. auto: above the request, with headroom. null: no limit."
    )
    memory: AutoBytes = Field(AUTO, description="Memory request, including /dev/shm. auto: what `esvit plan` counts.")
    memory_limit: LimitBytes = Field(
        AUTO, description="Memory limit. auto: the request, with headroom where the request is auto too."
    )
    accelerator: QualifiedName = Field("nvidia.com/gpu", description="Resource name of the accelerator.")
    accelerators: int = Field(0, ge=0, description="Number of accelerators.")
    node_selector: dict[QualifiedName, LabelValue] = Field({}, description="Required labels of the node.")
    tolerations: tuple[Toleration, ...] = Field((), description="Taints of nodes that the pod tolerates.")
    shared_memory: AutoBytes | None = Field(
        None,
        description="Size of /dev/shm, which counts as memory. auto: enough for the batches of the data-loading workers. "
        "null: 64 MiB.",
    )
    scratch: AutoBytes = Field(
        AUTO,
        description="Size limit of /work, where a step keeps caches, checkpoints and temporary files. "
        "auto: enough for the recipe's checkpoints.",
    )
    image: str | None = Field(None, description="Image of this kind of step. null: cluster.image.")
    secret: ObjectName | None = Field(
        None, description="Kubernetes secret with the ESVIT_S3_* keys. null: cluster.secret."
    )
    retries: int = Field(
        3, ge=0, description="Maximum retries: of the step within its pod after exit code 75, and of a lost pod."
    )
    retry_seconds: int = Field(
        30,
        gt=0,
        description="Wait before the first retry, seconds; doubles each time, within the pod up to ten minutes.",
    )
    timeout_minutes: int | None = Field(None, gt=0, description="Maximum run time of the pod, minutes. null: no limit.")

    @property
    def cache_gib(self) -> str:
        """Size limit of the shard cache, GiB (``ESVIT_CACHE_GIB``): half of the scratch folder; other files need the rest.

        ``scratch`` must be a quantity, as in the pods that :func:`esvit_core.planning.pod_sizes.resolve_pod` returns.
        The cache cannot find the limit out itself: free disk space does not reflect the size limit of a pod's volume.
        """
        return f"{quantity_bytes(self.scratch) / 2 / 2**30:g}"

    @model_validator(mode="after")
    def _limits_are_at_least_requests(self) -> Self:
        limit = self.memory if self.memory_limit == AUTO else self.memory_limit
        if _less(self.cpu_limit, self.cpu, quantity_cores):
            raise ValueError(f"cpu_limit {self.cpu_limit}: expected at least cpu, which is {self.cpu}")
        if _less(self.memory_limit, self.memory, quantity_bytes):
            raise ValueError(f"memory_limit {self.memory_limit}: expected at least memory, which is {self.memory}")
        if self.shared_memory == limit != AUTO or _less(limit, self.shared_memory, quantity_bytes):
            raise ValueError(
                f"shared_memory {self.shared_memory}: expected less than the pod's memory, which is {limit}"
            )
        return self


class PreparePodConfig(PodConfig):
    """The pods of the steps that prepare images."""

    parallelism: int = Field(
        1,
        ge=1,
        le=100,
        description="Pods that prepare the images at the same time, each a share of them; one more pod puts the shares "
        "together. It is set when a pipeline is compiled.",
    )


def _less(one: str | None, other: str | None, amount: Callable[[str], float]) -> bool:
    """Whether the quantity ``one`` is known to be less than ``other``."""
    known = one is not None and other is not None and AUTO not in (one, other)
    return known and amount(str(one)) < amount(str(other))


_PREPARE = PreparePodConfig(timeout_minutes=24 * 60)
_PODS: dict[Role, PodConfig] = {
    "train": PodConfig(shared_memory=AUTO, retries=5),
    "evaluate": PodConfig(shared_memory="1Gi", timeout_minutes=12 * 60),
    "publish": PodConfig(timeout_minutes=60),
}
# The pod of a step that launches a training job and waits for it.
_LAUNCHER = {"cpu": "100m", "cpu_limit": "1", "memory": "512Mi", "memory_limit": "2Gi", "scratch": "2Gi"}


class ClusterConfig(Section):
    """Where a compiled pipeline runs; not part of a run's identity."""

    image: str = Field("esvit/trainer:0.1.0", description="Container image of the steps; name@sha256:... pins it.")
    image_pull_policy: Literal["Always", "IfNotPresent", "Never"] = "IfNotPresent"
    image_pull_secrets: tuple[ObjectName, ...] = Field((), description="Kubernetes secrets for the image registry.")
    secret: ObjectName | None = Field(
        None,
        description="Kubernetes secret with the ESVIT_S3_* keys, for all steps. "
        "null: esvit-object-store-<kind of step>, as `esvit store keys` creates them.",
    )
    identity: Literal["keys", "web-identity"] = Field(
        "keys",
        description="How pods authenticate to the object store. keys: keys from secrets. web-identity: the token of their "
        "service account, which the store's STS exchanges for temporary credentials (docs/security.md).",
    )
    store_config_map: ObjectName = Field(
        "esvit-object-store",
        description="Config map with the ESVIT_S3_* variables that are not secret; with identity: web-identity.",
    )
    token_audience: str | None = Field(
        None,
        min_length=1,
        description="Audience of the token that the STS accepts; with identity: web-identity. null: the platform injects "
        "token and role into the pods of an annotated service account, as EKS does.",
    )
    ca_config_map: LabelName | None = Field(
        None,
        description="Config map with the CA of the object store, mounted at /etc/esvit/ca (ESVIT_S3_CA_FILE names the file).",
    )
    service_account: ObjectName | None = Field(
        "esvit-pipeline",
        description="Service account of the steps, requested by `esvit submit`. null: the default of the Kubeflow server.",
    )
    retry_lost_pods: bool = Field(
        True,
        description="Let Kubeflow restart pods that were deleted, evicted or lost, which requires a server from 2.17 on. "
        "Older servers would retry user errors too, so `esvit submit` and `esvit register` set it to false for them.",
    )
    run_as: int | None = Field(
        10001, gt=0, description="User and group id of the steps. null: the image's, or what the cluster assigns."
    )
    queue: LabelValue | None = Field(
        None, description="Kueue local queue of the steps' pods (label kueue.x-k8s.io/queue-name). null: none."
    )
    priority: LabelValue | None = Field(
        None, description="Kueue workload priority class of the steps' pods (label kueue.x-k8s.io/priority-class)."
    )
    prepare: PreparePodConfig = Field(_PREPARE, description="Pods of the steps that prepare images as shards.")
    train: PodConfig = Field(
        _PODS["train"], description="Pod of the pre-training step, or each pod of the job that `launch` starts."
    )
    evaluate: PodConfig = Field(_PODS["evaluate"], description="Pods of the steps that compute and evaluate features.")
    publish: PodConfig = Field(_PODS["publish"], description="Pods of the light steps, such as report and promotion.")

    def pod(self, role: Role) -> PodConfig:
        """Return the pod settings of a kind of step."""
        pod: PodConfig = getattr(self, role)
        return pod

    def launcher_pod(self) -> PodConfig:
        """Return the pod settings of a pre-training step that launches a job: small, and on any node."""
        kept = self.train.model_dump(include={"secret", "retries", "retry_seconds", "timeout_minutes"})
        return PodConfig(**_LAUNCHER, image=self.image, **kept)

    def secret_of(self, role: Role) -> str:
        """Return the Kubernetes secret with the object-store keys of a kind of step."""
        return self.pod(role).secret or self.secret or f"esvit-object-store-{role}"

    @model_validator(mode="after")
    def _one_identity(self) -> Self:
        if self.identity == "keys" and self.token_audience is not None:
            raise ValueError("token_audience has no effect with identity: keys; set identity: web-identity")
        if self.identity == "web-identity":
            kinds = [f"{kind}.secret" for kind in _PODS if self.pod(kind).secret is not None]
            if unused := ["secret"] * (self.secret is not None) + kinds:
                raise ValueError(f"{', '.join(unused)}: no effect with identity: web-identity; leave out")
        return self

    @model_validator(mode="before")
    @classmethod
    def _complete_pods(cls, given: Any) -> Any:
        """Fill in the defaults of the kind of step, so that `train: {accelerators: 8}` is enough."""
        if not isinstance(given, dict):
            return given
        own = {role: pod.model_dump() | given[role] for role, pod in _PODS.items() if isinstance(given.get(role), dict)}
        return given | own

    @model_validator(mode="after")
    def _priority_requires_queue(self) -> Self:
        if self.priority and not self.queue:
            raise ValueError("priority: no effect without queue; set cluster.queue to a Kueue local queue")
        return self
