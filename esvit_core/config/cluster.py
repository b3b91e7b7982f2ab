"""The section that says where the steps of a compiled pipeline run: image, secrets, and what their pods get.

Nothing of it changes what a run computes, so it is left out of the run's identity (:meth:`Config.digest`).
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from esvit_core.config.section import Section

CA_FOLDER = "/etc/esvit/ca"  # where the pods have the config map of cluster.ca_config_map

Role = Literal["prepare", "train", "evaluate", "publish"]


def _as_written(value: Any) -> Any:
    """YAML reads `cpu: 8` as a number; Kubernetes writes it as text."""
    return f"{value:g}" if isinstance(value, (int, float)) and not isinstance(value, bool) else value


Cpu = Annotated[str, BeforeValidator(_as_written), Field(pattern=r"^([0-9]*[.])?[0-9]+m?$")]
Bytes = Annotated[str, BeforeValidator(_as_written), Field(pattern=r"^[0-9]+(E|Ei|P|Pi|T|Ti|G|Gi|M|Mi|K|Ki)?$")]
Name = Annotated[str, Field(pattern=r"^[a-z0-9]([a-z0-9.-]{0,251}[a-z0-9])?$")]  # of a Kubernetes object


class Toleration(Section):
    """A taint of nodes that the pod may be put on nevertheless."""

    key: str | None = None
    operator: Literal["Exists", "Equal"] = "Equal"
    value: str | None = None
    effect: Literal["NoSchedule", "PreferNoSchedule", "NoExecute"] | None = None

    @model_validator(mode="after")
    def _complete(self) -> Self:
        if self.key is None and self.operator == "Equal":
            raise ValueError("a toleration without a key tolerates every taint and needs operator: Exists")
        return self


class PodConfig(Section):
    """What the pods of one kind of step get."""

    cpu: Cpu = Field("500m", description="Processor asked for.")
    cpu_limit: Cpu | None = Field("2", description="Processor at most; null: no limit.")
    memory: Bytes = Field("2Gi", description="Memory asked for.")
    memory_limit: Bytes | None = Field("4Gi", description="Memory at most; null: no limit.")
    accelerator: str = Field("nvidia.com/gpu", description="Resource name of the accelerator.")
    accelerators: int = Field(0, ge=0, description="How many of them.")
    node_selector: dict[str, str] = Field({}, description="Labels that the node must have.")
    tolerations: tuple[Toleration, ...] = Field((), description="Taints that the pod tolerates.")
    shared_memory: Bytes | None = Field(None, description="Size of /dev/shm, which counts as memory; null: 64 MiB.")
    scratch: Bytes = Field("10Gi", description="Bound of each of the writable folders /tmp and /work.")
    secret: Name | None = Field(None, description="Secret with the ESVIT_S3_* keys; null: what cluster.secret says.")
    retries: int = Field(
        3, ge=0, description="Times that the step is repeated in its pod after exit code 75, and its pod after a loss."
    )
    retry_seconds: int = Field(
        30, gt=0, description="Wait before the first of them; doubles each time, in the pod up to ten minutes."
    )
    timeout_minutes: int | None = Field(None, gt=0, description="The pod is stopped after this; null: never.")


_PODS: dict[Role, PodConfig] = {
    "prepare": PodConfig(cpu="1", memory="2Gi", memory_limit="8Gi", scratch="50Gi", timeout_minutes=24 * 60),
    "train": PodConfig(
        cpu="2", cpu_limit="8", memory="8Gi", memory_limit="32Gi", shared_memory="4Gi", scratch="50Gi", retries=5
    ),
    "evaluate": PodConfig(
        cpu="1", cpu_limit="4", memory="4Gi", memory_limit="16Gi", shared_memory="1Gi", timeout_minutes=12 * 60
    ),
    "publish": PodConfig(timeout_minutes=60),
}


class ClusterConfig(Section):
    """Where the compiled pipeline runs; no part of a run's identity."""

    image: str = Field("esvit/trainer:0.1.0", description="Image of the steps; name@sha256:... holds it fast.")
    image_pull_policy: Literal["Always", "IfNotPresent", "Never"] = "IfNotPresent"
    image_pull_secrets: tuple[Name, ...] = Field((), description="Kubernetes secrets for the registry.")
    secret: Name | None = Field(
        None,
        description="Kubernetes secret with the ESVIT_S3_* keys, for all steps; "
        "null: esvit-object-store-<kind of step>, as `esvit store keys` makes them.",
    )
    ca_config_map: Name | None = Field(
        None, description="Config map with the store's CA, mounted at /etc/esvit/ca (ESVIT_S3_CA_FILE names the file)."
    )
    service_account: Name | None = Field(
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
    prepare: PodConfig = Field(_PODS["prepare"], description="Steps that turn pictures into shards.")
    train: PodConfig = Field(_PODS["train"], description="Pre-training.")
    evaluate: PodConfig = Field(_PODS["evaluate"], description="Steps that compute and measure features.")
    publish: PodConfig = Field(_PODS["publish"], description="Report, promotion: light steps.")

    def pod(self, role: Role) -> PodConfig:
        """What the pods of that kind of step get."""
        pod: PodConfig = getattr(self, role)
        return pod

    def secret_of(self, role: Role) -> str:
        """The Kubernetes secret from which that kind of step has its keys of the object store."""
        return self.pod(role).secret or self.secret or f"esvit-object-store-{role}"

    @model_validator(mode="before")
    @classmethod
    def _complete_pods(cls, given: Any) -> Any:
        """Take from the kind's own defaults what a recipe leaves out: `train: {accelerators: 8}` is enough."""
        if not isinstance(given, dict):
            return given
        own = {role: pod.model_dump() | given[role] for role, pod in _PODS.items() if isinstance(given.get(role), dict)}
        return given | own
