"""The centre of the teacher's logits: a moving average over the global batch (DINO, equation 4)."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn


class Centre(nn.Module):
    """Moving average of the teacher's mean logits; its state is the buffer ``value``, (1, K)."""

    value: Tensor

    def __init__(self, out_dim: int, momentum: float = 0.9) -> None:
        super().__init__()
        self.momentum = momentum
        self.register_buffer("value", torch.zeros(1, out_dim))

    @torch.no_grad()
    def update(self, teacher_logits: Tensor) -> None:
        """Take in the logits (rows, K) of this process; every process brings the same number of rows."""
        total = teacher_logits.sum(0, keepdim=True, dtype=self.value.dtype)
        rows = len(teacher_logits)
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(total)
            rows *= dist.get_world_size()
        self.value.mul_(self.momentum).add_(total, alpha=(1 - self.momentum) / rows)
