"""Window attention on a GPU for windows of 9 x 9 to 16 x 16 tokens, such as the published windows of 14.

As in :mod:`esvit_core.kernels.window_attention_triton`, queries, keys and values are read where the tokens lie, the result
is written there, and attention weights are not saved. A window is too large for one tile, so a program keeps a block of
queries (in the kernel for the gradients of keys and values, a block of keys) of one head and goes through the blocks of the
other side, in every n-th window, as FlashAttention does (Dao, 2023). The gradient of the bias has a kernel of its own, which
adds up one block of pairs in registers. The sums of the programs are added in a fixed order.
``tests/kernels/test_window_attention_triton.py`` runs the kernels in Triton's interpreter on a CPU.
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
from esvit_core.kernels.window_attention_triton import MASKED, MAX_HEAD_WIDTH, _rows, window_table
from esvit_core.torch_private import outside_modes

__all__ = ["MAX_WINDOW", "attend_in_windows", "supports", "window_table"]

MAX_WINDOW = 16  # side
_PROGRAMS = 1024
_BLOCK = 64  # queries or keys of a program
_OPTIONS = {"num_warps": 4, "num_stages": 1}
_STEP = 32  # queries at a time in the kernel that holds keys; 64 need more registers than there are


@triton.jit
def _fills(fill, column, C, inside):  # type: ignore[no-untyped-def]
    """Return query, key and value of padding, each (WIDTH,)."""
    q = tl.load(fill + column, mask=inside, other=0.0)
    k = tl.load(fill + C + column, mask=inside, other=0.0)
    return q, k, tl.load(fill + 2 * C + column, mask=inside, other=0.0)


@triton.jit
def _entries(windows, window, positions, N: tl.constexpr):  # type: ignore[no-untyped-def]
    return tl.load(windows + window * N + positions, mask=positions < N, other=-16)


@triton.jit
def _logits(a, b, own, other, biases, queries, keys, scale, N: tl.constexpr, SHIFTED: tl.constexpr):  # type: ignore[no-untyped-def]
    """Return the logits of rows ``a`` and columns ``b``; minus infinity for keys outside the window.

    ``queries`` and ``keys`` are the positions of rows and columns, or of columns and rows; they broadcast. ``biases`` are
    those of the head.
    """
    bias = tl.load(biases + queries * N + keys, mask=(queries < N) & (keys < N), other=0.0)
    logits = tl.dot(a, tl.trans(b), input_precision="ieee") * scale + tl.where(keys < N, bias, float("-inf"))
    if SHIFTED:
        logits += tl.where((own & 15)[:, None] == (other & 15)[None, :], 0.0, MASKED)
    return logits


@triton.jit
def _delta(grad, out):  # type: ignore[no-untyped-def]
    return tl.sum(grad.to(tl.float32) * out.to(tl.float32), 1)


@triton.jit
def _log_sums(lse, window, head, heads, queries, N: tl.constexpr):  # type: ignore[no-untyped-def]
    return tl.load(lse + (window * heads + head) * N + queries, mask=queries < N, other=float("inf"))


@triton.jit
def _attend_kernel(  # type: ignore[no-untyped-def]
    qkv, fill, windows, biases, out, lse, count, heads, scale,
    N: tl.constexpr, SHIFTED: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    head, d = tl.program_id(2), tl.arange(0, WIDTH)
    queries = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    C, inside = heads * D, d < D
    column, biases = head * D + d, biases + head * (N * N)
    fill_q, fill_k, fill_v = _fills(fill, column, C, inside)
    for window in range(tl.program_id(0), count, tl.num_programs(0)):
        own = _entries(windows, window, queries, N)
        q = _rows(qkv, own, 3 * C, column, inside, fill_q)
        largest = tl.full((BLOCK,), float("-inf"), tl.float32)
        total = tl.zeros((BLOCK,), tl.float32)
        result = tl.zeros((BLOCK, WIDTH), tl.float32)
        for start in range(0, N, BLOCK):
            keys = start + tl.arange(0, BLOCK)
            entry = _entries(windows, window, keys, N)
            k = _rows(qkv, entry, 3 * C, C + column, inside, fill_k)
            v = _rows(qkv, entry, 3 * C, 2 * C + column, inside, fill_v)
            logits = _logits(q, k, own, entry, biases, queries[:, None], keys[None, :], scale, N, SHIFTED)
            larger = tl.maximum(largest, tl.max(logits, 1))
            p, shrink = tl.exp(logits - larger[:, None]), tl.exp(largest - larger)
            total = total * shrink + tl.sum(p, 1)
            result = result * shrink[:, None] + tl.dot(p.to(v.dtype), v, input_precision="ieee")
            largest = larger
        token = own >> 4
        real = (token >= 0)[:, None] & inside[None, :]
        tl.store(out + token[:, None] * C + column[None, :], (result / total[:, None]).to(q.dtype), mask=real)
        tl.store(lse + (window * heads + head) * N + queries, largest + tl.log(total), mask=queries < N)


@triton.jit
def _query_gradient_kernel(  # type: ignore[no-untyped-def]
    qkv, fill, windows, biases, out, lse, outer, of_qkv, count, heads, scale,
    N: tl.constexpr, SHIFTED: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    head, d = tl.program_id(2), tl.arange(0, WIDTH)
    queries = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    C, inside = heads * D, d < D
    column, biases = head * D + d, biases + head * (N * N)
    fill_q, fill_k, fill_v = _fills(fill, column, C, inside)
    zeros = tl.zeros((WIDTH,), tl.float32)
    for window in range(tl.program_id(0), count, tl.num_programs(0)):
        own = _entries(windows, window, queries, N)
        q = _rows(qkv, own, 3 * C, column, inside, fill_q)
        grad = _rows(outer, own, C, column, inside, zeros)
        delta = _delta(grad, _rows(out, own, C, column, inside, zeros))
        log_sum = _log_sums(lse, window, head, heads, queries, N)
        of_q = tl.zeros((BLOCK, WIDTH), tl.float32)
        for start in range(0, N, BLOCK):
            keys = start + tl.arange(0, BLOCK)
            entry = _entries(windows, window, keys, N)
            k = _rows(qkv, entry, 3 * C, C + column, inside, fill_k)
            v = _rows(qkv, entry, 3 * C, 2 * C + column, inside, fill_v)
            logits = _logits(q, k, own, entry, biases, queries[:, None], keys[None, :], scale, N, SHIFTED)
            p = tl.exp(logits - log_sum[:, None])
            of_logits = p * (tl.dot(grad, tl.trans(v), input_precision="ieee") - delta[:, None])
            of_q += tl.dot(of_logits.to(k.dtype), k, input_precision="ieee")
        token = own >> 4
        real = (token >= 0)[:, None] & inside[None, :]
        tl.store(of_qkv + token[:, None] * (3 * C) + column[None, :], (of_q * scale).to(q.dtype), mask=real)


@triton.jit
def _key_gradient_kernel(  # type: ignore[no-untyped-def]
    qkv, fill, windows, biases, out, lse, outer, of_qkv, of_fill, count, heads, scale,
    N: tl.constexpr, SHIFTED: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr, STEP: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    first, part, head, d = tl.program_id(0), tl.program_id(1), tl.program_id(2), tl.arange(0, WIDTH)
    keys = part * BLOCK + tl.arange(0, BLOCK)
    C, inside = heads * D, d < D
    column, biases = head * D + d, biases + head * (N * N)
    fill_q, fill_k, fill_v = _fills(fill, column, C, inside)
    zeros = tl.zeros((WIDTH,), tl.float32)
    fill_k_sum = tl.zeros((WIDTH,), tl.float32)
    fill_v_sum = tl.zeros((WIDTH,), tl.float32)
    for window in range(first, count, tl.num_programs(0)):
        own = _entries(windows, window, keys, N)
        k = _rows(qkv, own, 3 * C, C + column, inside, fill_k)
        v = _rows(qkv, own, 3 * C, 2 * C + column, inside, fill_v)
        of_k = tl.zeros((BLOCK, WIDTH), tl.float32)
        of_v = tl.zeros((BLOCK, WIDTH), tl.float32)
        for start in range(0, N, STEP):
            queries = start + tl.arange(0, STEP)
            entry = _entries(windows, window, queries, N)
            q = _rows(qkv, entry, 3 * C, column, inside, fill_q)
            grad = _rows(outer, entry, C, column, inside, zeros)
            delta = _delta(grad, _rows(out, entry, C, column, inside, zeros))
            log_sum = _log_sums(lse, window, head, heads, queries, N)
            logits = _logits(k, q, own, entry, biases, queries[None, :], keys[:, None], scale, N, SHIFTED)
            p = tl.exp(logits - log_sum[None, :])  # (keys, queries)
            of_v += tl.dot(p.to(v.dtype), grad, input_precision="ieee")
            of_logits = p * (tl.dot(v, tl.trans(grad), input_precision="ieee") - delta[None, :])
            of_k += tl.dot(of_logits.to(q.dtype), q, input_precision="ieee")
        of_k = of_k * scale
        token = own >> 4
        real = (token >= 0)[:, None] & inside[None, :]
        rows = of_qkv + token[:, None] * (3 * C) + column[None, :]
        tl.store(rows + C, of_k.to(v.dtype), mask=real)
        tl.store(rows + 2 * C, of_v.to(v.dtype), mask=real)
        padding = ((token < 0) & (keys < N))[:, None]
        fill_k_sum += tl.sum(tl.where(padding, of_k, 0.0), 0)
        fill_v_sum += tl.sum(tl.where(padding, of_v, 0.0), 0)
    row = of_fill + (first * tl.num_programs(1) + part) * (3 * C) + column
    tl.store(row, zeros, mask=inside)  # outputs of padding are dropped
    tl.store(row + C, fill_k_sum, mask=inside)
    tl.store(row + 2 * C, fill_v_sum, mask=inside)


@triton.jit
def _bias_gradient_kernel(  # type: ignore[no-untyped-def]
    qkv, fill, windows, biases, out, lse, outer, of_bias, count, heads, scale,
    N: tl.constexpr, SHIFTED: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    first, head, d = tl.program_id(0), tl.program_id(2), tl.arange(0, WIDTH)
    parts: tl.constexpr = (N + BLOCK - 1) // BLOCK
    queries = tl.program_id(1) // parts * BLOCK + tl.arange(0, BLOCK)
    keys = tl.program_id(1) % parts * BLOCK + tl.arange(0, BLOCK)
    C, inside = heads * D, d < D
    column, head_biases = head * D + d, biases + head * (N * N)
    fill_q, fill_k, fill_v = _fills(fill, column, C, inside)
    zeros = tl.zeros((WIDTH,), tl.float32)
    bias_sum = tl.zeros((BLOCK, BLOCK), tl.float32)
    for window in range(first, count, tl.num_programs(0)):
        own, entry = _entries(windows, window, queries, N), _entries(windows, window, keys, N)
        q = _rows(qkv, own, 3 * C, column, inside, fill_q)
        k = _rows(qkv, entry, 3 * C, C + column, inside, fill_k)
        v = _rows(qkv, entry, 3 * C, 2 * C + column, inside, fill_v)
        grad = _rows(outer, own, C, column, inside, zeros)
        delta = _delta(grad, _rows(out, own, C, column, inside, zeros))
        log_sum = _log_sums(lse, window, head, heads, queries, N)
        logits = _logits(q, k, own, entry, head_biases, queries[:, None], keys[None, :], scale, N, SHIFTED)
        p = tl.exp(logits - log_sum[:, None])
        bias_sum += p * (tl.dot(grad, tl.trans(v), input_precision="ieee") - delta[:, None])
    pairs = queries[:, None] * N + keys[None, :]
    inside_pairs = (queries[:, None] < N) & (keys[None, :] < N)
    tl.store(of_bias + (first * heads + head) * (N * N) + pairs, bias_sum, mask=inside_pairs)


@triton.jit
def _table_gradient_kernel(of_bias, of_table, programs, heads, WINDOW: tl.constexpr, TILE: tl.constexpr):  # type: ignore[no-untyped-def]
    """Add up the gradients of an entry's pairs of all programs, for one head."""
    entry, head = tl.program_id(0), tl.program_id(1)
    span: tl.constexpr = 2 * WINDOW - 1
    N: tl.constexpr = WINDOW * WINDOW
    query = tl.arange(0, TILE)
    row = query // WINDOW - entry // span + WINDOW - 1  # of the key
    column = query % WINDOW - entry % span + WINDOW - 1
    inside = (query < N) & (row >= 0) & (row < WINDOW) & (column >= 0) & (column < WINDOW)
    pairs = head * (N * N) + query * N + row * WINDOW + column
    total = tl.zeros((TILE,), tl.float32)
    for _ in range(programs):
        total += tl.load(of_bias + pairs, mask=inside, other=0.0)
        pairs += heads * (N * N)
    tl.store(of_table + entry * heads + head, tl.sum(total, 0))


def supports(tokens: int, width: int, heads: int, window: int) -> bool:
    """Return whether the kernels support ``tokens`` of this width with windows of this side: offsets have 32 bits."""
    return window <= MAX_WINDOW and width // heads <= MAX_HEAD_WIDTH and 3 * tokens * width < 2**31


def attend_in_windows(
    qkv: Tensor, fill: Tensor | None, windows: Tensor, table: Tensor, window: int, shifted: bool, scale: float
) -> Tensor:
    """Compute ``softmax(scale q k^T + bias + mask) v`` for each window and head.

    The arguments are those of :func:`esvit_core.kernels.window_attention_triton.attend_in_windows`.

    Returns:
        (T, C), in the dtype of ``qkv``.
    """
    fill = torch.zeros(qkv.shape[1], device=qkv.device) if fill is None else fill
    out: Tensor = _LargeWindowAttention.apply(qkv.contiguous(), fill, windows, table, window, shifted, scale)
    return out


class _LargeWindowAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, qkv: Tensor, fill: Tensor, windows: Tensor, table: Tensor, window: int, shifted: bool, scale: float
    ) -> Tensor:
        (count, N), heads = windows.shape, table.shape[1]
        out = qkv.new_empty(len(qkv), qkv.shape[1] // 3)
        lse = torch.empty(count, heads, N, device=qkv.device)
        biases = table.T.index_select(1, outside_modes(_bias_entries, window, qkv.device))  # (heads, N * N)
        width = max(16, triton.next_power_of_2(qkv.shape[1] // (3 * heads)))
        sizes = {"N": N, "D": qkv.shape[1] // (3 * heads), "BLOCK": _BLOCK, "WIDTH": width}
        ctx.constants = {**sizes, "SHIFTED": shifted}
        ctx.window, ctx.scale = window, scale
        grid = _grid(count, heads, -(-N // _BLOCK))
        arguments = (qkv, fill, windows, biases, out, lse, count, heads, scale)
        launch(_attend_kernel, grid, *arguments, **ctx.constants, **_OPTIONS)
        ctx.save_for_backward(qkv, fill, windows, biases, out, lse)
        return out

    @staticmethod
    def backward(ctx: Any, outer: Tensor) -> tuple[Tensor | None, ...]:
        saved, outer = ctx.saved_tensors, outer.contiguous()
        qkv, fill, windows, biases, *_ = saved
        (count, N), heads = windows.shape, len(biases)
        blocks, sizes = -(-N // _BLOCK), (count, heads, ctx.scale)
        grid = _grid(count, heads, blocks)
        of_qkv = torch.empty_like(qkv)
        of_fill = torch.empty(grid[0] * blocks, len(fill), device=qkv.device)
        launch(_query_gradient_kernel, grid, *saved, outer, of_qkv, *sizes, **ctx.constants, **_OPTIONS)
        launch(
            _key_gradient_kernel, grid, *saved, outer, of_qkv, of_fill, *sizes, **ctx.constants, STEP=_STEP, **_OPTIONS
        )
        of_table = None
        if ctx.needs_input_grad[3]:
            grid = _grid(count, heads, blocks**2)
            of_bias = torch.empty(grid[0], heads, N * N, device=qkv.device)
            launch(_bias_gradient_kernel, grid, *saved, outer, of_bias, *sizes, **ctx.constants, **_OPTIONS)
            of_table = torch.empty((2 * ctx.window - 1) ** 2, heads, device=qkv.device)
            tile = triton.next_power_of_2(N)
            launch(
                _table_gradient_kernel, of_table.shape, of_bias, of_table, grid[0], heads, WINDOW=ctx.window, TILE=tile
            )
        return of_qkv, of_fill.sum(0) if ctx.needs_input_grad[1] else None, None, of_table, None, None, None


def _grid(windows: int, heads: int, parts: int) -> tuple[int, int, int]:
    """Return programs, parts and heads; the programs decide the order of sums, so they depend on no device."""
    return min(windows, max(1, _PROGRAMS // (heads * parts))), parts, heads


@functools.lru_cache(maxsize=16)
def _bias_entries(window: int, device: torch.device) -> Tensor:
    """Return the entry of the bias table for each pair, (N * N,)."""
    row, column = np.divmod(np.arange(window**2), window)
    rows = row[:, None] - row + window - 1
    entries = rows * (2 * window - 1) + column[:, None] - column + window - 1
    with torch.inference_mode(False):
        return torch.from_numpy(entries.ravel()).to(device)
