"""The second half of an MLP on a GPU, ``linear(gelu(h))``, which keeps ``h`` only.

The backward pass computes ``gelu(h)`` again, in the kernel that computes the gradient of ``h``.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from esvit_core.kernels.half_linear import HalfLinear, product
from esvit_core.kernels.triton_support import launch

_BLOCK = 1024


@triton.jit
def _gelu_backward_kernel(h, outer, of_h, activation, count, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    x = tl.load(h + at, mask=inside, other=0.0).to(tl.float32)
    share = 0.5 + 0.5 * tl.erf(x * 0.7071067811865476)  # the normal distribution function
    density = 0.3989422804014327 * tl.exp(-0.5 * x * x)
    gradient = tl.load(outer + at, mask=inside, other=0.0).to(tl.float32) * (share + x * density)
    tl.store(activation + at, (x * share).to(activation.dtype.element_ty), mask=inside)
    tl.store(of_h + at, gradient.to(of_h.dtype.element_ty), mask=inside)


def gelu_linear(h: Tensor, layer: HalfLinear) -> Tensor:
    """Compute ``layer(gelu(h))``; h (T, D)."""
    out: Tensor = _GeluLinear.apply(h, layer.weight, layer.bias, layer.half_weight, layer.half_bias)
    return out


class _GeluLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, h: Tensor, weight: Tensor, bias: Tensor | None, half_weight: Tensor, half_bias: Tensor | None
    ) -> Tensor:
        ctx.save_for_backward(h, half_weight)
        ctx.dtype = weight.dtype
        return F.linear(F.gelu(h), half_weight, half_bias)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        h, half_weight = ctx.saved_tensors
        of_h = gradient @ half_weight  # first the gradient of the activation, which the kernel replaces
        activation = torch.empty_like(h)
        grid = (triton.cdiv(h.numel(), _BLOCK),)
        launch(_gelu_backward_kernel, grid, h, of_h, of_h, activation, h.numel(), BLOCK=_BLOCK)
        of_weight = product(gradient.T, activation, ctx.dtype)
        of_bias = gradient.sum(0, dtype=ctx.dtype) if ctx.needs_input_grad[2] else None
        return of_h, of_weight, of_bias, None, None
