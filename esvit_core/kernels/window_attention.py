"""Window attention in C (``esvit_core/kernels/windows.h``): the windows are never laid out, the weights never kept."""

from __future__ import annotations

import itertools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from esvit_core.kernels import Windows, call, library

HEADS = (32, 64)  # widths of a head
FEWEST, MOST = 33, 64  # places of a window; with fewer, torch is as fast


def fits(qkv: Tensor, heads: int, places: int) -> bool:
    """Whether the compiled form computes with these.

    Args:
        qkv: (B, L, 3C).
        heads: their number.
        places: of a window.
    """
    return (
        type(qkv) is Tensor
        and qkv.device.type == "cpu"
        and qkv.dtype in (torch.float32, torch.bfloat16)
        and qkv.shape[2] in [3 * heads * width for width in HEADS]
        and FEWEST <= places <= MOST
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
    """``softmax(scale q k^T + bias + mask) v`` of each window and head.

    Args:
        qkv: queries, keys and values of the tokens, (B, L, 3C), float32 or bfloat16.
        heads: their number.
        fill: those of a place of padding, (3C,); None: zeros.
        index: token at each place of the windows, -1 where there is padding, (windows, N). Each token has one place.
        bias: (heads, N, N); None: there is none.
        mask: (windows, N, N), without a gradient; None: there is none.
        scale: of the products.

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
        bias, mask = (None if matrices is None else _widened(matrices) for matrices in (bias, mask))
        B, L, C3 = qkv.shape
        out = qkv.new_empty(B, L, C3 // 3)
        sums = torch.empty(B, len(index), heads, index.shape[1])
        ctx.save_for_backward(qkv, fill, index, bias, mask, sums)
        ctx.scale = scale
        given = _describe(qkv, heads, fill, index, bias, mask, scale)
        name = f"attend_{C3 // (3 * heads)}"
        call(name, [(given, first, last, out, sums) for first, last in _shares(B * len(index))])
        return out

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        qkv, fill, index, bias, mask, sums = ctx.saved_tensors
        gradient = gradient.to(qkv.dtype).contiguous()
        _, _, heads, N = sums.shape
        shares = _shares(len(qkv) * len(index))
        of_qkv = torch.empty_like(qkv)
        of_fill = torch.zeros(len(shares), len(fill))
        of_bias = None if bias is None else torch.zeros(len(shares), heads, N, MOST)
        given = _describe(qkv, heads, fill, index, bias, mask, ctx.scale)
        parts = zip(shares, of_fill, [None] * len(shares) if of_bias is None else of_bias, strict=True)
        name = f"attend_backward_{qkv.shape[2] // (3 * heads)}"
        call(name, [(given, *share, gradient, sums, of_qkv, *added) for share, *added in parts])
        return (
            of_qkv,
            None,
            of_fill.sum(0) if ctx.needs_input_grad[2] else None,
            None,
            None if of_bias is None else of_bias.sum(0)[..., :N],
            None,
            None,
        )


def _widened(matrices: Tensor) -> Tensor:
    """(..., N, N) to (..., N, MOST)."""
    return F.pad(matrices.float(), (0, MOST - matrices.shape[-1])).contiguous()


def _describe(
    qkv: Tensor, heads: int, fill: Tensor, index: Tensor, bias: Tensor | None, mask: Tensor | None, scale: float
) -> Windows:
    pointers = (None if tensor is None else tensor.data_ptr() for tensor in (fill, index, bias, mask))
    return Windows(
        qkv.data_ptr(), qkv.dtype == torch.bfloat16, *pointers, scale, qkv.shape[1], len(index), heads, index.shape[1]
    )


def _shares(windows: int) -> list[tuple[int, int]]:
    """First and last window of each thread: as many shares as threads, for sums that are always the same."""
    threads = min(torch.get_num_threads(), windows)
    ends = [windows * i // threads for i in range(threads + 1)]
    return list(itertools.pairwise(ends))
