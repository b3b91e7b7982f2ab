"""Sparse and full attention of Vision Longformer, as published.

* Sparse: a token attends to its own window, to the eight windows around it, and to the global tokens; a global token
  attends to all tokens. The map is padded to whole windows, and the padding is masked. ``mode`` 1 is that of the
  published training: each call attends to one random neighbor window besides its own, and in eval mode to all eight.
  Mode 0 always uses all eight, mode -1 none. The global tokens use the weights of the local attention (``SHARE_W``),
  which then have two names in a state dict; the global names are loaded last and win. With ``share_weights=False``
  they have separate weights.
* Full, with relative position biases. For a resolution other than that of construction the biases are resized
  bicubically, as an image of tokens by tokens.

Networks with absolute positions (``a1``) have no relative biases: ``relative=False``.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from timm.layers import trunc_normal_
from torch import Tensor, nn

from esvit_core.models.layers.attention import attend
from esvit_core.models.layers.position_table import look_up, places_of_rows
from esvit_core.models.layers.resize import resize
from esvit_core.torch_private import draw_below, outside_modes

# Offsets of the nine windows that a window attends to, row by row; the fifth is the window itself.
OFFSETS = [(row, column) for row in (-1, 0, 1) for column in (-1, 0, 1)]
OWN = 4


@functools.lru_cache(maxsize=256)
def _window_mask(height: int, width: int, window: int, device: torch.device) -> Tensor:
    """Return -inf for padding and for positions outside the map, (windows, 9, 1, window ** 2)."""
    # numpy, so that the caller's default device does not affect the cache.
    rows, columns = -(-height // window), -(-width // window)
    grid = np.zeros((rows * window, columns * window), dtype=bool)
    grid[:height, :width] = True
    inside = np.zeros((rows + 2, columns + 2, window, window), dtype=bool)  # with a border of windows
    inside[1:-1, 1:-1] = grid.reshape(rows, window, columns, window).swapaxes(1, 2)
    valid = np.stack([inside[1 + r : 1 + r + rows, 1 + c : 1 + c + columns] for r, c in OFFSETS], 2)
    mask = np.where(valid, 0, -np.inf).astype(np.float32).reshape(rows * columns, 9, 1, window**2)
    with torch.inference_mode(False):
        return torch.from_numpy(mask).to(device)


def window_mask(height: int, width: int, window: int, device: torch.device) -> Tensor:
    """Return the mask of a map, which is computed once per resolution and device."""
    if torch.compiler.is_compiling():  # a trace's tensors must not outlive it
        return _window_mask.__wrapped__(height, width, window, device)
    return outside_modes(_window_mask, height, width, window, device)  # nor must fake tensors


def _coordinates(rows: range, columns: range) -> np.ndarray:
    return np.stack(np.meshgrid(rows, columns, indexing="ij")).reshape(2, -1)  # (2, N)


def _position_index(queries: np.ndarray, keys: np.ndarray, reach: tuple[int, int]) -> np.ndarray:
    """Return the row of the bias table for each query and key, (N, M); differences lie within ``reach``."""
    row, column = queries[:, :, None] - keys[:, None] + np.reshape(reach, (2, 1, 1))
    return row * (2 * reach[1] + 1) + column


def _take(x: Tensor, windows: list[int] | Tensor, dim: int) -> Tensor:
    """Select windows. Indexing with a list copies it to the GPU and waits for the copy; this does not."""
    if isinstance(windows, Tensor):
        return x.index_select(dim, windows)
    return torch.stack([x.select(dim, i) for i in windows], dim)


def draw_neighbors_(layers: Sequence[SparseAttention], device: torch.device) -> None:
    """Draw on ``device`` the neighbor window of each layer's next call, without waiting for the draw."""
    if not layers:
        return
    drawn = torch.randint(8, (len(layers), 2), device=device)  # rows of 16 bytes, as compiled kernels want them
    for layer, row in zip(layers, drawn + (drawn >= OWN), strict=True):
        layer.drawn = row[:1]


class _Neighbors(torch.autograd.Function):
    """Return the neighbor in one direction of each window, at the border that of the opposite side; ``x.roll`` by a tensor.

    x (B, rows, columns, ...); offset (1,), an index into OFFSETS.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, offset: Tensor) -> Tensor:
        ctx.save_for_backward(offset)
        return _neighbors(x, offset)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (offset,) = ctx.saved_tensors
        return _neighbors(gradient, len(OFFSETS) - 1 - offset), None  # those in the opposite direction


def _neighbors(x: Tensor, offset: Tensor) -> Tensor:
    rows, columns = (torch.arange(size, device=x.device) for size in x.shape[1:3])
    row = (rows + offset // 3 - 1) % x.shape[1]
    column = (columns + offset % 3 - 1) % x.shape[2]
    at = row[:, None] * x.shape[2] + column
    return x.flatten(1, 2).index_select(1, at.flatten()).view(x.shape)


class GlobalBias(nn.Module):
    """Mixin: biases between the global tokens and the others."""

    g2l_relative_position_bias: nn.Parameter
    g2g_relative_position_bias: nn.Parameter

    def _make_global_bias(self, num_heads: int, global_tokens: int) -> None:
        if global_tokens:
            self.g2l_relative_position_bias = nn.Parameter(torch.zeros(2, num_heads, global_tokens))
            self.g2g_relative_position_bias = nn.Parameter(torch.zeros(num_heads, global_tokens, global_tokens))
            trunc_normal_(self.g2l_relative_position_bias, std=0.02)
            trunc_normal_(self.g2g_relative_position_bias, std=0.02)

    def _from_global(self, tokens: int) -> Tensor:
        """Return the bias of the global queries, (heads, G, G + tokens)."""
        to_local = self.g2l_relative_position_bias[0][..., None].expand(-1, -1, tokens)
        return torch.cat((self.g2g_relative_position_bias, to_local), -1)

    def _to_global(self, tokens: int) -> Tensor:
        """Return the bias of local queries for global keys, (heads, tokens, G)."""
        return self.g2l_relative_position_bias[1][:, None].expand(-1, tokens, -1)


class FullAttention(GlobalBias):
    """Attention between all tokens of a map and its global tokens."""

    relative_position_index: Tensor
    places: Tensor

    def __init__(
        self,
        dim: int,
        num_heads: int,
        size: tuple[int, int],
        global_tokens: int,
        qkv_bias: bool,
        relative: bool = True,
    ) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.relative = relative
        self.global_tokens = global_tokens
        self.scale = (dim // num_heads) ** -0.5
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)
        if not relative:
            return
        height, width = size
        self.local_relative_position_bias_table = nn.Parameter(
            torch.zeros((2 * height - 1) * (2 * width - 1), num_heads)
        )
        trunc_normal_(self.local_relative_position_bias_table, std=0.02)
        self._make_global_bias(num_heads, global_tokens)
        positions = _coordinates(range(height), range(width))
        index = _position_index(positions, positions, (height - 1, width - 1))
        self.register_buffer("relative_position_index", torch.from_numpy(index))
        places = places_of_rows(index.reshape(1, -1), len(self.local_relative_position_bias_table))
        self.register_buffer("places", torch.from_numpy(places), persistent=False)

    def _bias(self, tokens: int) -> Tensor | None:
        """(1, heads, G + tokens, G + tokens)."""
        if not self.relative:
            return None
        built = len(self.relative_position_index)
        bias = look_up(self.local_relative_position_bias_table, self.relative_position_index.view(1, -1), self.places)
        bias = bias.view(1, built, built, -1).permute(0, 3, 1, 2)  # (1, heads, built, built)
        if built != tokens:
            bias = resize(bias, (tokens, tokens))
        if self.global_tokens:
            local = torch.cat((self._to_global(tokens), bias[0]), -1)
            bias = torch.cat((self._from_global(tokens), local), 1)[None]
        return bias

    def _qkv(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        qkv = self.qkv(x).unflatten(-1, (3, self.num_heads, -1))  # (B, N, 3, heads, d)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        return q, k, v

    def forward(self, x: Tensor, height: int, width: int) -> Tensor:
        q, k, v = self._qkv(x)
        bias = self._bias(height * width)
        bias = None if bias is None else bias.to(q.dtype)
        out = attend(q, k, v, bias, self.scale)
        return self.proj(out.transpose(1, 2).flatten(2))

    def weights(self, x: Tensor, height: int, width: int) -> Tensor:
        """Return the attention weights, (B, heads, G + N, G + N)."""
        q, k, _ = self._qkv(x)
        logits, bias = q * self.scale @ k.mT, self._bias(height * width)
        return (logits if bias is None else logits + bias).softmax(-1)


class SparseAttention(GlobalBias):
    """Attention within a window, to its neighbors, and to and from the global tokens.

    Attributes:
        drawn: neighbor of the next call in training in mode 1, as an index into OFFSETS, (1,); None: the call draws it.
    """

    relative_position_index: Tensor
    places: Tensor
    drawn: Tensor | None = None

    def __init__(
        self,
        dim: int,
        num_heads: int,
        window_size: int,
        global_tokens: int,
        qkv_bias: bool,
        mode: int,
        relative: bool = True,
        share_weights: bool = True,
    ) -> None:
        super().__init__()
        self.relative = relative
        self.num_heads = num_heads
        self.window_size = window_size
        self.global_tokens = global_tokens
        self.mode = mode
        self.scale = (dim // num_heads) ** -0.5
        self.query = nn.Linear(dim, dim, bias=qkv_bias)
        self.kv = nn.Linear(dim, 2 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)
        if global_tokens and share_weights:
            self.query_global, self.kv_global, self.proj_global = self.query, self.kv, self.proj
        elif global_tokens:
            self.query_global = nn.Linear(dim, dim, bias=qkv_bias)
            self.kv_global = nn.Linear(dim, 2 * dim, bias=qkv_bias)
            self.proj_global = nn.Linear(dim, dim)
        if not relative:
            return
        w = window_size
        self.local_relative_position_bias_table = nn.Parameter(torch.zeros((4 * w - 1) ** 2, num_heads))
        trunc_normal_(self.local_relative_position_bias_table, std=0.02)
        self._make_global_bias(num_heads, global_tokens)
        own = _coordinates(range(w), range(w))
        keys = [_coordinates(range(r * w, r * w + w), range(c * w, c * w + w)) for r, c in OFFSETS]
        index = _position_index(own, np.concatenate(keys, 1), (2 * w - 1, 2 * w - 1))  # (w ** 2, 9 * w ** 2)
        self.register_buffer("relative_position_index", torch.from_numpy(index))
        of_windows = index.reshape(w * w, 9, w * w).swapaxes(0, 1).reshape(9, -1)
        places = places_of_rows(of_windows, len(self.local_relative_position_bias_table))
        self.register_buffer("places", torch.from_numpy(places), persistent=False)

    def _neighbor_windows(self) -> list[int] | Tensor:
        """Return the windows of this call as indices into OFFSETS, its own first; mode 1 draws one at random in training."""
        if self.mode == -1:
            return [OWN]
        if self.mode > 0 and self.training and self.drawn is not None:
            return F.pad(self.drawn, (1, 0), value=OWN)
        if self.mode > 0 and self.training:
            drawn = draw_below(8)
            return [OWN, drawn + (drawn >= OWN)]
        return [OWN, *(i for i in range(9) if i != OWN)]

    def _bias(self, windows: list[int] | Tensor, mask: Tensor) -> Tensor:
        """Return position bias plus mask, (windows, heads, w ** 2, G + keys)."""
        w2 = self.window_size**2
        masked = _take(mask, windows, 1).transpose(1, 2).flatten(2)[:, None]  # (windows, 1, 1, keys)
        if not self.relative:
            return F.pad(masked, (self.global_tokens, 0))
        index = _take(self.relative_position_index.view(w2, 9, w2), windows, 1).transpose(0, 1).flatten(1)
        places = _take(self.places, windows, 0)
        bias = look_up(self.local_relative_position_bias_table, index, places).unflatten(1, (w2, w2))
        bias = bias.permute(3, 1, 0, 2).flatten(2) + masked  # (windows, heads, w2, keys)
        if self.global_tokens:
            to_global = self._to_global(w2).expand(len(bias), -1, -1, -1)
            bias = torch.cat((to_global, bias), -1)
        return bias

    def forward(self, x: Tensor, height: int, width: int) -> Tensor:
        G = self.global_tokens
        q, kv = self.query(x), self.kv(x)  # (B, G + N, C), (B, G + N, 2C)
        out = self._local(q[:, G:], kv, height, width)
        if not G:
            return self.proj(out)
        if self.query_global is self.query:
            return self.proj(torch.cat((self._global(q[:, :G], kv), out), 1))
        from_global = self.proj_global(self._global(self.query_global(x[:, :G]), self.kv_global(x)))
        return torch.cat((from_global, self.proj(out)), 1)

    def _local(self, q: Tensor, kv: Tensor, height: int, width: int) -> Tensor:
        """Attend from the local tokens: (B, N, C) and (B, G + N, 2C) -> (B, N, C)."""
        B, _, C = q.shape
        G, w, heads = self.global_tokens, self.window_size, self.num_heads
        windows = self._neighbor_windows()
        q = self._partition(q, height, width)  # (B, rows, columns, w2, C)
        local = self._partition(kv[:, G:], height, width)  # (B, rows, columns, w2, 2C)
        rows, columns = q.shape[1:3]
        parts = [kv[:, None, None, :G].expand(-1, rows, columns, -1, -1)] if G else []
        if isinstance(windows, Tensor):
            parts += [local, _Neighbors.apply(local, windows[1:])]
        else:
            parts += [local.roll((-OFFSETS[i][0], -OFFSETS[i][1]), (1, 2)) if i != OWN else local for i in windows]
        k, v = (
            torch.cat(parts, 3).flatten(1, 2).unflatten(-1, (2, heads, -1)).permute(3, 0, 1, 4, 2, 5).unbind(0)
        )  # (B, windows, heads, keys, d)
        q = q.flatten(1, 2).unflatten(-1, (heads, -1)).transpose(2, 3)
        bias = self._bias(windows, window_mask(height, width, w, q.device)).to(q.dtype)
        out = attend(q, k, v, bias, self.scale)
        out = out.transpose(2, 3).reshape(B, rows, columns, w, w, C)
        out = out.transpose(2, 3).reshape(B, rows * w, columns * w, C)
        return out[:, :height, :width].flatten(1, 2)

    def _partition(self, x: Tensor, height: int, width: int) -> Tensor:
        """Partition into windows padded with zeros: (B, N, C) -> (B, rows, columns, w ** 2, C)."""
        w = self.window_size
        x = F.pad(x.unflatten(1, (height, width)), (0, 0, 0, -width % w, 0, -height % w))
        return x.unflatten(1, (-1, w)).unflatten(3, (-1, w)).transpose(2, 3).flatten(3, 4)

    def _global(self, q: Tensor, kv: Tensor) -> Tensor:
        """Attend from the global tokens: (B, G, C) and (B, G + N, 2C) -> (B, G, C)."""
        heads = self.num_heads
        q = q.unflatten(-1, (heads, -1)).transpose(1, 2)  # (B, heads, G, d)
        k, v = kv.unflatten(-1, (2, heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)  # (B, heads, G + N, d)
        bias = None
        if self.relative:
            bias = self._from_global(kv.shape[1] - self.global_tokens)[None].to(q.dtype)
        out = attend(q, k, v, bias, self.scale)
        return out.transpose(1, 2).flatten(2)
