"""The sections for promotion, the model registry and retraining."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from esvit_core.config.section import Section

POINTER_PATTERN = r"^[a-z0-9][a-z0-9-]{0,39}$"


class PromotionConfig(Section):
    """The conditions under which a backbone becomes the champion."""

    metric: str = Field("knn/20", description="Metric to compare: knn/<k>, linear, or transfer/<set>.")
    rule: Literal["significant", "margin", "always"] = Field(
        "significant",
        description="significant: the gain is shown by its 95 % interval and by McNemar's test, and is at least the margin. "
        "margin: it is at least the margin. always: whatever the figures are.",
    )
    margin: float = Field(
        0.0, ge=0, description="Percentage points by which a backbone must beat the current champion."
    )
    max_loss: float | None = Field(
        2.0,
        ge=0,
        description="Maximum loss against the champion on any transfer set, percentage points; with rule significant only "
        "losses that are shown count. null: no limit.",
    )
    pointer: str = Field(
        "champion", pattern=POINTER_PATTERN, description="Name of the pointer to the champion; one per task."
    )


class RegistryConfig(Section):
    """Registration of champions in a model registry; not part of a run's identity."""

    kind: Literal["none", "kubeflow"] = Field(
        "none", description="kubeflow: register each new champion as a version in the Kubeflow Model Registry."
    )
    url: str | None = Field(
        None,
        description="Address of the registry's REST API, http(s)://host:port. null: the variable ESVIT_MODEL_REGISTRY_URL.",
    )


class RetrainConfig(Section):
    """When a retraining starts, and how it continues from the champion; not part of a run's identity."""

    min_new_images: int = Field(
        100, gt=0, description="Minimum number of new or changed images; with fewer, no run starts."
    )
    max_removed_fraction: float = Field(
        0.5,
        ge=0,
        le=1,
        description="Maximum fraction of earlier images that are gone from the source; more than this is an error.",
    )
    epochs_scale: float = Field(
        0.1, gt=0, le=1, description="Factor of training.epochs in a run that continues from a champion."
    )
    lr_scale: float = Field(
        0.1, gt=0, le=1, description="Factor of optimizer.lr in a run that continues from a champion."
    )
    lease_hours: float = Field(
        6.0,
        ge=0,
        description="Hours without a write to the run after which another owner may take over its retraining.",
    )
