"""Float32 linear layers on a CPU: oneDNN's matrix product where it is faster than BLAS.

torch computes float32 products with the BLAS it was built with, MKL in the wheels for x86. On an AMD CPU oneDNN is 1.1
to 1.7 times as fast, except for the gradient of the weight, a product over the rows. ``benchmarks/linear.py`` measures
this.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from esvit_core.torch_private import has_onednn_linear, onednn_linear


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Compute ``x @ weight.T + bias``.

    Args:
        x: (..., D).
        weight: (K, D), in any memory layout.
        bias: (K,).

    Returns:
        (..., K).
    """
    if not _is_onednn_faster(x, weight):
        return F.linear(x, weight, bias)
    out: Tensor = _Linear.apply(x, weight, bias)
    return out


def _is_onednn_faster(*tensors: Tensor) -> bool:
    """Return whether oneDNN should multiply these tensors instead of torch's default."""
    return (
        _AVAILABLE
        and all(tensor.device.type == "cpu" and tensor.dtype == torch.float32 for tensor in tensors)
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_compiling()
        and not torch.jit.is_tracing()
    )


_AVAILABLE = torch.backends.mkldnn.is_available() and torch.backends.mkl.is_available() and has_onednn_linear()


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return onednn_linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        rows = gradient.flatten(0, -2)
        of_x = onednn_linear(gradient, weight.T, None) if ctx.needs_input_grad[0] else None
        of_weight = rows.T @ x.flatten(0, -2) if ctx.needs_input_grad[1] else None
        return of_x, of_weight, rows.sum(0) if ctx.needs_input_grad[2] else None


class Linear(nn.Linear):
    """``nn.Linear`` with the faster matrix product."""

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)
