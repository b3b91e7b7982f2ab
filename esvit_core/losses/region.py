"""Region-level task (EsViT, equation 2): each region predicts its best match in the other crop."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from esvit_core.losses.cross_entropy import Pairs, Teacher
from esvit_core.losses.strategy import CHUNKED, LossStrategy
from esvit_core.models.lazy_logits import Logits


def match_regions(student_features: Tensor, teacher_features: Tensor) -> Tensor:
    """Find for each student region the most similar teacher region, by cosine of backbone features.

    Args:
        student_features: (B, N, D), of unit length.
        teacher_features: (B, T, D), of unit length.

    Returns:
        Indices (B, N) into T.
    """
    return (student_features @ teacher_features.mT).max(-1).indices


def region_loss(
    student_logits: Logits,
    teacher_logits: Logits,
    student_features: Tensor,
    teacher_features: Tensor,
    center: Tensor,
    student_temp: float,
    teacher_temp: float,
    student_regions: Sequence[int],
    teacher_regions: int,
    weight: float = 1.0,
    strategy: LossStrategy = CHUNKED,
) -> Tensor:
    """Compute the cross-entropy of each student region with its match, averaged over regions, crop pairs and images.

    Args:
        student_logits: (sum of B * N_v, K), ordered by crop, image, region.
        teacher_logits: (2 * B * T, K) of the global crops.
        student_features: (sum of B * N_v, D), backbone regions in the same order.
        teacher_features: (2 * B * T, D).
        center: (1, K).
        student_temp: tau_s.
        teacher_temp: tau_t.
        student_regions: regions N_v of each crop; crops may differ in size.
        teacher_regions: regions T of a global crop.
        weight: factor of the loss, see :func:`~esvit_core.losses.view.view_loss`.
        strategy: implementation of the cross-entropy.

    Returns:
        Scalar.
    """
    B = len(teacher_logits) // (2 * teacher_regions)
    crop_pairs = 2 * (len(student_regions) - 1)
    matches = match_crops(student_features, teacher_features, student_regions, teacher_regions)
    weights = torch.cat([center.new_full((B * n,), weight / (crop_pairs * B * n)) for n in student_regions])
    pairs = Pairs(matches, weights, [B * n for n in student_regions], B)
    return strategy.cross_entropy(student_logits, Teacher(teacher_logits, center, teacher_temp), pairs, student_temp)


@torch.no_grad()
def match_crops(
    student_features: Tensor, teacher_features: Tensor, student_regions: Sequence[int], teacher_regions: int
) -> list[Tensor]:
    """Find the teacher rows matched to each student row.

    Returns:
        For each crop (B * N_v, Q): Q is 1 for a global crop, which has one counterpart, and 2 for a local crop.
    """
    B = len(teacher_features) // (2 * teacher_regions)
    wide = torch.promote_types(teacher_features.dtype, torch.float32)
    keys = F.normalize(teacher_features.to(wide), dim=-1).view(2, B, teacher_regions, -1)
    first_row = torch.arange(B, device=keys.device)[:, None] * teacher_regions  # (B, 1)
    matches = []
    queries = F.normalize(student_features.to(wide), dim=-1)
    for v, features in enumerate(queries.split([B * n for n in student_regions])):
        query = features.unflatten(0, (B, -1))  # (B, N, D)
        columns = [
            (match_regions(query, keys[q]) + first_row + q * B * teacher_regions).flatten() for q in (0, 1) if q != v
        ]
        matches.append(torch.stack(columns, 1))
    return matches
