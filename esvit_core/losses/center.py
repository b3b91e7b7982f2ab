"""Center of the teacher's logits: a moving average over the global batch (DINO, equation 4)."""

from __future__ import annotations

from fractions import Fraction

import torch
import torch.distributed as dist
from torch import Tensor, nn

from esvit_core.collectives import collective
from esvit_core.models.lazy_logits import Logits


class Center(nn.Module):
    """Moving average of the teacher's mean logits; its state is the buffer ``value``, (1, K)."""

    value: Tensor

    def __init__(self, out_dim: int, momentum: float = 0.9, share: Fraction | None = None) -> None:
        """
        Args:
            out_dim: number of prototypes K.
            momentum: momentum of the average.
            share: fraction of the global batch that this process provides; None: all processes provide the same.
        """
        super().__init__()
        self.momentum = momentum
        self.share = share
        self.register_buffer("value", torch.zeros(1, out_dim))
        self._pending: tuple[Tensor, int] | None = None
        self._reducing: tuple[dist.Work, Tensor, int] | None = None

    @torch.no_grad()
    def update(self, teacher_logits: Logits, last: bool = True) -> None:
        """Update the center with the logits of this process; with several processes :meth:`finish` completes it.

        Args:
            teacher_logits: (rows, K).
            last: these logits complete the batch; False: they count with the next call, and the center does not change.
        """
        total = teacher_logits.sum(0, keepdim=True, dtype=self.value.dtype)
        rows = len(teacher_logits)
        if self._pending is not None:
            total, rows = total.add_(self._pending[0]), rows + self._pending[1]
        self._pending = None if last else (total, rows)
        if not last:
            return
        share = self.share
        distributed = dist.is_available() and dist.is_initialized()
        if distributed:
            share = share or Fraction(1, dist.get_world_size())
        rows = int(rows / share) if share else rows
        if not distributed:
            self._add(total, rows)
            return
        with collective():  # the backward pass runs meanwhile
            work = dist.all_reduce(total, async_op=True)
        assert work is not None
        self._reducing = work, total, rows

    @torch.no_grad()
    def finish(self) -> None:
        """Complete an update: wait for the sum over all processes and add it."""
        if self._reducing is None:
            return
        (work, total, rows), self._reducing = self._reducing, None
        with collective():
            work.wait()
        self._add(total, rows)

    def _add(self, total: Tensor, rows: int) -> None:
        self.value.mul_(self.momentum).add_(total, alpha=(1 - self.momentum) / rows)
