"""Windows of a map for attention: where each token lies, which pairs a shift separates, and the attention itself.

Layouts are computed once per resolution and device; they are no part of a network's state.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

MASKED = -100.0  # as published: not minus infinity


@dataclass(frozen=True)
class WindowLayout:
    """How the tokens of a map lie in its (shifted) windows."""

    index: Tensor  # (windows * N,) token at each place of the windows; any token where there is padding
    inverse: Tensor  # (tokens,) place of each token
    padding: Tensor | None  # (P,) places of padding; None: there is none
    mask: Tensor | None  # (windows, 1, N, N) added to the logits of shifted windows
    windows: int


def window_layout(height: int, width: int, window: int, shift: int, device: torch.device) -> WindowLayout:
    """The layout of a map, computed once per resolution and device."""
    if torch.compiler.is_compiling():  # tensors of a trace must not outlive it
        return _window_layout.__wrapped__(height, width, window, shift, device)
    return _window_layout(height, width, window, shift, device)


@functools.lru_cache(maxsize=256)
def _window_layout(height: int, width: int, window: int, shift: int, device: torch.device) -> WindowLayout:
    # numpy, so that no mode or default device of the caller (inference, fake tensors, meta) reaches the cache.
    tokens = height * width
    places = np.arange(tokens).reshape(height, width)
    places = np.pad(places, ((0, -height % window), (0, -width % window)), constant_values=tokens)  # (Hp, Wp)
    index = _partition(np.roll(places, (-shift, -shift), (0, 1)), window)  # (windows, N)
    inverse = index.ravel().argsort(kind="stable")[:tokens]
    padding = (index.ravel() == tokens).nonzero()[0]
    mask = None
    if shift > 0:
        part = np.zeros_like(places)
        slices = (slice(0, -window), slice(-window, -shift), slice(-shift, None))
        for i, rows in enumerate(slices):
            for j, columns in enumerate(slices):
                part[rows, columns] = 3 * i + j
        part = _partition(part, window)
        mask = np.where(part[:, None, :, None] == part[:, None, None, :], 0, MASKED).astype(np.float32)
    with torch.inference_mode(False):
        return WindowLayout(
            index=torch.from_numpy(index.ravel().clip(max=tokens - 1)).to(device),
            inverse=torch.from_numpy(inverse).to(device),
            padding=torch.from_numpy(padding).to(device) if len(padding) else None,
            mask=None if mask is None else torch.from_numpy(mask).to(device),
            windows=len(index),
        )


def _partition(grid: np.ndarray, window: int) -> np.ndarray:
    """(H, W) -> (windows, N)."""
    height, width = grid.shape
    grid = grid.reshape(height // window, window, width // window, window)
    return grid.swapaxes(1, 2).reshape(-1, window * window)


class ToWindows(torch.autograd.Function):
    """Tokens (B, L, C) to the places of the windows (B, windows * N, C), ``fill`` (C,) where there is padding.

    Each token has one place, so the gradient is a look-up as well, and not the scattered sum of an index's gradient.
    """

    @staticmethod
    def forward(ctx: Any, tokens: Tensor, fill: Tensor, layout: WindowLayout) -> Tensor:
        ctx.layout = layout
        out = tokens.index_select(1, layout.index)
        if layout.padding is not None:
            out[:, layout.padding] = fill.to(out.dtype)
        return out

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor | None, None]:
        layout, fill = ctx.layout, None
        if ctx.needs_input_grad[1] and layout.padding is not None:
            fill = gradient.index_select(1, layout.padding).sum(
                (0, 1), dtype=torch.promote_types(gradient.dtype, torch.float32)
            )
        return gradient.index_select(1, layout.inverse), fill, None


class FromWindows(torch.autograd.Function):
    """The places of the windows (B, windows * N, C) back to tokens (B, L, C)."""

    @staticmethod
    def forward(ctx: Any, windows: Tensor, layout: WindowLayout) -> Tensor:
        ctx.layout = layout
        return windows.index_select(1, layout.inverse)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        layout = ctx.layout
        out = gradient.index_select(1, layout.index)
        if layout.padding is not None:
            out[:, layout.padding] = 0
        return out, None


def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, scale: float) -> Tensor:
    """Attention of (B, windows, heads, N, d) with a bias (windows or 1, heads, N, N).

    On a GPU the fused kernel, with windows and heads in one axis so that the bias is not copied for each picture;
    on a processor, where windows are small and the fused kernel knows no gradient of the bias, the plain formula.
    """
    if not q.is_cuda:
        return ((q * scale @ k.mT).add_(bias)).softmax(-1) @ v
    shape = q.shape
    bias = bias.expand(shape[1], -1, -1, -1).flatten(0, 1)[None]  # (1, windows * heads, N, N)
    q, k, v = (t.flatten(1, 2) for t in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=scale).view(shape)
