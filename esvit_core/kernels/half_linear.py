"""Linear layers on a GPU that compute with half-precision copies of their weights, made once per step.

Autocast would convert every weight and bias in every pass, in a kernel each, round each gradient of a weight to half
precision, and convert it back. Here one kernel converts all weights, and the gradient of a weight leaves the product in
float32.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from esvit_core.kernels.replace_linear import replace_linear_layers_
from esvit_core.torch_private import convert_


class HalfLinear(nn.Linear):
    """``nn.Linear`` with copies of weight and bias; :class:`HalfWeights` makes them and keeps them up to date."""

    half_weight: Tensor
    half_bias: Tensor | None

    def forward(self, x: Tensor) -> Tensor:
        """Map x (..., D) to (..., K) in half precision."""
        return half_linear(x, self.weight, self.bias, self.half_weight, self.half_bias)


class PointwiseConv(nn.Conv2d):
    """1 x 1 convolution on maps (B, H, W, C), computed as a linear layer.

    Attributes:
        linear: function that computes it; :mod:`esvit_core.kernels.choose` sets it.
        half_weight: copy of the weight, (K, D), as in :class:`HalfLinear`; None: ``linear`` computes.
        half_bias: copy of the bias.
    """

    linear: Callable[..., Tensor] = staticmethod(F.linear)
    half_weight: Tensor | None = None
    half_bias: Tensor | None = None

    def __init__(self, in_dim: int, out_dim: int, bias: bool = True) -> None:
        super().__init__(in_dim, out_dim, 1, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight.flatten(1)
        if self.half_weight is None:
            return self.linear(x, weight, self.bias)
        return half_linear(x, weight, self.bias, self.half_weight, self.half_bias)


class HalfWeights:
    """Replaces the linear layers of networks by :class:`HalfLinear`, in place, and updates their copies.

    Args:
        networks: on their device; parameters and their names do not change. Their :class:`PointwiseConv` get copies, too.
        dtype: of the copies, such as bfloat16.
    """

    def __init__(self, networks: Iterable[nn.Module], dtype: torch.dtype) -> None:
        self._weights: list[Tensor] = []
        self._copies: list[Tensor] = []
        for network in networks:
            for layer in replace_linear_layers_(network, HalfLinear):
                layer.half_weight = self._copy(layer.weight, dtype)
                layer.half_bias = None if layer.bias is None else self._copy(layer.bias, dtype)
            for module in network.modules():
                if isinstance(module, PointwiseConv):
                    module.half_weight = self._copy(module.weight.flatten(1), dtype)
                    module.half_bias = None if module.bias is None else self._copy(module.bias, dtype)

    def _copy(self, weight: Tensor, dtype: torch.dtype) -> Tensor:
        copy = torch.empty_like(weight, dtype=dtype, requires_grad=False)
        self._weights.append(weight.detach())
        self._copies.append(copy)
        return copy

    @property
    def bytes(self) -> int:
        """Size of the copies."""
        return sum(copy.nbytes for copy in self._copies)

    @torch.no_grad()
    def update_(self) -> None:
        """Convert the current weights."""
        convert_(self._copies, self._weights)


def half_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, half_weight: Tensor, half_bias: Tensor | None
) -> Tensor:
    """Compute ``x @ weight.T + bias`` with the copies; the gradients go to ``weight`` and ``bias``.

    Args:
        x: (..., D).
        weight, half_weight: (K, D).
        bias, half_bias: (K,).

    Returns:
        (..., K) in the dtype of the copies.
    """
    rows = x.to(half_weight.dtype).flatten(
        0, -2
    )  # with more dimensions, torch multiplies image by image where x has gaps
    out: Tensor = _HalfLinear.apply(rows, weight, bias, half_weight, half_bias)
    return out.unflatten(0, x.shape[:-1])


class _HalfLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, half_weight: Tensor, half_bias: Tensor | None
    ) -> Tensor:
        ctx.save_for_backward(x, half_weight)
        ctx.dtype = weight.dtype
        return F.linear(x, half_weight, half_bias)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, half_weight = ctx.saved_tensors
        of_x = gradient @ half_weight if ctx.needs_input_grad[0] else None
        of_weight = product(gradient.T, x, ctx.dtype) if ctx.needs_input_grad[1] else None
        of_bias = gradient.sum(0, dtype=ctx.dtype) if ctx.needs_input_grad[2] else None
        return of_x, of_weight, of_bias, None, None


def product(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """Compute ``a @ b`` in ``dtype``, which on a GPU may be wider than that of the factors (N, M) and (M, K)."""
    if a.dtype == dtype:
        return a @ b
    if a.is_cuda:
        return torch.mm(a, b, out_dtype=dtype)
    return a.to(dtype) @ b.to(dtype)
