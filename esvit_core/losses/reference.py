"""Reference implementation of the objective, which the fast implementations are tested against.

Training does not use this module. It loops over the pairs of crops, recomputes each softmax, and gathers whole
distributions, so that each line corresponds to a line of section 3.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def plain_view_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    center: Tensor,
    student_temp: float,
    teacher_temp: float,
    n_crops: int,
    mix: Sequence[Tensor] | None = None,
) -> Tensor:
    """Compute equation 1; arguments as in :func:`esvit_core.losses.view.view_loss`."""
    students = (student_logits / student_temp).chunk(n_crops)  # each (B, K)
    teachers = F.softmax((teacher_logits - center) / teacher_temp, -1).detach().chunk(2)  # each (B, K)
    terms = []
    for q, target in enumerate(teachers):
        for v, student in enumerate(students):
            if v == q:
                continue
            log_p = F.log_softmax(student, -1)
            if mix is None:
                terms.append(-(target * log_p).sum(-1).mean())
            else:
                terms.append(-(mix[v] * (target @ log_p.T)).sum(-1).mean())
    return torch.stack(terms).mean()


def plain_region_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    student_features: Tensor,
    teacher_features: Tensor,
    center: Tensor,
    student_temp: float,
    teacher_temp: float,
    student_regions: Sequence[int],
    teacher_regions: int,
) -> Tensor:
    """Compute equation 2; arguments as in :func:`esvit_core.losses.region.region_loss`."""
    B = len(teacher_logits) // (2 * teacher_regions)
    rows = [B * n for n in student_regions]
    students = (student_logits / student_temp).split(rows)
    features = student_features.split(rows)
    teachers = F.softmax((teacher_logits - center) / teacher_temp, -1).detach().chunk(2)
    terms = []
    for q, (target, key) in enumerate(zip(teachers, teacher_features.chunk(2), strict=True)):
        target, key = target.unflatten(0, (B, -1)), key.unflatten(0, (B, -1))  # (B, T, K), (B, T, D)
        for v, (student, query) in enumerate(zip(students, features, strict=True)):
            if v == q:
                continue
            student, query = student.unflatten(0, (B, -1)), query.unflatten(0, (B, -1))  # (B, N, K), (B, N, D)
            similarity = F.normalize(query, dim=-1) @ F.normalize(key, dim=-1).mT  # (B, N, T)
            best = similarity.max(-1).indices  # (B, N)
            matched = target.gather(1, best[..., None].expand(-1, -1, target.shape[-1]))  # (B, N, K)
            terms.append(-(matched * F.log_softmax(student, -1)).sum(-1).mean())
    return torch.stack(terms).mean()
