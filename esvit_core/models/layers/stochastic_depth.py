"""Stochastic depth: a residual branch is left out for random images while training (Huang et al., 2016)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from timm.layers import DropPath
from torch import Tensor


class StochasticDepth(DropPath):
    """``x + mask * branch(x) / (1 - drop_prob)``, one mask an image, drawn as timm draws it.

    Attributes:
        sparing: whether to compute the branch only for the images that keep it: set by
            :mod:`esvit_core.kernels.choose` on a processor. A GPU would have to wait for their number.
    """

    sparing = False

    def forward(self, x: Tensor, branch: Callable[[Tensor], Tensor]) -> Tensor:  # type: ignore[override]
        """The sum, in the dtype of ``x``.

        Args:
            x: (B, ...).
            branch: computes each image by itself, whatever others there are.
        """
        if not self.training or self.drop_prob == 0:
            return x + branch(x)
        if not self.sparing:
            return x + super().forward(branch(x))
        keep = 1 - self.drop_prob
        kept = x.new_empty(len(x)).bernoulli_(keep).nonzero()[:, 0]
        if len(kept) == len(x):
            return torch.add(x, branch(x), alpha=1 / keep)
        if len(kept) == 0:  # the branch's parameters have a gradient nevertheless, of zeros
            return x.index_add(0, torch.tensor([0]), branch(x[:1]).to(x.dtype), alpha=0)
        return x.index_add(0, kept, branch(x.index_select(0, kept)).to(x.dtype), alpha=1 / keep)
