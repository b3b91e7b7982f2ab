"""View features and region maps of square images, as exported and embedded."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor, nn


def view_and_region_map(backbone: Any, images: Tensor) -> tuple[Tensor, Tensor]:
    """Return the view features (B, D) and the region map (B, H, W, D') of images (B, 3, S, S).

    Raises:
        ValueError: the images or the region map are not square.
    """
    view, regions = backbone.views_and_regions(images)  # (B, D), (B, N, D')
    count = regions.shape[1]
    side = math.isqrt(count)
    if images.shape[2] != images.shape[3] or side * side != count:
        raise ValueError(f"{count} regions of images {tuple(images.shape[2:])} px are no square map")
    return view, regions.unflatten(1, (side, side))


class FeatureNetwork(nn.Module):
    """A backbone whose forward pass returns the view features (B, D) and, optionally, the regions (B, H, W, D')."""

    def __init__(self, backbone: nn.Module, regions: bool) -> None:
        super().__init__()
        self.backbone = backbone
        self.regions = regions

    def forward(self, pixels: Tensor) -> tuple[Tensor, ...]:
        """Map normalized images (B, 3, S, S) to features."""
        return view_and_region_map(self.backbone, pixels) if self.regions else (self.backbone(pixels),)
