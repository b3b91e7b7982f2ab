"""When a backbone becomes the champion, and when there is reason to train another."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from esvit_core.config.section import Section

POINTER_PATTERN = r"^[a-z0-9][a-z0-9-]{0,39}$"


class PromotionConfig(Section):
    """When a backbone becomes the champion."""

    metric: str = Field("knn/20", description="Measured figure that decides: knn/<k>, linear, or transfer/<set>.")
    margin: float = Field(0.0, ge=0, description="Percentage points by which the present champion must be beaten.")
    max_loss: float | None = Field(
        2.0, ge=0, description="Percentage points that no transfer set may lose against the champion; null: any."
    )
    pointer: str = Field("champion", pattern=POINTER_PATTERN)


class RegistryConfig(Section):
    """Where else champions are listed; no part of a run's identity."""

    kind: Literal["none", "kubeflow"] = Field(
        "none", description="kubeflow: after a promotion the champion becomes a version in the Kubeflow Model Registry."
    )
    url: str | None = Field(
        None, description="Of its REST API, http(s)://host:port; null: the variable ESVIT_MODEL_REGISTRY_URL."
    )


class RetrainConfig(Section):
    """When a retraining has reason to begin, and how it goes on from the champion; no part of a run's identity."""

    min_new_images: int = Field(
        100, gt=0, description="Fewer new or changed images than this are left for another time."
    )
    max_gone_fraction: float = Field(
        0.5, ge=0, le=1, description="More earlier images gone from the source than this share is an error."
    )
    epochs_scale: float = Field(
        0.1, gt=0, le=1, description="Factor of training.epochs in a run that goes on from a champion."
    )
    lr_scale: float = Field(
        0.1, gt=0, le=1, description="Factor of optimizer.lr in a run that goes on from a champion."
    )
    claim_hours: float = Field(
        6.0, ge=0, description="Hours without a sign of life after which a retraining may be taken over by another."
    )
