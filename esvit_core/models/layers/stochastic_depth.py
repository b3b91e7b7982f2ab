"""Stochastic depth: training drops residual branches for random images (Huang et al., 2016)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from timm.layers import DropPath
from torch import Tensor


class StochasticDepth(DropPath):
    """Compute ``x + mask * branch(x) / (1 - drop_prob)`` with one mask value per image, drawn as timm draws it.

    Attributes:
        skip_dropped: compute the branch only for the images that keep it. :mod:`esvit_core.kernels.choose` sets it on
            a CPU; a GPU would have to synchronize to learn their number.
    """

    skip_dropped = False

    def forward(self, x: Tensor, branch: Callable[[Tensor], Tensor]) -> Tensor:  # type: ignore[override]
        """Return the sum in the dtype of ``x``.

        Args:
            x: (B, ...).
            branch: residual branch; it must treat each image independently of the others.
        """
        if not self.training or self.drop_prob == 0:
            return x + branch(x)
        if not self.skip_dropped:
            return x + super().forward(branch(x))
        keep = 1 - self.drop_prob
        kept = x.new_empty(len(x)).bernoulli_(keep).nonzero()[:, 0]
        if len(kept) == len(x):
            return torch.add(x, branch(x), alpha=1 / keep)
        if len(kept) == 0:  # the parameters of the branch still need a gradient, of zeros
            return x.index_add(0, torch.tensor([0]), branch(x[:1]).to(x.dtype), alpha=0)
        return x.index_add(0, kept, branch(x.index_select(0, kept)).to(x.dtype), alpha=1 / keep)
