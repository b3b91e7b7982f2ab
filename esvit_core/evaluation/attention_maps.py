"""Attention of the last block, one heat map per head (EsViT, section 4.3 and appendix)."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn


def shows_attention(backbone: nn.Module, images: torch.Tensor) -> bool:
    """Return whether :func:`attention_maps` shows attention; a ResNet has none, so its map shows the norms of its regions.

    Args:
        backbone: in eval mode; it stays on its device.
        images: network input, (B, 3, S, S); only the first is used.
    """
    with torch.inference_mode():
        try:
            backbone.last_attention(images[:1].to(next(backbone.parameters()).device))  # type: ignore[operator]
        except ValueError:
            return False
    return True


def attention_maps(backbone: nn.Module, images: torch.Tensor) -> np.ndarray:
    """Compute how much attention each region receives in the last block, scaled to 0..1 per head.

    Args:
        backbone: in eval mode; it stays on its device.
        images: network input, (B, 3, S, S).

    Returns:
        (B, heads, h, w); one head if the map shows the norms of the regions.

    Raises:
        ValueError: the backbone provides neither.
    """
    device = next(backbone.parameters()).device
    with torch.inference_mode():
        maps = backbone.attention_map(images.to(device)).float().cpu().numpy()  # type: ignore[operator]
    return scale_maps(maps)


def scale_maps(maps: np.ndarray) -> np.ndarray:
    """Scale each map of (..., h, w) to 0..1; a constant map becomes 0."""
    low, high = maps.min((-2, -1), keepdims=True), maps.max((-2, -1), keepdims=True)
    return (maps - low) / np.maximum(high - low, 1e-12)
