"""How the training processes are started: in the step's own pod or machine, or in a job of several pods.

What each pod of a job gets is said in one place for both ways, ``cluster.train``.
"""

from __future__ import annotations

import re
from typing import Literal, Self

from pydantic import Field, field_validator, model_validator

from esvit_core.config.kubernetes_names import EnvironmentName, LabelName, LabelValue, ObjectName, QualifiedName
from esvit_core.config.section import Section

_CREDENTIAL = re.compile(r"^ESVIT_S3_|(^|_)(KEY|SECRET|TOKEN|PASSWORD)(_|$)", re.IGNORECASE)
_EVERYWHERE = {"scheduler", "activation_checkpointing", "profile_steps"}
_VOLCANO_ONLY = {"ttl_minutes"}


class LaunchConfig(Section):
    """How the pre-training step starts its processes; no part of what determines a run.

    ``local``: inside the step, as ``training.processes`` says. ``volcano`` and ``trainjob``: in a job of as many pods as
    there are nodes, through Volcano or the Kubeflow Trainer. A setting that the scheduler does not use is refused.
    """

    scheduler: Literal["local", "volcano", "trainjob"] = "local"
    nodes: int = Field(1, gt=0, le=999, description="Pods, at most.")
    min_nodes: int | None = Field(
        None, gt=0, description="Pods with which the training begins and goes on; null: no fewer than nodes."
    )
    processes_per_node: int | None = Field(
        None, gt=0, description="Training processes of a pod; null: one for each of cluster.train.accelerators."
    )
    namespace: LabelName | None = Field(None, description="null: the step's own, else esvit.")
    service_account: ObjectName = Field("esvit-trainer", description="Of the training pods; it needs no rights.")
    queue: LabelValue | None = Field(
        None, description="volcano: its queue, null: esvit; trainjob: Kueue's local queue, null: none."
    )
    priority_class: ObjectName | None = None
    spread_over: QualifiedName = Field(
        "kubernetes.io/hostname", description="Label of nodes over whose values the pods are spread where possible."
    )
    interface: str | None = Field(None, description="Network interface for NCCL and gloo; null: they choose.")
    env: dict[EnvironmentName, str] = Field(
        {}, description="More environment of the pods, such as NCCL_IB_HCA; no credentials."
    )
    restarts: int = Field(20, ge=0, description="Restarts, of processes and of pods, before the training has failed.")
    pending_minutes: float | None = Field(
        1440.0,
        gt=0,
        description="Time that the job may wait for room, since it was created or last ran, before the step gives up; "
        "null: any.",
    )
    activation_checkpointing: bool = Field(
        False,
        description="Compute each block of the student once more in the backward pass instead of keeping what is in it: "
        "less memory, a third more time, the same numbers.",
    )
    profile_steps: int = Field(
        0, ge=0, description="First steps of a start that are timed part by part and traced, into profile/ of the run."
    )
    ttl_minutes: float = Field(1440.0, ge=0, description="Time after its end at which Volcano removes the job.")

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
                    "put it into the secret that cluster.train.secret names"
                )
        return env

    @model_validator(mode="after")
    def _sizes_fit(self) -> Self:
        if self.fewest_nodes > self.nodes:
            raise ValueError(f"min_nodes {self.min_nodes}: expected at most nodes, which is {self.nodes}")
        return self

    @model_validator(mode="after")
    def _every_setting_has_an_effect(self) -> Self:
        fields = type(self).model_fields
        changed = {name for name in fields if getattr(self, name) != fields[name].get_default()}
        idle = {
            "local": changed - _EVERYWHERE,
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
