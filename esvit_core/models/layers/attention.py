"""Attention in the form that is fastest where it runs.

torch's fused kernels are for GPUs; on a processor they keep up with the plain formula in float32 without a bias only.
In bfloat16 they take three to seven times as long, most of it in the backward pass, and a bias that is learned makes
torch leave them for a form in float32. ``benchmarks/attention.py`` measures it.
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
        bias: in the dtype of ``q``, for every (..., N, M) or to be repeated; None: there is none.
        scale: of the products.

    Returns:
        (..., N, d).
    """
    if q.device.type != "cpu" or (bias is None and q.dtype != torch.bfloat16):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=scale)
    return attend_plainly(q, k, v, bias, scale)


def attend_plainly(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float) -> Tensor:
    """The plain formula, whatever is faster; arguments as of :func:`attend`."""
    logits = q * scale @ k.mT
    if bias is not None:
        logits.add_(bias)
    return logits.softmax(-1) @ v
