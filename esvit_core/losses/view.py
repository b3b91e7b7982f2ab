"""The view-level task (EsViT, equation 1; DINO, Caron et al., 2021)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from esvit_core.kernels.chunked_softmax import teacher_distribution
from esvit_core.losses.blockwise import Logits, Teacher, blockwise_cross_entropy
from esvit_core.losses.cross_entropy import matched_cross_entropy
from esvit_core.models.lazy_logits import LazyLogits, are_many


def view_loss(
    student_logits: Logits,
    teacher_logits: Logits,
    center: Tensor,
    student_temp: float,
    teacher_temp: float,
    n_crops: int,
    mix: Sequence[Tensor] | None = None,
    weight: float = 1.0,
) -> Tensor:
    """Cross-entropy of each student crop with each teacher crop but itself, averaged over pairs and images.

    Args:
        student_logits: (V * B, K), crop by crop, the two global crops first.
        teacher_logits: (2 * B, K) of the global crops.
        center: (1, K).
        student_temp: tau_s.
        teacher_temp: tau_t.
        n_crops: V.
        mix: for images mixed by mixup or CutMix, of each crop the shares (B, B): row i, column j is the weight of
            the teacher's image i in the loss of the student's image j, as the published code multiplies them.
        weight: factor of the loss. Given here it costs nothing; a factor outside is a pass over the gradient.

    Returns:
        Scalar.
    """
    B = len(teacher_logits) // 2
    pairs = 2 * (n_crops - 1)
    if mix is not None:
        student_logits, teacher_logits = (
            logits.dense() if isinstance(logits, LazyLogits) else logits for logits in (student_logits, teacher_logits)
        )
        targets = teacher_distribution(teacher_logits, center, teacher_temp)  # (2B, K)
        return _mixed_loss(student_logits, targets, student_temp, mix) * (weight / (pairs * B))
    own = torch.arange(B, device=center.device)
    first, second = own[:, None], own[:, None] + B  # rows of the teacher's two crops
    matches = [second, first, torch.cat((first, second), 1).repeat(n_crops - 2, 1)]
    weights = center.new_full((n_crops * B,), weight / (pairs * B))
    if isinstance(student_logits, LazyLogits) or are_many(student_logits, student_logits.shape[1]):
        matches[2:] = matches[2].split(B) if n_crops > 2 else []
        teacher = Teacher(teacher_logits, center, teacher_temp)
        return blockwise_cross_entropy(student_logits, teacher, matches, weights, student_temp, B)
    assert isinstance(teacher_logits, Tensor)
    targets = teacher_distribution(teacher_logits, center, teacher_temp)  # (2B, K)
    return matched_cross_entropy(student_logits, targets, matches, weights, student_temp)


def _mixed_loss(student_logits: Tensor, targets: Tensor, student_temp: float, mix: Sequence[Tensor]) -> Tensor:
    log_p = F.log_softmax(student_logits.to(targets.dtype) / student_temp, -1).chunk(len(mix))
    total = targets.new_zeros(())
    for v, (share, student) in enumerate(zip(mix, log_p, strict=True)):
        for q, target in enumerate(targets.chunk(2)):
            if v != q:
                total = total - ((share.to(target.dtype).T @ target) * student).sum()
    return total
