"""Softmax over K prototypes in torch, a few rows at a time, so that the intermediate values stay in the cache."""

from __future__ import annotations

import torch
from torch import Tensor

# Values of a chunk: 2 MB of float32 on a CPU, so that it stays in the cache; on a GPU enough to fill it.
CHUNK_VALUES = {"cpu": 1 << 19, "cuda": 1 << 25}


def teacher_distribution(logits: Tensor, center: Tensor, temp: float, out: Tensor | None = None) -> Tensor:
    """Centered, sharpened distribution over the prototypes, (rows, K), in at least float32, without gradient."""
    step = rows_per_chunk(logits)
    out = torch.empty(logits.shape, dtype=center.dtype, device=logits.device) if out is None else out
    for chunk, rows in zip(out.split(step), logits.detach().split(step), strict=True):
        torch.softmax((rows - center).mul_(1 / temp), -1, out=chunk)
    return out


def softmax_and_log_sum(z: Tensor, out: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Softmax (r, K) of logits (r, K) and their logsumexp (r,), for the price of the softmax.

    The logsumexp follows from the largest logit, where ``z = logsumexp + log p``.
    """
    p = torch.softmax(z, -1, out=out)
    return p, z.amax(-1) - p.amax(-1).log()


def rows_per_chunk(logits: Tensor) -> int:
    """Number of rows of ``logits`` (rows, K) to process at a time."""
    return max(1, CHUNK_VALUES.get(logits.device.type, 1 << 25) // logits.shape[1])
