"""The section for launching training processes: in the step's own pod or machine, or in a job of several pods.

The section ``cluster.train`` defines the resources of the pods in either case.
"""

from __future__ import annotations

import re
from typing import Annotated, Literal, Self

from pydantic import Field, field_validator, model_validator

from esvit_core.config.kubernetes_names import EnvironmentName, LabelName, LabelValue, ObjectName, QualifiedName
from esvit_core.config.section import Section

_CREDENTIAL = re.compile(r"^ESVIT_S3_|(^|_)(KEY|SECRET|TOKEN|PASSWORD)(_|$)", re.IGNORECASE)
_USED_BY_ALL = {"scheduler", "activation_checkpointing", "profile_steps", "allocator"}
_RESERVED = ("cpu", "memory", "ephemeral-storage")  # set by cluster.train
_VOLCANO_ONLY = {"ttl_minutes"}


class LaunchConfig(Section):
    """How the pre-training step launches its processes; not part of a run's identity.

    ``local``: ``training.processes`` processes within the step. ``volcano`` and ``trainjob``: a job with one pod per node,
    through Volcano or the Kubeflow Trainer. A setting that the scheduler does not use is refused.
    """

    scheduler: Literal["local", "volcano", "trainjob"] = Field(
        "local",
        description="local: within the step. volcano: a Volcano job. trainjob: a TrainJob of the Kubeflow Trainer.",
    )
    nodes: int = Field(1, gt=0, le=999, description="Maximum number of pods.")
    min_nodes: int | None = Field(
        None, gt=0, description="Minimum number of pods with which the training starts and continues. null: nodes."
    )
    processes_per_node: int | None = Field(
        None, gt=0, description="Training processes per pod. null: one per accelerator (cluster.train.accelerators)."
    )
    namespace: LabelName | None = Field(
        None, description="Namespace of the job. null: the step's own, or esvit outside a cluster."
    )
    service_account: ObjectName = Field(
        "esvit-trainer", description="Service account of the training pods; it needs no permissions."
    )
    queue: LabelValue | None = Field(
        None, description="volcano: the Volcano queue, null: esvit. trainjob: the Kueue local queue, null: none."
    )
    priority_class: ObjectName | None = Field(None, description="Priority class of the training pods. null: none.")
    spread_over: QualifiedName = Field(
        "kubernetes.io/hostname", description="Node label whose values the pods are spread over where possible."
    )
    interface: str | None = Field(None, description="Network interface for NCCL and gloo. null: their default.")
    env: dict[EnvironmentName, str] = Field(
        {}, description="Additional environment variables of the pods, such as NCCL_IB_HCA; no credentials."
    )
    nccl: dict[EnvironmentName, str] = Field(
        {},
        description="Settings of NCCL, without the prefix NCCL_, such as {IB_HCA: mlx5}; for pods with accelerators.",
    )
    resources: dict[QualifiedName, Annotated[int, Field(gt=0)]] = Field(
        {}, description="Additional resources of each pod, such as {rdma/hca_shared_devices_a: 1}."
    )
    annotations: dict[QualifiedName, str] = Field(
        {}, description="Additional annotations of the pods, such as {k8s.v1.cni.cncf.io/networks: rdma-net}."
    )
    ipc_lock: bool = Field(
        False,
        description="Add the capability IPC_LOCK to the pods, with which RDMA may lock memory; the pod security standards "
        "baseline and restricted refuse it.",
    )
    one_pod_per_node: bool = Field(
        False, description="Never place two pods of the job on the same node. false: avoid it where possible."
    )
    allocator: str | None = Field(
        None,
        pattern=r"^[a-z_]+:[^,\s]+(,[a-z_]+:[^,\s]+)*$",
        description="Settings of torch's allocator of GPU memory (PYTORCH_CUDA_ALLOC_CONF), such as "
        "expandable_segments:True. null: torch's defaults.",
    )
    restarts: int = Field(
        20, ge=0, description="Maximum number of restarts, of processes and of pods, before the training fails."
    )
    pending_minutes: float | None = Field(
        1440.0,
        gt=0,
        description="Maximum time that the job may be pending, since it was created or last ran, minutes; then the step "
        "fails. null: no limit.",
    )
    unfollowed_minutes: float | None = Field(
        15.0,
        ge=2,
        description="A training job that no step has followed for so long, minutes, ends with a checkpoint: the step was "
        "stopped and could not delete the job. null: it trains to its end.",
    )
    activation_checkpointing: bool = Field(
        False,
        description="Recompute each block of the student in the backward pass instead of storing its activations: less "
        "memory, a third slower, the same numbers.",
    )
    profile_steps: int = Field(
        0, ge=0, description="Number of first steps after each start to time and trace, into profile/ of the run."
    )
    ttl_minutes: float = Field(1440.0, ge=0, description="Minutes after its end at which Volcano deletes the job.")

    @property
    def fewest_nodes(self) -> int:
        """Minimum number of pods of the job."""
        return self.min_nodes or self.nodes

    @field_validator("resources")
    @classmethod
    def _additional_resources(cls, resources: dict[str, int]) -> dict[str, int]:
        for name in resources:
            if name in _RESERVED:
                raise ValueError(f"{name}: set by cluster.train.{name if name != 'ephemeral-storage' else 'scratch'}")
        return resources

    @field_validator("nccl")
    @classmethod
    def _without_prefix(cls, settings: dict[str, str]) -> dict[str, str]:
        for name in settings:
            if name.upper().startswith("NCCL_"):
                raise ValueError(f"{name}: leave out the prefix NCCL_, which is added")
        return settings

    @field_validator("env")
    @classmethod
    def _no_credentials(cls, env: dict[str, str]) -> dict[str, str]:
        for name in env:
            if _CREDENTIAL.search(name):
                raise ValueError(
                    f"{name}: looks like a credential, which everyone who can read the job could see; "
                    "put it into the secret that cluster.train.secret names"
                )
        return env

    @model_validator(mode="after")
    def _sizes_fit(self) -> Self:
        if self.fewest_nodes > self.nodes:
            raise ValueError(f"min_nodes {self.min_nodes}: expected at most nodes, which is {self.nodes}")
        if self.one_pod_per_node and self.nodes == 1:
            raise ValueError("one_pod_per_node: no effect with one node; leave out, or set nodes")
        if twice := [f"NCCL_{name}" for name in self.nccl if f"NCCL_{name}" in self.env]:
            raise ValueError(f"{', '.join(twice)}: given in nccl and in env; leave one out")
        return self

    @model_validator(mode="after")
    def _every_setting_has_an_effect(self) -> Self:
        fields = type(self).model_fields
        changed = {name for name in fields if getattr(self, name) != fields[name].get_default()}
        idle = {
            "local": changed - _USED_BY_ALL,
            "trainjob": changed & _VOLCANO_ONLY,
            "volcano": set[str](),
        }[self.scheduler]
        if idle:
            names = ", ".join(f"launch.{name}" for name in fields if name in idle)
            where = "trains in the step's own pod or on this machine" if self.scheduler == "local" else "is not Volcano"
            other = "volcano or trainjob" if self.scheduler == "local" else "volcano"
            raise ValueError(
                f"{names}: no effect with launch.scheduler {self.scheduler}, which {where}; "
                f"leave out, or set launch.scheduler to {other}"
            )
        return self
