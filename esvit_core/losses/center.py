"""The center of the teacher's logits: a moving average over the global batch (DINO, equation 4)."""

from __future__ import annotations

from fractions import Fraction

import torch
import torch.distributed as dist
from torch import Tensor, nn

from esvit_core.collectives import collective
from esvit_core.models.lazy_logits import LazyLogits


class Center(nn.Module):
    """Moving average of the teacher's mean logits; its state is the buffer ``value``, (1, K)."""

    value: Tensor

    def __init__(self, out_dim: int, momentum: float = 0.9, share: Fraction | None = None) -> None:
        """
        Args:
            out_dim: K.
            momentum: of the average.
            share: of the global batch's rows those that this process brings; None: every process the same.
        """
        super().__init__()
        self.momentum = momentum
        self.share = share
        self.register_buffer("value", torch.zeros(1, out_dim))
        self._noted: tuple[Tensor, int] | None = None

    @torch.no_grad()
    def update(self, teacher_logits: Tensor | LazyLogits, last: bool = True) -> None:
        """Take in the logits of this process.

        Args:
            teacher_logits: (rows, K).
            last: these complete the batch; False: they are added to those of the next call, and the center stays.
        """
        if isinstance(teacher_logits, LazyLogits):
            total = teacher_logits.sum(self.value.dtype)
        else:
            total = teacher_logits.sum(0, keepdim=True, dtype=self.value.dtype)
        rows = len(teacher_logits)
        if self._noted is not None:
            total, rows = total.add_(self._noted[0]), rows + self._noted[1]
        self._noted = None if last else (total, rows)
        if not last:
            return
        share = self.share
        if dist.is_available() and dist.is_initialized():
            with collective():
                dist.all_reduce(total)
            share = share or Fraction(1, dist.get_world_size())
        rows = int(rows / share) if share else rows
        self.value.mul_(self.momentum).add_(total, alpha=(1 - self.momentum) / rows)
