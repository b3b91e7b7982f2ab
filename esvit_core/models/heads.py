"""Projection head: map backbone features to prototype logits (EsViT, section 3; Caron et al., 2021)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from timm.layers import trunc_normal_
from torch import Tensor, nn

from esvit_core.models.lazy_logits import LazyLogits, Logits, chunk_rows
from esvit_core.torch_private import weight_norm


class Prototypes(nn.Module):
    """Linear layer without bias whose weight rows are ``weight_g * weight_v / |weight_v|``.

    Attributes:
        lazy: return :class:`~esvit_core.models.lazy_logits.LazyLogits` instead of a tensor.
    """

    lazy = False

    def __init__(self, in_dim: int, out_dim: int, norm_last_layer: bool = False) -> None:
        super().__init__()
        # Same names and initial values as the published layer, torch's weight_norm around a Linear.
        self.weight_g = nn.Parameter(torch.ones(out_dim, 1), requires_grad=not norm_last_layer)
        self.weight_v = nn.Parameter(nn.Linear(in_dim, out_dim, bias=False).weight.detach().clone())

    def weight(self) -> Tensor:
        """Return the prototypes, (K, in_dim)."""
        return weight_norm(self.weight_v, self.weight_g)

    def forward(self, x: Tensor) -> Logits:
        """Map embeddings (rows, in_dim) to logits (rows, K)."""
        if not self.lazy:
            return F.linear(x, self.weight())
        device = x.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
        # With a gradient the weight keeps its dtype, because the gradients of many rows are summed in it.
        needs_grad = torch.is_grad_enabled() and self.weight_v.requires_grad
        return LazyLogits(x.to(dtype), self.weight() if needs_grad else self._cast_weight(dtype))

    @torch.no_grad()
    def _cast_weight(self, dtype: torch.dtype) -> Tensor:
        """Return the prototypes in ``dtype`` without a float32 copy of all of them."""
        out = torch.empty_like(self.weight_v, dtype=dtype)
        step = chunk_rows(out)
        for part, v, g in zip(*(t.split(step) for t in (out, self.weight_v, self.weight_g)), strict=True):
            part.copy_(weight_norm(v, g))
        return out


class ProjectionHead(nn.Module):
    """Three-layer MLP, L2 normalization, and the prototypes.

    Args:
        in_dim: width of the features.
        out_dim: number of prototypes K.
        hidden_dim: width of the two hidden layers.
        bottleneck_dim: width of the normalized features.
        norm_last_layer: fix the norms of the prototypes at one.
        batch_norm: add a batch norm after each hidden layer.
    """

    def __init__(
        self,
        in_dim: int,
        out_dim: int,
        hidden_dim: int = 2048,
        bottleneck_dim: int = 256,
        norm_last_layer: bool = False,
        batch_norm: bool = False,
    ) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for width in (in_dim, hidden_dim):
            layers.append(nn.Linear(width, hidden_dim))
            if batch_norm:
                layers.append(nn.BatchNorm1d(hidden_dim))
            layers.append(nn.GELU())
        self.mlp = nn.Sequential(*layers, nn.Linear(hidden_dim, bottleneck_dim))
        self.last_layer = Prototypes(bottleneck_dim, out_dim, norm_last_layer)
        for module in self.mlp:
            if isinstance(module, nn.Linear):
                trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)

    def forward(self, x: Tensor) -> Logits:
        """Map features (rows, in_dim) to logits (rows, K)."""
        return self.last_layer(F.normalize(self.mlp(x), dim=-1))
