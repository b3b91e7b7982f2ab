"""Where the training processes run: in the step's own pod or machine, or in a job of several pods."""

from __future__ import annotations

import re
from typing import Literal, Self

from pydantic import Field, field_validator, model_validator

from esvit_core.config.cluster import Name, Toleration
from esvit_core.config.section import Section

_DNS_LABEL = r"^[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?$"
_CREDENTIAL = re.compile(r"^ESVIT_S3_|(^|_)(KEY|SECRET|TOKEN|PASSWORD)(_|$)", re.IGNORECASE)


class LaunchConfig(Section):
    """How the pre-training step starts its processes; no part of what determines a run.

    ``local``: inside the step, one process per GPU. ``volcano`` and ``trainjob``: in a job of as many pods as there
    are nodes, through Volcano or the Kubeflow Trainer. ``queue`` and ``ttl_minutes`` are Volcano's only.
    """

    scheduler: Literal["local", "volcano", "trainjob"] = "local"
    nodes: int = Field(1, gt=0, le=999, description="Pods, at most.")
    min_nodes: int | None = Field(
        None, gt=0, description="Pods with which the training begins and goes on; null: no fewer than nodes."
    )
    processes_per_node: int | None = Field(None, gt=0, description="Training processes of a pod; null: one per GPU.")
    gpus: int = Field(0, ge=0, description="GPUs of a pod.")
    gpu_resource: str = Field("nvidia.com/gpu", description="What the cluster calls a GPU.")
    cpu: float = Field(4.0, gt=0, description="Cores of a pod.")
    memory_gib: float = Field(16.0, gt=0, description="Memory of a pod, that of /dev/shm included, GiB.")
    shm_gib: float = Field(2.0, gt=0, description="Size of /dev/shm, in memory, GiB.")
    scratch_gib: float = Field(50.0, gt=0, description="Disk of a pod for shards and what waits for the store, GiB.")
    image: str | None = Field(None, description="Image of the pods; null: cluster.image.")
    secret: Name | None = Field(None, description="Secret with the ESVIT_S3_* keys; null: that of the step.")
    namespace: str | None = Field(None, pattern=_DNS_LABEL, description="null: the step's own, else esvit.")
    service_account: Name = Field("esvit-trainer", description="Of the training pods; it needs no rights.")
    queue: Name = Field("esvit", description="Volcano's queue.")
    priority_class: Name | None = None
    node_selector: dict[str, str] = Field({}, description="Labels that the nodes must have.")
    tolerations: tuple[Toleration, ...] = Field((), description="Taints that the pods tolerate.")
    spread_over: str = Field(
        "kubernetes.io/hostname", description="Label of nodes over whose values the pods are spread where possible."
    )
    interface: str | None = Field(None, description="Network interface for NCCL and gloo; null: they choose.")
    env: dict[str, str] = Field({}, description="More environment of the pods, such as NCCL_IB_HCA; no credentials.")
    restarts: int = Field(20, ge=0, description="Restarts, of processes and of pods, before the training has failed.")
    pending_minutes: float | None = Field(
        1440.0, gt=0, description="Time that the job may wait for room in the cluster; null: any."
    )
    recompute: bool = Field(
        False,
        description="Compute each block of the student once more in the backward pass instead of keeping what is in it: "
        "less memory, a third more time, the same numbers.",
    )
    profile_steps: int = Field(
        0, ge=0, description="First steps of a start that are timed part by part and traced, into profile/ of the run."
    )
    ttl_minutes: float = Field(1440.0, ge=0, description="Time after its end at which Volcano removes the job.")

    @property
    def processes(self) -> int:
        """Training processes of a pod."""
        return self.processes_per_node or max(1, self.gpus)

    @property
    def fewest_nodes(self) -> int:
        return self.min_nodes or self.nodes

    @field_validator("env")
    @classmethod
    def _no_credentials(cls, env: dict[str, str]) -> dict[str, str]:
        for name in env:
            if _CREDENTIAL.search(name):
                raise ValueError(
                    f"{name}: looks like a credential, and this would be readable in the job; "
                    "put it into the secret that launch.secret names"
                )
        return env

    @model_validator(mode="after")
    def _sizes_fit(self) -> Self:
        if self.fewest_nodes > self.nodes:
            raise ValueError(f"min_nodes {self.min_nodes}: expected at most nodes, which is {self.nodes}")
        if self.gpus and self.processes > self.gpus:
            raise ValueError(f"processes_per_node {self.processes}: expected at most gpus, which is {self.gpus}")
        if self.shm_gib >= self.memory_gib:
            raise ValueError(f"shm_gib {self.shm_gib:g}: expected less than memory_gib, which is {self.memory_gib:g}")
        return self
