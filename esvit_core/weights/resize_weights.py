"""Resize what depends on the image size or the window size: position embeddings and tables of relative position biases."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from esvit_core.models.layers.resize import resize
from esvit_core.weights.snapshot import Weights
from esvit_core.weights.timm_names import COMPUTED

RESIZABLE = ("pos_embed", "relative_position_bias_table")


def resize_weights(own: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> tuple[Weights, list[str]]:
    """Return ``weights`` with position embeddings and bias tables in the sizes of a network.

    Args:
        own: state of the network.
        weights: weights under the same names.

    Returns:
        The weights; those that cannot be resized are unchanged, and buffers that the network computes for its own sizes are
        left out. Then what was resized, with both sizes.
    """
    found, resized = dict(weights), []
    for name, value in weights.items():
        target = own.get(name)
        if target is None or target.shape == value.shape:
            continue
        if name.endswith(COMPUTED):  # the network has its own
            del found[name]
        if not name.endswith(RESIZABLE):
            continue
        change = _table if name.endswith(RESIZABLE[1]) else _positions
        if (changed := change(value, target.shape)) is not None:
            found[name] = changed
            resized.append(f"{name} {_size(value.shape)} to {_size(target.shape)}")
    return found, resized


def _table(table: Tensor, shape: torch.Size) -> Tensor | None:
    """Resize a table (S * S, heads) bicubically."""
    if table.ndim != 2 or len(shape) != 2 or table.shape[1] != shape[1]:
        return None
    here, there = math.isqrt(table.shape[0]), math.isqrt(shape[0])
    if here**2 != table.shape[0] or there**2 != shape[0]:
        return None
    grid = table.float().mT.reshape(1, -1, here, here)
    return resize(grid, (there, there)).flatten(2)[0].mT.contiguous().to(table.dtype)


def _positions(embedding: Tensor, shape: torch.Size) -> Tensor | None:
    """Resize position embeddings (1, T + S * S, D) bicubically; the first T, of class tokens, stay."""
    if embedding.ndim != 3 or len(shape) != 3 or embedding.shape[2] != shape[2]:
        return None
    here, there = math.isqrt(embedding.shape[1]), math.isqrt(shape[1])
    tokens = shape[1] - there**2
    if embedding.shape[1] - here**2 != tokens:
        return None
    first, patches = embedding[:, :tokens], embedding[:, tokens:]
    grid = patches.float().mT.reshape(1, -1, here, here)
    resized = resize(grid, (there, there), antialias=True).flatten(2).mT
    return torch.cat((first, resized.to(embedding.dtype)), 1).contiguous()


def _size(shape: torch.Size) -> str:
    return "x".join(map(str, shape))
