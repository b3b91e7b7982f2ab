"""When a backbone becomes the champion, and when there is reason to train another."""

from __future__ import annotations

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
