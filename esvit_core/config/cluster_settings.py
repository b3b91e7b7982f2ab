"""The section that says where the steps of a compiled pipeline run: image, secrets, and what their pods get.

It is the one place for resources: of the pods of the steps, and of those of a training job (:mod:`launch`). Nothing of
it changes what a run computes, so it is left out of the run's identity (:meth:`Config.digest`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, Self

from pydantic import Field, model_validator

from esvit_core.config.kubernetes_names import (
    AUTO,
    AutoBytes,
    AutoCpu,
    Bytes,
    LabelName,
    LabelValue,
    LimitBytes,
    ObjectName,
    QualifiedName,
    quantity_bytes,
    quantity_cores,
)
from esvit_core.config.section import Section

TOKEN_FOLDER = "/var/run/secrets/esvit.dev/store"  # where training pods have their token
CA_FOLDER = "/etc/esvit/ca"  # where the pods have the config map of cluster.ca_config_map

Role = Literal["prepare", "train", "evaluate", "publish"]


class Toleration(Section):
    """A taint of nodes that the pod may be put on nevertheless."""

    key: QualifiedName | None = None
    operator: Literal["Exists", "Equal"] = "Equal"
    value: LabelValue | None = None
    effect: Literal["NoSchedule", "PreferNoSchedule", "NoExecute"] | None = None

    @model_validator(mode="after")
    def _complete(self) -> Self:
        if self.key is None and self.operator == "Equal":
            raise ValueError("a toleration without a key tolerates every taint and needs operator: Exists")
        return self


class PodConfig(Section):
    """What the pods of one kind of step get. `auto` follows from the recipe (:mod:`esvit_core.planning.pod_sizes`)."""

    cpu: AutoCpu = Field(AUTO, description="Processor asked for; auto: little for a small network.")
    cpu_limit: AutoCpu | None = Field(AUTO, description="Processor at most; auto: room to spare; null: no limit.")
    memory: AutoBytes = Field(AUTO, description="Memory asked for, that of /dev/shm included; auto: as `esvit plan`.")
    memory_limit: LimitBytes = Field(
        AUTO, description="Memory at most; auto: what memory says, with room to spare where that is auto too."
    )
    accelerator: QualifiedName = Field("nvidia.com/gpu", description="Resource name of the accelerator.")
    accelerators: int = Field(0, ge=0, description="How many of them.")
    node_selector: dict[QualifiedName, LabelValue] = Field({}, description="Labels that the node must have.")
    tolerations: tuple[Toleration, ...] = Field((), description="Taints that the pod tolerates.")
    shared_memory: Bytes | None = Field(None, description="Size of /dev/shm, which counts as memory; null: 64 MiB.")
    scratch: Bytes = Field("10Gi", description="Bound of each of the writable folders /tmp and /work.")
    image: str | None = Field(None, description="Image of this kind of step; null: cluster.image.")
    secret: ObjectName | None = Field(
        None, description="Secret with the ESVIT_S3_* keys; null: what cluster.secret says."
    )
    retries: int = Field(
        3, ge=0, description="Times that the step is repeated in its pod after exit code 75, and its pod after a loss."
    )
    retry_seconds: int = Field(
        30, gt=0, description="Wait before the first of them; doubles each time, in the pod up to ten minutes."
    )
    timeout_minutes: int | None = Field(None, gt=0, description="The pod is stopped after this; null: never.")

    @property
    def cache_gib(self) -> str:
        """Limit of the cache of shards (``ESVIT_CACHE_GIB``): half of the scratch folder, of which other files need a part.

        The size limit of a pod's volume does not show in what its disk has free.
        """
        return f"{quantity_bytes(self.scratch) / 2 / 2**30:g}"

    @model_validator(mode="after")
    def _limits_are_no_smaller(self) -> Self:
        most = self.memory if self.memory_limit == AUTO else self.memory_limit
        if _less(self.cpu_limit, self.cpu, quantity_cores):
            raise ValueError(f"cpu_limit {self.cpu_limit}: expected at least cpu, which is {self.cpu}")
        if _less(self.memory_limit, self.memory, quantity_bytes):
            raise ValueError(f"memory_limit {self.memory_limit}: expected at least memory, which is {self.memory}")
        if self.shared_memory == most or _less(most, self.shared_memory, quantity_bytes):
            raise ValueError(f"shared_memory {self.shared_memory}: expected less than the pod's memory, {most}")
        return self


def _less(one: str | None, other: str | None, amount: Callable[[str], float]) -> bool:
    """Whether a quantity is known to be less than another."""
    known = one is not None and other is not None and AUTO not in (one, other)
    return known and amount(str(one)) < amount(str(other))


_PODS: dict[Role, PodConfig] = {
    "prepare": PodConfig(scratch="50Gi", timeout_minutes=24 * 60),
    "train": PodConfig(shared_memory="1Gi", scratch="50Gi", retries=5),
    "evaluate": PodConfig(shared_memory="1Gi", timeout_minutes=12 * 60),
    "publish": PodConfig(timeout_minutes=60),
}
# The step that starts a training job and waits for it, whatever the training takes.
_LAUNCHING = {"cpu": "100m", "cpu_limit": "1", "memory": "512Mi", "memory_limit": "2Gi", "scratch": "2Gi"}


class ClusterConfig(Section):
    """Where the compiled pipeline runs; no part of a run's identity."""

    image: str = Field("esvit/trainer:0.1.0", description="Image of the steps; name@sha256:... holds it fast.")
    image_pull_policy: Literal["Always", "IfNotPresent", "Never"] = "IfNotPresent"
    image_pull_secrets: tuple[ObjectName, ...] = Field((), description="Kubernetes secrets for the registry.")
    secret: ObjectName | None = Field(
        None,
        description="Kubernetes secret with the ESVIT_S3_* keys, for all steps; "
        "null: esvit-object-store-<kind of step>, as `esvit store keys` makes them.",
    )
    identity: Literal["keys", "web-identity"] = Field(
        "keys",
        description="How pods prove to the store who they are: keys from secrets, or the token of their service "
        "account, for which the store's STS gives temporary credentials (docs/security.md).",
    )
    store_config_map: ObjectName = Field(
        "esvit-object-store",
        description="Config map with the ESVIT_S3_* variables that are no secret; with identity: web-identity.",
    )
    token_audience: str | None = Field(
        None,
        min_length=1,
        description="Audience of the token that the STS accepts; with identity: web-identity. null: the platform puts "
        "token and role into the pods of an annotated account, as EKS does.",
    )
    ca_config_map: LabelName | None = Field(
        None, description="Config map with the store's CA, mounted at /etc/esvit/ca (ESVIT_S3_CA_FILE names the file)."
    )
    service_account: ObjectName | None = Field(
        "esvit-pipeline", description="Of the steps; `esvit submit` asks for it. null: the server's default."
    )
    retry_lost_pods: bool = Field(
        True,
        description="Let Kubeflow start pods again that were deleted, evicted or lost: right for servers from 2.17 on. "
        "Older ones would repeat mistakes instead; `esvit submit` and `esvit register` then set it to false.",
    )
    run_as: int | None = Field(
        10001, gt=0, description="User and group of the steps; null: the image's, or what the cluster assigns."
    )
    queue: LabelValue | None = Field(
        None, description="Kueue's local queue of the steps' pods (label kueue.x-k8s.io/queue-name); null: none."
    )
    priority: LabelValue | None = Field(
        None, description="Kueue's workload priority class of the steps' pods (kueue.x-k8s.io/priority-class)."
    )
    prepare: PodConfig = Field(_PODS["prepare"], description="Steps that turn images into shards.")
    train: PodConfig = Field(
        _PODS["train"], description="Pre-training: the step's own pod, or each pod of the job that `launch` starts."
    )
    evaluate: PodConfig = Field(_PODS["evaluate"], description="Steps that compute and measure features.")
    publish: PodConfig = Field(_PODS["publish"], description="Report, promotion: light steps.")

    def pod(self, role: Role) -> PodConfig:
        """What the pods of that kind of step get."""
        pod: PodConfig = getattr(self, role)
        return pod

    def launching_pod(self) -> PodConfig:
        """What the pre-training step's pod gets where other pods train: small, and without their nodes."""
        kept = self.train.model_dump(include={"secret", "retries", "retry_seconds", "timeout_minutes"})
        return PodConfig(**_LAUNCHING, image=self.image, **kept)

    def secret_of(self, role: Role) -> str:
        """The Kubernetes secret from which that kind of step has its keys of the object store."""
        return self.pod(role).secret or self.secret or f"esvit-object-store-{role}"

    @model_validator(mode="after")
    def _one_identity(self) -> Self:
        if self.identity == "keys" and self.token_audience is not None:
            raise ValueError("token_audience has no effect with identity: keys; set identity: web-identity")
        if self.identity == "web-identity":
            kinds = [f"{kind}.secret" for kind in _PODS if self.pod(kind).secret is not None]
            if unused := ["secret"] * (self.secret is not None) + kinds:
                raise ValueError(f"{', '.join(unused)}: no effect with identity: web-identity; leave it out")
        return self

    @model_validator(mode="before")
    @classmethod
    def _complete_pods(cls, given: Any) -> Any:
        """Take from the kind's own defaults what a recipe leaves out: `train: {accelerators: 8}` is enough."""
        if not isinstance(given, dict):
            return given
        own = {role: pod.model_dump() | given[role] for role, pod in _PODS.items() if isinstance(given.get(role), dict)}
        return given | own

    @model_validator(mode="after")
    def _priority_is_kueues(self) -> Self:
        if self.priority and not self.queue:
            raise ValueError("priority: has no effect without queue; set cluster.queue to the local queue of Kueue")
        return self
