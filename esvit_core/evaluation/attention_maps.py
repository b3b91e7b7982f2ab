"""Attention of the last block, one heat map per head (EsViT, section 4.3 and appendix)."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn


def shows_attention(backbone: nn.Module, images: torch.Tensor) -> bool:
    """Whether :func:`attention_maps` shows attention: a ResNet has none, its map is the strength of its regions.

    Args:
        backbone: in eval mode, where it is.
        images: network input, (B, 3, S, S); the first is tried.
    """
    with torch.inference_mode():
        try:
            backbone.last_attention(images[:1].to(next(backbone.parameters()).device))  # type: ignore[operator]
        except ValueError:
            return False
    return True


def attention_maps(backbone: nn.Module, images: torch.Tensor) -> np.ndarray:
    """How much attention each region receives in the last block, scaled to 0..1 per head.

    Args:
        backbone: in eval mode, where it is.
        images: network input, (B, 3, S, S).

    Returns:
        (B, heads, h, w); one head where the map is the strength of regions.

    Raises:
        ValueError: the backbone gives neither.
    """
    device = next(backbone.parameters()).device
    with torch.inference_mode():
        maps = backbone.attention_map(images.to(device)).float().cpu().numpy()  # type: ignore[operator]
    return scale_maps(maps)


def scale_maps(maps: np.ndarray) -> np.ndarray:
    """Each map of (..., h, w) stretched to 0..1; a flat one becomes 0."""
    low, high = maps.min((-2, -1), keepdims=True), maps.max((-2, -1), keepdims=True)
    return (maps - low) / np.maximum(high - low, 1e-12)
