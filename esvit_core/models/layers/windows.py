"""Attention within (shifted) windows of a map.

A layout holds the position of each token and the mask of a shift. It is computed once per resolution and device and is
not part of a network's state.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from timm.layers import resize_rel_pos_bias_table_simple, to_2tuple, trunc_normal_
from torch import Tensor, nn

from esvit_core.kernels import window_attention
from esvit_core.kernels.window_attention import attend_in_windows
from esvit_core.models.layers.attention import attend
from esvit_core.torch_private import outside_modes

MASKED = -100.0  # as published, not minus infinity


@dataclass(frozen=True)
class WindowLayout:
    """Arrangement of the tokens of a map in its (shifted) windows."""

    token_index: Tensor  # (windows, N) token at each position of the windows, -1 for padding
    index: Tensor  # (windows * N,) the same with an arbitrary token for padding
    inverse: Tensor  # (tokens,) position of each token
    padding: Tensor | None  # (P,) positions of padding; None: no padding
    mask: Tensor | None  # (windows, 1, N, N) added to the logits of shifted windows
    windows: int


def window_layout(height: int, width: int, window: int, shift: int, device: torch.device) -> WindowLayout:
    """Return the layout of a map, which is computed once per resolution and device."""
    if torch.compiler.is_compiling():  # a trace's tensors must not outlive it
        return _window_layout.__wrapped__(height, width, window, shift, device)
    return outside_modes(_window_layout, height, width, window, shift, device)  # nor must fake tensors


@functools.lru_cache(maxsize=256)
def _window_layout(height: int, width: int, window: int, shift: int, device: torch.device) -> WindowLayout:
    # numpy, so that the caller's default device does not affect the cache.
    tokens = height * width
    grid = np.arange(tokens).reshape(height, width)
    grid = np.pad(grid, ((0, -height % window), (0, -width % window)), constant_values=tokens)  # (Hp, Wp)
    index = _partition(np.roll(grid, (-shift, -shift), (0, 1)), window)  # (windows, N)
    inverse = index.ravel().argsort(kind="stable")[:tokens]
    padding = (index.ravel() == tokens).nonzero()[0]
    mask = None
    if shift > 0:
        part = np.zeros_like(grid)
        slices = (slice(0, -window), slice(-window, -shift), slice(-shift, None))
        for i, rows in enumerate(slices):
            for j, columns in enumerate(slices):
                part[rows, columns] = 3 * i + j
        part = _partition(part, window)
        mask = np.where(part[:, None, :, None] == part[:, None, None, :], 0, MASKED).astype(np.float32)
    with torch.inference_mode(False):
        return WindowLayout(
            token_index=torch.from_numpy(np.where(index == tokens, -1, index)).to(device),
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
    """Arrange tokens (B, L, C) in windows (B, windows * N, C); padding gets ``fill`` (C,).

    Each token has exactly one position, so the gradient is a lookup, too, rather than a scattered sum.
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
    """Arrange windows (B, windows * N, C) as tokens (B, L, C)."""

    @staticmethod
    def forward(ctx: Any, windows: Tensor, layout: WindowLayout) -> Tensor:
        ctx.layout = layout
        return windows.index_select(1, layout.inverse)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        layout = ctx.layout
        out = gradient.index_select(1, layout.index)
        if layout.padding is not None:
            out.index_fill_(1, layout.padding, 0)  # an assignment of 0 would wait for the GPU
        return out, None


def attend_fused(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, scale: float) -> Tensor:
    """Compute attention of (B, windows, heads, N, d) with a bias (windows or 1, heads, N, N) in the GPU's fused kernel.

    Windows and heads share one axis, so that the bias is not copied for each image.
    """
    shape = q.shape
    bias = bias.expand(shape[1], -1, -1, -1).flatten(0, 1)[None]  # (1, windows * heads, N, N)
    q, k, v = (t.flatten(1, 2) for t in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=scale).view(shape)


class WindowAttention(nn.Module):
    """Multi-head attention within (shifted) windows with a relative position bias.

    Attributes:
        use_c_kernel: use the C kernel for shapes it supports; :mod:`esvit_core.kernels.choose` sets it.
        triton_kernel: the module of the Triton kernel, used for shapes it supports; set likewise.
    """

    relative_position_index: Tensor
    use_c_kernel = False
    triton_kernel: Any = None

    def __init__(self, dim: int, num_heads: int, window_size: int, shift_size: int, qkv_bias: bool = True) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.window_size = window_size
        self.shift_size = shift_size
        self.scale = (dim // num_heads) ** -0.5
        span = 2 * window_size - 1
        self.relative_position_bias_table = nn.Parameter(torch.zeros(span**2, num_heads))
        self.register_buffer("relative_position_index", self._position_index(window_size))
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)
        trunc_normal_(self.relative_position_bias_table, std=0.02)

    @staticmethod
    def _position_index(window: int) -> Tensor:
        """Return the row of the bias table for each pair of positions in a window, (N, N)."""
        rows, columns = torch.meshgrid(torch.arange(window), torch.arange(window), indexing="ij")
        rows, columns = rows.flatten(), columns.flatten()
        rows = rows[:, None] - rows[None] + window - 1
        columns = columns[:, None] - columns[None] + window - 1
        return rows * (2 * window - 1) + columns

    def set_window(self, window_size: int, shift_size: int) -> None:
        """Change window and shift; the bias table is resized bicubically."""
        self.shift_size = shift_size
        if window_size == self.window_size:
            return
        self.window_size = window_size
        table, span = self.relative_position_bias_table, 2 * window_size - 1
        shape = (span**2, self.num_heads)
        resized = resize_rel_pos_bias_table_simple(table.detach(), to_2tuple(window_size), shape)
        self.relative_position_bias_table = nn.Parameter(resized, table.requires_grad)
        self.relative_position_index = self._position_index(window_size).to(table.device)

    def layout(self, x: Tensor) -> WindowLayout:
        return window_layout(x.shape[1], x.shape[2], self.window_size, self.shift_size, x.device)

    def _bias(self) -> Tensor:
        """Return the relative position bias, (heads, N, N)."""
        size = self.window_size**2
        bias = self.relative_position_bias_table[self.relative_position_index.view(-1)]
        return bias.view(size, size, -1).permute(2, 0, 1).contiguous()  # adding it is slow otherwise

    def _masked_bias(self, layout: WindowLayout) -> Tensor:
        """Return the bias plus the mask, (windows or 1, heads, N, N)."""
        bias = self._bias()[None]
        return bias if layout.mask is None else bias + layout.mask

    def _in_windows(self, qkv: Tensor, layout: WindowLayout) -> tuple[Tensor, Tensor, Tensor]:
        """Arrange the tokens' ``qkv`` (B, L, 3C) as queries, keys and values, each (B, windows, heads, N, C / heads)."""
        B, C = qkv.shape[0], qkv.shape[2] // 3
        # A padding token is zero before the qkv layer, so it equals the layer's bias after it.
        bias = self.qkv.bias if self.qkv.bias is not None else qkv.new_zeros(3 * C)
        qkv = ToWindows.apply(qkv, bias, layout)  # (B, windows * N, 3C)
        qkv = qkv.view(B, layout.windows, -1, 3, self.num_heads, C // self.num_heads)
        q, k, v = qkv.permute(3, 0, 1, 4, 2, 5).unbind(0)
        return q, k, v

    def forward(self, x: Tensor) -> Tensor:
        B, H, W, C = x.shape
        layout = self.layout(x)
        qkv = self.qkv(x).flatten(1, 2)  # (B, L, 3C)
        if self.use_c_kernel and window_attention.supports(qkv, self.num_heads, self.window_size**2):
            mask = None if layout.mask is None else layout.mask[:, 0]
            out = attend_in_windows(
                qkv, self.num_heads, self.qkv.bias, layout.token_index, self._bias(), mask, self.scale
            )
            return self.proj(out).view(B, H, W, C)
        if self.supports_triton(B * H * W):
            out = self.attend_to_maps(qkv.flatten(0, 1), ((B, H, W),))
            return self.proj(out).view(B, H, W, C)
        q, k, v = self._in_windows(qkv, layout)
        bias = self._masked_bias(layout).to(q.dtype)
        out = attend_fused(q, k, v, bias, self.scale) if q.is_cuda else attend(q, k, v, bias, self.scale)
        out = out.transpose(2, 3).reshape(B, -1, C)  # (B, windows * N, C)
        return self.proj(FromWindows.apply(out, layout)).view(B, H, W, C)

    def supports_triton(self, tokens: int) -> bool:
        """Return whether the Triton kernel is selected, and supports this layer with so many tokens."""
        return (
            self.triton_kernel is not None
            and not torch.compiler.is_compiling()
            and self.triton_kernel.supports(tokens, self.qkv.in_features, self.num_heads, self.window_size)
        )

    def attend_to_maps(self, qkv: Tensor, maps: tuple[tuple[int, int, int], ...]) -> Tensor:
        """Compute attention in all windows of maps of several sizes at once with the Triton kernel.

        Args:
            qkv: queries, keys and values of the tokens of the maps one after the other, (T, 3C).
            maps: number of images, height and width of each kind of map, tokens.

        Returns:
            (T, C).
        """
        kernel, window, shift = self.triton_kernel, self.window_size, self.shift_size
        windows = outside_modes(kernel.window_table, maps, window, shift, qkv.device)
        table = self.relative_position_bias_table
        out: Tensor = kernel.attend_in_windows(qkv, self.qkv.bias, windows, table, window, shift > 0, self.scale)
        return out

    def weights(self, x: Tensor) -> Tensor:
        """Return the attention weights, (B, windows, heads, N, N)."""
        layout = self.layout(x)
        q, k, _ = self._in_windows(self.qkv(x).flatten(1, 2), layout)
        return (q * self.scale @ k.mT + self._masked_bias(layout)).softmax(-1)
