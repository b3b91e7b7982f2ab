"""Cross-entropy between student rows and the teacher rows matched to them, without K-wide intermediates.

With probabilities ``p`` of the teacher, logits ``s`` of the student, and ``m(r)`` the teacher rows matched to row ``r``:

    sum_r  w_r  sum_{t in m(r)}  ( logsumexp(s_r / tau)  -  p_t . s_r / tau )

which equals the usual cross-entropy because each ``p_t`` sums to one. Rows are processed in chunks that stay in the
cache, and the softmax of a chunk serves loss and gradient at once: the gradient is the only (rows x K) tensor, and the
logits are not saved for the backward pass. :mod:`esvit_core.losses.reference` is the specification, and
:mod:`esvit_core.losses.strategy` selects among the implementations.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from esvit_core.kernels.chunked_softmax import rows_per_chunk, softmax_and_log_sum, teacher_distribution
from esvit_core.models.lazy_logits import Logits


@dataclass(frozen=True)
class Teacher:
    """The teacher's side of the loss.

    Attributes:
        logits: (2 * B * T, K), ordered by crop, image, region.
        center: (1, K).
        temp: tau_t.
    """

    logits: Logits
    center: Tensor
    temp: float

    def dense_distributions(self) -> Tensor:
        """Return the distributions of all rows, (2 * B * T, K)."""
        assert isinstance(self.logits, Tensor)
        return teacher_distribution(self.logits, self.center, self.temp)


@dataclass(frozen=True)
class Pairs:
    """The teacher rows that each student row is compared with; rows of both are ordered by crop, image, region.

    Attributes:
        matches: for consecutive groups of student rows their teacher rows, (rows of the group, Q of the group). A group
            holds one or more whole crops, and a match belongs to the same image.
        weights: weight of each student row, (R,).
        rows_per_crop: number of student rows in each crop.
        images: number of images B.
    """

    matches: Sequence[Tensor]
    weights: Tensor
    rows_per_crop: Sequence[int]
    images: int

    def matches_by_crop(self) -> list[Tensor]:
        """Return the matches with one group per crop."""
        sizes, groups = iter(self.rows_per_crop), []
        for group in self.matches:
            while len(group):
                size = next(sizes)
                groups.append(group[:size])
                group = group[size:]
        return groups


def chunked_cross_entropy(student_logits: Logits, teacher: Teacher, pairs: Pairs, student_temp: float) -> Tensor:
    """Compute the weighted sum of the cross-entropies of all pairs in torch, a chunk of rows at a time.

    Args:
        student_logits: (R, K), any floating dtype; computed in float32 (or float64 for a float64 center).
        teacher: logits, center and temperature of the teacher; it gets no gradient.
        pairs: matches and weights.
        student_temp: tau_s.

    Returns:
        Scalar.
    """
    return MatchedCrossEntropy.apply(
        student_logits, teacher.dense_distributions(), pairs.weights, student_temp, *pairs.matches
    )


def triton_cross_entropy(student_logits: Logits, teacher: Teacher, pairs: Pairs, student_temp: float) -> Tensor:
    """Compute the same as :func:`chunked_cross_entropy` in fused Triton kernels; float32 centers only."""
    from esvit_core.kernels.cross_entropy_triton import MatchedCrossEntropyTriton

    temps = student_temp, teacher.temp
    return MatchedCrossEntropyTriton.apply(
        student_logits, teacher.logits, teacher.center, temps, pairs.weights, *pairs.matches
    )


class MatchedCrossEntropy(torch.autograd.Function):
    """Cross-entropy of student logits (R, K) with matched teacher distributions (T, K), chunk by chunk."""

    @staticmethod
    def forward(
        ctx: Any, student: Tensor, teacher: Tensor, weights: Tensor, student_temp: float, *matches: Tensor
    ) -> Tensor:
        loss = torch.zeros((), dtype=teacher.dtype, device=student.device)
        gradient = torch.empty_like(student) if ctx.needs_input_grad[0] else None
        for rows, matched in _chunks(matches, student):
            Q = matched.shape[1]
            logits = student[rows].to(teacher.dtype) * (1 / student_temp)  # (r, K)
            p, lse = softmax_and_log_sum(logits)
            target = _targets(teacher, matched)  # (r, K)
            score = logits.mul_(target).sum(-1)  # (r,)
            loss += (weights[rows] * (Q * lse - score)).sum()
            if gradient is not None:
                scale = weights[rows, None] * (Q / student_temp)
                torch.mul(p.sub_(target, alpha=1 / Q), scale, out=gradient[rows])
        if gradient is not None:
            ctx.save_for_backward(gradient)
        return loss

    @staticmethod
    def backward(ctx: Any, outer: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        if outer.is_cuda or outer != 1:  # on a GPU the comparison would synchronize
            gradient = gradient * outer
        return gradient, *(None for _ in ctx.needs_input_grad[1:])


def _chunks(matches: Sequence[Tensor], student: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Yield slices of a few student rows with their matches."""
    start = 0
    for group in matches:
        for matched in group.split(rows_per_chunk(student)):
            yield slice(start, start + len(matched)), matched
            start += len(matched)


def _targets(teacher: Tensor, matched: Tensor) -> Tensor:
    """Return the sum of the teacher rows matched to each student row, (r, K)."""
    if matched.shape[1] == 1:
        return teacher.index_select(0, matched[:, 0])
    return F.embedding_bag(matched, teacher, mode="sum")
