"""View-level task (EsViT, equation 1; DINO, Caron et al., 2021)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from esvit_core.kernels.chunked_softmax import teacher_distribution
from esvit_core.losses.cross_entropy import Pairs, Teacher
from esvit_core.losses.strategy import CHUNKED, LossStrategy
from esvit_core.models.lazy_logits import Logits, materialize


def view_loss(
    student_logits: Logits,
    teacher_logits: Logits,
    center: Tensor,
    student_temp: float,
    teacher_temp: float,
    n_crops: int,
    mix: Sequence[Tensor] | None = None,
    weight: float = 1.0,
    strategy: LossStrategy = CHUNKED,
) -> Tensor:
    """Compute the cross-entropy of each student crop with each other teacher crop, averaged over pairs and images.

    Args:
        student_logits: (V * B, K), ordered by crop, image; the two global crops first.
        teacher_logits: (2 * B, K) of the global crops.
        center: (1, K).
        student_temp: tau_s.
        teacher_temp: tau_t.
        n_crops: number of crops V.
        mix: for images mixed by mixup or CutMix, the shares (B, B) of each crop: row i, column j is the weight of the
            teacher's image i in the loss of the student's image j, as in the published code.
        weight: factor of the loss; a factor applied outside would cost a pass over the gradient.
        strategy: implementation of the cross-entropy.

    Returns:
        Scalar.
    """
    B = len(teacher_logits) // 2
    crop_pairs = 2 * (n_crops - 1)
    if mix is not None:
        targets = teacher_distribution(materialize(teacher_logits), center, teacher_temp)  # (2B, K)
        return _mixed_loss(materialize(student_logits), targets, student_temp, mix) * (weight / (crop_pairs * B))
    own = torch.arange(B, device=center.device)
    first, second = own[:, None], own[:, None] + B  # rows of the teacher's two crops
    matches = [second, first, torch.cat((first, second), 1).repeat(n_crops - 2, 1)]
    weights = center.new_full((n_crops * B,), weight / (crop_pairs * B))
    pairs = Pairs(matches, weights, [B] * n_crops, B)
    return strategy.cross_entropy(student_logits, Teacher(teacher_logits, center, teacher_temp), pairs, student_temp)


def _mixed_loss(student_logits: Tensor, targets: Tensor, student_temp: float, mix: Sequence[Tensor]) -> Tensor:
    log_p = F.log_softmax(student_logits.to(targets.dtype) / student_temp, -1).chunk(len(mix))
    total = targets.new_zeros(())
    for v, (share, student) in enumerate(zip(mix, log_p, strict=True)):
        for q, target in enumerate(targets.chunk(2)):
            if v != q:
                total = total - ((share.to(target.dtype).T @ target) * student).sum()
    return total
