"""Stochastic depth whose random numbers are drawn before a pass, for all branches of a network at once."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from timm.layers import DropPath
from torch import Tensor, nn

_ALIGNMENT = 16  # numbers; compiled kernels want rows that start at multiples of 16 bytes


class DrawnDepth(nn.Module):
    """:class:`~esvit_core.models.layers.stochastic_depth.StochasticDepth` or timm's ``DropPath`` with given factors.

    Args:
        drop_prob: probability that an image loses the branch.

    Attributes:
        factors: of the images of the next pass, 0 or ``1 / (1 - drop_prob)``, (B,); set by :func:`draw_factors_`.
    """

    factors: Tensor

    def __init__(self, drop_prob: float) -> None:
        super().__init__()
        self.drop_prob = drop_prob

    def forward(self, x: Tensor, branch: Callable[[Tensor], Tensor] | None = None) -> Tensor:
        """Return ``factors * x``, or with a branch ``x + factors * branch(x)``; x (B, ...)."""
        y = x if branch is None else branch(x)
        if self.training:
            y = y * self.factors.to(y.dtype).view(-1, *[1] * (y.ndim - 1))
        return y if branch is None else x + y


def replace_stochastic_depth_(network: nn.Module) -> list[DrawnDepth]:
    """Replace every module of stochastic depth that drops anything; return the new ones."""
    replaced = []
    for parent in list(network.modules()):
        for name, child in parent.named_children():
            if isinstance(child, DropPath) and child.drop_prob:
                depth = DrawnDepth(float(child.drop_prob)).train(child.training)
                setattr(parent, name, depth)
                replaced.append(depth)
    return replaced


class FactorDraw:
    """Draws the factors of a network's modules, in three kernels.

    Args:
        depths: of one network.
        device: of the network.
    """

    def __init__(self, depths: Sequence[DrawnDepth], device: torch.device) -> None:
        self._depths = depths
        self._keep = torch.tensor([[1 - depth.drop_prob] for depth in depths], device=device)

    @torch.no_grad()
    def draw_(self, images: int) -> None:
        """Draw the factors of the next pass, over ``images`` images, with the device's default generator."""
        if self._depths:
            padded = -(-images // _ALIGNMENT) * _ALIGNMENT
            uniform = torch.rand(len(self._depths), padded, device=self._keep.device)
            for depth, row in zip(self._depths, (uniform < self._keep) / self._keep, strict=True):
                depth.factors = row[:images]
