"""Attention in the fastest implementation for the device.

torch's fused kernels target GPUs. On a CPU they match the plain formula only in float32 without a bias: in bfloat16
they take three to seven times as long, mostly in the backward pass, and with a learned bias torch falls back to a
float32 implementation. ``benchmarks/attention.py`` measures this.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float) -> Tensor:
    """``softmax(scale q k^T + bias) v``.

    Args:
        q: (..., N, d).
        k: (..., M, d).
        v: (..., M, d).
        bias: broadcastable to (..., N, M), in the dtype of ``q``; None: no bias.
        scale: factor of the products.

    Returns:
        (..., N, d).
    """
    if q.device.type != "cpu" or (bias is None and q.dtype != torch.bfloat16):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=scale)
    return attend_plainly(q, k, v, bias, scale)


def attend_plainly(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float) -> Tensor:
    """Compute the plain formula on every device; arguments as in :func:`attend`."""
    logits = q * scale @ k.mT
    if bias is not None:
        logits.add_(bias)
    return logits.softmax(-1) @ v
