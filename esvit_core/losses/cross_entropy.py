"""Cross-entropy between student rows and the teacher rows matched to them, without K-wide intermediates.

With probabilities ``p`` of the teacher, logits ``s`` of the student, ``m(r)`` the teacher rows matched to row ``r``:

    sum_r  w_r  sum_{t in m(r)}  ( logsumexp(s_r / tau)  -  p_t . s_r / tau )

which is the usual cross-entropy because each ``p_t`` sums to one. Rows are worked off in chunks that stay in the
cache; the backward pass computes the softmax of a chunk again instead of keeping it. Besides the gradient itself no
tensor of (rows x K) is made.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

# Values of a chunk: 2 MB of float32 on a processor, so that it stays in the cache; on a GPU enough to fill it.
_CHUNK_VALUES = {"cpu": 1 << 19, "cuda": 1 << 25}


def matched_cross_entropy(
    student_logits: Tensor,
    teacher_probabilities: Tensor,
    matches: Sequence[Tensor],
    weights: Tensor,
    student_temp: float,
) -> Tensor:
    """Weighted sum of the cross-entropies of all matched rows.

    Args:
        student_logits: (R, K), any floating dtype; computed in float32 (float64 stays).
        teacher_probabilities: (T, K), each row a distribution; takes no gradient.
        matches: for consecutive groups of student rows the teacher rows of each, (rows of the group, Q of the group).
        weights: factor of each student row, (R,).
        student_temp: temperature of the student.

    Returns:
        Scalar.
    """
    return _MatchedCrossEntropy.apply(student_logits, teacher_probabilities, weights, student_temp, *matches)


class _MatchedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, student: Tensor, teacher: Tensor, weights: Tensor, student_temp: float, *matches: Tensor
    ) -> Tensor:
        normaliser = torch.empty(len(student), dtype=teacher.dtype, device=student.device)
        loss = torch.zeros((), dtype=teacher.dtype, device=student.device)
        for rows, matched in _chunks(matches, student):
            logits = student[rows].to(teacher.dtype) / student_temp  # (r, K)
            lse = torch.logsumexp(logits, -1)  # (r,)
            normaliser[rows] = lse
            score = (_targets(teacher, matched) * logits).sum(-1)  # (r,)
            loss += (weights[rows] * (matched.shape[1] * lse - score)).sum()
        ctx.save_for_backward(student, teacher, weights, normaliser, *matches)
        ctx.student_temp = student_temp
        return loss

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        student, teacher, weights, normaliser, *matches = ctx.saved_tensors
        out = torch.empty_like(student)
        scale = gradient * weights / ctx.student_temp  # (R,)
        for rows, matched in _chunks(matches, student):
            p = student[rows].to(teacher.dtype).div_(ctx.student_temp)
            p = p.sub_(normaliser[rows, None]).exp_().mul_(matched.shape[1])
            out[rows] = p.sub_(_targets(teacher, matched)).mul_(scale[rows, None])
        return out, None, None, None, *(None for _ in matches)


def _chunks(matches: Sequence[Tensor], student: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Slices of student rows with their matches, a few rows at a time."""
    step = max(1, _CHUNK_VALUES.get(student.device.type, 1 << 25) // student.shape[1])
    start = 0
    for group in matches:
        for matched in group.split(step):
            yield slice(start, start + len(matched)), matched
            start += len(matched)


def _targets(teacher: Tensor, matched: Tensor) -> Tensor:
    """Sum of the teacher rows matched to each student row, (r, K)."""
    total = teacher.index_select(0, matched[:, 0])
    for column in matched.unbind(1)[1:]:
        total += teacher.index_select(0, column)
    return total
