"""Window attention in C (``window_attention.h``): windows are not copied, and attention weights are not saved."""

from __future__ import annotations

import itertools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from esvit_core.kernels import WindowAttentionArgs, call, library

HEAD_WIDTHS = (32, 64)
MIN_TOKENS, MAX_TOKENS = 33, 64  # per window; with fewer tokens torch is as fast


def supports(qkv: Tensor, heads: int, window_tokens: int) -> bool:
    """Return whether the C kernel supports these arguments.

    Args:
        qkv: (B, L, 3C).
        heads: number of heads.
        window_tokens: positions N per window, padding included.
    """
    return (
        type(qkv) is Tensor
        and qkv.device.type == "cpu"
        and qkv.dtype in (torch.float32, torch.bfloat16)
        and qkv.shape[2] in [3 * heads * width for width in HEAD_WIDTHS]
        and MIN_TOKENS <= window_tokens <= MAX_TOKENS
        and not torch.compiler.is_compiling()
        and not torch.jit.is_tracing()
        and library() is not None
    )


def attend_in_windows(
    qkv: Tensor,
    heads: int,
    fill: Tensor | None,
    index: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    scale: float,
) -> Tensor:
    """Compute ``softmax(scale q k^T + bias + mask) v`` for each window and head.

    Args:
        qkv: queries, keys and values of the tokens, (B, L, 3C), float32 or bfloat16.
        heads: number of heads.
        fill: query, key and value of padding, (3C,); None: zeros.
        index: token at each position of the windows, -1 for padding, (windows, N). Each token has one position.
        bias: (heads, N, N); None: no bias.
        mask: (windows, N, N), without gradient; None: no mask.
        scale: factor of the products.

    Returns:
        (B, L, C), in the dtype of ``qkv``.
    """
    out: Tensor = _Attention.apply(qkv, heads, fill, index, bias, mask, scale)
    return out


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        qkv: Tensor,
        heads: int,
        fill: Tensor | None,
        index: Tensor,
        bias: Tensor | None,
        mask: Tensor | None,
        scale: float,
    ) -> Tensor:
        qkv, fill = qkv.contiguous(), qkv.new_zeros(qkv.shape[2]) if fill is None else fill
        fill = fill.float().contiguous()
        bias, mask = (None if matrices is None else _pad_to_max(matrices) for matrices in (bias, mask))
        B, L, C3 = qkv.shape
        out = qkv.new_empty(B, L, C3 // 3)
        sums = torch.empty(B, len(index), heads, index.shape[1])
        ctx.save_for_backward(qkv, fill, index, bias, mask, sums)
        ctx.scale = scale
        args = _kernel_args(qkv, heads, fill, index, bias, mask, scale)
        name = f"attend_{C3 // (3 * heads)}"
        call(name, [(args, first, last, out, sums) for first, last in _shares(B * len(index))])
        return out

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        qkv, fill, index, bias, mask, sums = ctx.saved_tensors
        gradient = gradient.to(qkv.dtype).contiguous()
        _, _, heads, N = sums.shape
        shares = _shares(len(qkv) * len(index))
        of_qkv = torch.empty_like(qkv)
        of_fill = torch.zeros(len(shares), len(fill))
        of_bias = None if bias is None else torch.zeros(len(shares), heads, N, MAX_TOKENS)
        args = _kernel_args(qkv, heads, fill, index, bias, mask, ctx.scale)
        parts = zip(shares, of_fill, [None] * len(shares) if of_bias is None else of_bias, strict=True)
        name = f"attend_backward_{qkv.shape[2] // (3 * heads)}"
        call(name, [(args, *share, gradient, sums, of_qkv, *added) for share, *added in parts])
        return (
            of_qkv,
            None,
            of_fill.sum(0) if ctx.needs_input_grad[2] else None,
            None,
            None if of_bias is None else of_bias.sum(0)[..., :N],
            None,
            None,
        )


def _pad_to_max(matrices: Tensor) -> Tensor:
    """Pad (..., N, N) to (..., N, MAX_TOKENS)."""
    return F.pad(matrices.float(), (0, MAX_TOKENS - matrices.shape[-1])).contiguous()


def _kernel_args(
    qkv: Tensor, heads: int, fill: Tensor, index: Tensor, bias: Tensor | None, mask: Tensor | None, scale: float
) -> WindowAttentionArgs:
    pointers = (None if tensor is None else tensor.data_ptr() for tensor in (fill, index, bias, mask))
    return WindowAttentionArgs(
        qkv.data_ptr(), qkv.dtype == torch.bfloat16, *pointers, scale, qkv.shape[1], len(index), heads, index.shape[1]
    )


def _shares(windows: int) -> list[tuple[int, int]]:
    """Return first and last window of each thread; one share per thread makes the sums reproducible."""
    threads = min(torch.get_num_threads(), windows)
    ends = [windows * i // threads for i in range(threads + 1)]
    return list(itertools.pairwise(ends))
