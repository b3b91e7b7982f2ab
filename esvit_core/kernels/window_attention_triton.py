"""Window attention on a GPU: one forward and one backward kernel that read queries, keys and values where the tokens lie.

Windows are not copied, bias and mask are computed from their small tables, and attention weights are not saved. A program
computes one head in every n-th window, so that it reads the bias once and adds up its gradient in registers; the sums of
the programs are added in a fixed order. ``tests/kernels/test_window_attention_triton.py`` runs the kernels in Triton's
interpreter on a CPU.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from esvit_core.kernels.triton_support import launch

MAX_WINDOW = 8  # side; a window is one tile
MAX_HEAD_WIDTH = 32
MASKED = tl.constexpr(-100.0)  # as published, not minus infinity
_PROGRAMS = 1024
_BACKWARD_OPTIONS = {
    "num_warps": 8,
    "num_stages": 1,
}  # fewer warps or loads in advance need more registers than there are
_LABELS = 16  # an entry of a table of windows is token * 16 + part of the shifted map, with token -1 for padding


@triton.jit
def _rows(x, entry, row, column, inside, fill):  # type: ignore[no-untyped-def]
    """Load the rows of the tokens; padding has the values ``fill`` (D,)."""
    token = (entry >> 4)[:, None]
    other = tl.broadcast_to(fill[None, :].to(x.dtype.element_ty), entry.shape[0], column.shape[0])
    return tl.load(x + token * row + column[None, :], mask=(token >= 0) & inside[None, :], other=other)


@triton.jit
def _bias_tile(table, head, heads, N: tl.constexpr, WINDOW: tl.constexpr, TILE: tl.constexpr):  # type: ignore[no-untyped-def]
    """Return the relative position bias of all pairs, (TILE, TILE); minus infinity for keys outside the window."""
    i = tl.arange(0, TILE)[:, None]
    j = tl.arange(0, TILE)[None, :]
    position = (i // WINDOW - j // WINDOW + WINDOW - 1) * (2 * WINDOW - 1) + (i % WINDOW - j % WINDOW + WINDOW - 1)
    inside = (i < N) & (j < N)
    bias = tl.load(table + position * heads + head, mask=inside, other=0.0)
    return tl.where(j < N, bias, float("-inf"))


@triton.jit
def _logits(q, k, entry, bias, scale, SHIFTED: tl.constexpr):  # type: ignore[no-untyped-def]
    logits = tl.dot(q, tl.trans(k), input_precision="ieee") * scale + bias
    if SHIFTED:
        part = entry & 15
        logits += tl.where(part[:, None] == part[None, :], 0.0, MASKED)
    return logits


@triton.jit
def _attend_kernel(  # type: ignore[no-untyped-def]
    qkv, fill, windows, table, biases, out, lse, count, heads, scale,
    N: tl.constexpr, WINDOW: tl.constexpr, SHIFTED: tl.constexpr, D: tl.constexpr, TILE: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(1)
    positions, d = tl.arange(0, TILE), tl.arange(0, WIDTH)
    C, inside = heads * D, d < D
    column = head * D + d
    fill_q = tl.load(fill + column, mask=inside, other=0.0)
    fill_k = tl.load(fill + C + column, mask=inside, other=0.0)
    fill_v = tl.load(fill + 2 * C + column, mask=inside, other=0.0)
    bias = _bias_tile(table, head, heads, N, WINDOW, TILE)
    if tl.program_id(0) == 0:  # for the backward pass
        tl.store(biases + head * (TILE * TILE) + positions[:, None] * TILE + positions[None, :], bias)
    for window in range(tl.program_id(0), count, tl.num_programs(0)):
        entry = tl.load(windows + window * N + positions, mask=positions < N, other=-16)
        q = _rows(qkv, entry, 3 * C, column, inside, fill_q)
        k = _rows(qkv, entry, 3 * C, C + column, inside, fill_k)
        v = _rows(qkv, entry, 3 * C, 2 * C + column, inside, fill_v)
        logits = _logits(q, k, entry, bias, scale, SHIFTED)
        largest = tl.max(logits, 1)
        p = tl.exp(logits - largest[:, None])
        total = tl.sum(p, 1)
        result = tl.dot(p.to(v.dtype), v, input_precision="ieee") / total[:, None]
        token = entry >> 4
        real = (token >= 0)[:, None] & inside[None, :]
        tl.store(out + token[:, None] * C + column[None, :], result.to(v.dtype), mask=real)
        tl.store(lse + (window * heads + head) * N + positions, largest + tl.log(total), mask=positions < N)


@triton.jit
def _attend_backward_kernel(  # type: ignore[no-untyped-def]
    qkv, fill, windows, biases, out, lse, outer, of_qkv, of_bias, of_fill, count, heads, scale,
    N: tl.constexpr, WINDOW: tl.constexpr, SHIFTED: tl.constexpr, D: tl.constexpr, TILE: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    first, head = tl.program_id(0), tl.program_id(1)
    positions, d = tl.arange(0, TILE), tl.arange(0, WIDTH)
    C, inside = heads * D, d < D
    column = head * D + d
    fill_q = tl.load(fill + column, mask=inside, other=0.0)
    fill_k = tl.load(fill + C + column, mask=inside, other=0.0)
    fill_v = tl.load(fill + 2 * C + column, mask=inside, other=0.0)
    bias_tiles = biases + head * (TILE * TILE)
    zeros = tl.zeros((WIDTH,), tl.float32)
    bias_sum = tl.zeros((TILE, TILE), tl.float32)
    fill_k_sum = tl.zeros((WIDTH,), tl.float32)
    fill_v_sum = tl.zeros((WIDTH,), tl.float32)
    for window in range(first, count, tl.num_programs(0)):
        entry = tl.load(windows + window * N + positions, mask=positions < N, other=-16)
        token = entry >> 4
        real = (token >= 0)[:, None] & inside[None, :]
        padding = ((token < 0) & (positions < N))[:, None]
        q = _rows(qkv, entry, 3 * C, column, inside, fill_q)
        k = _rows(qkv, entry, 3 * C, C + column, inside, fill_k)
        v = _rows(qkv, entry, 3 * C, 2 * C + column, inside, fill_v)
        grad = _rows(outer, entry, C, column, inside, zeros)
        result = _rows(out, entry, C, column, inside, zeros)
        delta = tl.sum(grad.to(tl.float32) * result.to(tl.float32), 1)
        log_sum = tl.load(lse + (window * heads + head) * N + positions, mask=positions < N, other=float("inf"))
        bias = tl.load(bias_tiles + positions[:, None] * TILE + positions[None, :])
        p = tl.exp(_logits(q, k, entry, bias, scale, SHIFTED) - log_sum[:, None])
        of_v = tl.dot(tl.trans(p.to(v.dtype)), grad, input_precision="ieee")
        p = p * (tl.dot(grad, tl.trans(v), input_precision="ieee") - delta[:, None])  # gradient of the logits
        bias_sum += p
        of_logits = p.to(v.dtype)
        of_q = tl.dot(of_logits, k, input_precision="ieee") * scale
        of_k = tl.dot(tl.trans(of_logits), q, input_precision="ieee") * scale
        rows = of_qkv + token[:, None] * (3 * C) + column[None, :]
        tl.store(rows, of_q.to(v.dtype), mask=real)
        tl.store(rows + C, of_k.to(v.dtype), mask=real)
        tl.store(rows + 2 * C, of_v.to(v.dtype), mask=real)
        fill_k_sum += tl.sum(tl.where(padding, of_k, 0.0), 0)
        fill_v_sum += tl.sum(tl.where(padding, of_v, 0.0), 0)
    pairs = positions[:, None] * N + positions[None, :]
    inside_pairs = (positions[:, None] < N) & (positions[None, :] < N)
    tl.store(of_bias + (first * heads + head) * (N * N) + pairs, bias_sum, mask=inside_pairs)
    tl.store(of_fill + first * (3 * C) + column, zeros, mask=inside)  # outputs of padding are dropped
    tl.store(of_fill + first * (3 * C) + C + column, fill_k_sum, mask=inside)
    tl.store(of_fill + first * (3 * C) + 2 * C + column, fill_v_sum, mask=inside)


def supports(tokens: int, width: int, heads: int, window: int) -> bool:
    """Return whether the kernels support ``tokens`` of this width with windows of this side: offsets have 32 bits."""
    head_width = width // heads
    return window <= MAX_WINDOW and head_width <= MAX_HEAD_WIDTH and 3 * tokens * width < 2**31


def attend_in_windows(
    qkv: Tensor, fill: Tensor | None, windows: Tensor, table: Tensor, window: int, shifted: bool, scale: float
) -> Tensor:
    """Compute ``softmax(scale q k^T + bias + mask) v`` for each window and head.

    Args:
        qkv: queries, keys and values of the tokens of all images, (T, 3C), bfloat16 or float32.
        fill: query, key and value of padding, (3C,), float32; None: zeros.
        windows: (windows, N), int32: ``16 * token + part``, where tokens in different parts are masked from each other and
            padding is token -1. Each token has one position.
        table: relative position biases, ((2 * window - 1) ** 2, heads), float32.
        window: side of a window, tokens.
        shifted: whether there is more than one part.
        scale: factor of the products.

    Returns:
        (T, C), in the dtype of ``qkv``.
    """
    fill = torch.zeros(qkv.shape[1], device=qkv.device) if fill is None else fill
    out: Tensor = _WindowAttention.apply(qkv.contiguous(), fill, windows, table, window, shifted, scale)
    return out


class _WindowAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, qkv: Tensor, fill: Tensor, windows: Tensor, table: Tensor, window: int, shifted: bool, scale: float
    ) -> Tensor:
        (count, N), heads = windows.shape, table.shape[1]
        out = qkv.new_empty(len(qkv), qkv.shape[1] // 3)
        lse = torch.empty(count, heads, N, device=qkv.device)
        ctx.constants = constants = _constants(qkv, heads, window, shifted)
        biases = torch.empty(heads, constants["TILE"], constants["TILE"], device=qkv.device)
        ctx.window, ctx.scale = window, scale
        launch(
            _attend_kernel,
            (_programs(count, heads), heads),
            qkv,
            fill,
            windows,
            table,
            biases,
            out,
            lse,
            count,
            heads,
            scale,
            **constants,
            num_warps=4,
        )
        ctx.save_for_backward(qkv, fill, windows, biases, out, lse)
        return out

    @staticmethod
    def backward(ctx: Any, outer: Tensor) -> tuple[Tensor | None, ...]:
        qkv, fill, windows, biases, out, lse = ctx.saved_tensors
        (count, N), heads = windows.shape, len(biases)
        programs = _programs(count, heads)
        of_qkv = torch.empty_like(qkv)
        of_bias = torch.empty(programs, heads, N * N, device=qkv.device)
        of_fill = torch.empty(programs, len(fill), device=qkv.device)
        launch(
            _attend_backward_kernel,
            (programs, heads),
            *(
                qkv,
                fill,
                windows,
                biases,
                out,
                lse,
                outer.contiguous(),
                of_qkv,
                of_bias,
                of_fill,
                count,
                heads,
                ctx.scale,
            ),
            **ctx.constants,
            **_BACKWARD_OPTIONS,
        )
        of_table = None
        if ctx.needs_input_grad[3]:
            of_table = _pairs_of_entries(ctx.window, qkv.device) @ of_bias.sum(0).T  # (entries, heads)
        return of_qkv, of_fill.sum(0) if ctx.needs_input_grad[1] else None, None, of_table, None, None, None


def _programs(windows: int, heads: int) -> int:
    """Return the number of programs for each head; it decides the order of sums, so it depends on no device."""
    return min(windows, max(1, _PROGRAMS // heads))


def _constants(qkv: Tensor, heads: int, window: int, shifted: bool) -> dict[str, Any]:
    D, N = qkv.shape[1] // (3 * heads), window**2
    sizes = {"TILE": max(16, triton.next_power_of_2(N)), "WIDTH": max(16, triton.next_power_of_2(D))}
    return {"N": N, "WINDOW": window, "SHIFTED": shifted, "D": D, **sizes}


@functools.lru_cache(maxsize=64)
def _pairs_of_entries(window: int, device: torch.device) -> Tensor:
    """Return 1 for each entry of the bias table and each pair of positions that it belongs to, (entries, N * N)."""
    row, column = np.divmod(np.arange(window**2), window)
    span = 2 * window - 1
    entry = (row[:, None] - row + window - 1) * span + column[:, None] - column + window - 1
    pairs = np.arange(span**2)[:, None] == entry.ravel()
    with torch.inference_mode(False):
        return torch.from_numpy(pairs.astype(np.float32)).to(device)


@functools.lru_cache(maxsize=256)
def window_table(maps: tuple[tuple[int, int, int], ...], window: int, shift: int, device: torch.device) -> Tensor:
    """Return the table of the windows of maps whose tokens follow each other, (windows, N), int32.

    Args:
        maps: number of images, height and width of each kind of map, tokens.
        window: side of a window, tokens.
        shift: shift of the windows, tokens.
        device: of the result.
    """
    tables, first = [], 0
    for images, height, width in maps:
        tokens = np.arange(height * width).reshape(height, width)
        padding = ((0, -height % window), (0, -width % window))
        tokens = _partition(np.roll(np.pad(tokens, padding, constant_values=-1), (-shift, -shift), (0, 1)), window)
        part = np.zeros((height + padding[0][1], width + padding[1][1]), dtype=np.int64)
        if shift > 0:
            part += 3 * _bands(part.shape[0], window, shift)[:, None] + _bands(part.shape[1], window, shift)
        offset = first + height * width * np.arange(images)[:, None, None]
        token = np.where(tokens < 0, -1, tokens + offset)  # (images, windows, N)
        tables.append((_LABELS * token + _partition(part, window)).reshape(-1, window**2))
        first += images * height * width
    if first * _LABELS >= 2**31:
        raise ValueError(f"{first} tokens: too many for a table of 32-bit numbers")
    with torch.inference_mode(False):
        return torch.from_numpy(np.concatenate(tables).astype(np.int32)).to(device)


def _bands(length: int, window: int, shift: int) -> np.ndarray:
    """Return 0, 1 or 2 for the bands of a shifted axis, (length,)."""
    positions = np.arange(length)
    return (positions >= length - window).astype(np.int64) + (positions >= length - shift)


def _partition(grid: np.ndarray, window: int) -> np.ndarray:
    """(H, W) -> (windows, N)."""
    height, width = grid.shape
    grid = grid.reshape(height // window, window, width // window, window)
    return grid.swapaxes(1, 2).reshape(-1, window * window)
