"""Cross-entropy between student rows and the teacher rows matched to them, without K-wide intermediates.

With probabilities ``p`` of the teacher, logits ``s`` of the student, ``m(r)`` the teacher rows matched to row ``r``:

    sum_r  w_r  sum_{t in m(r)}  ( logsumexp(s_r / tau)  -  p_t . s_r / tau )

which is the usual cross-entropy because each ``p_t`` sums to one. Rows are worked off in chunks that stay in the
cache, and the softmax of a chunk serves loss and gradient at once: besides the gradient itself no tensor of
(rows x K) is made, and the logits are not kept for the backward pass. On a GPU with Triton
:mod:`esvit_core.kernels.cross_entropy_triton` takes over. :mod:`esvit_core.losses.reference` is the specification of both.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import shutil
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from esvit_core.kernels.chunked_softmax import rows_per_chunk, softmax_and_log_sum


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
    function: type[torch.autograd.Function] = _MatchedCrossEntropy
    if student_logits.is_cuda and teacher_probabilities.dtype == torch.float32 and has_triton():
        from esvit_core.kernels.cross_entropy_triton import MatchedCrossEntropyTriton as function  # noqa: N813
    return function.apply(student_logits, teacher_probabilities, weights, student_temp, *matches)


@functools.cache
def has_triton() -> bool:
    """Whether there is Triton, the compiler of the GPU's form of this module, and the C compiler that it needs.

    Triton builds its access to the driver from C at its first kernel, and an image may have no compiler.
    """
    compiler = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")
    return importlib.util.find_spec("triton") is not None and bool(compiler)


class _MatchedCrossEntropy(torch.autograd.Function):
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
        if outer.is_cuda or outer != 1:  # a GPU is not asked for the value: that would wait for it
            gradient = gradient * outer
        return gradient, *(None for _ in ctx.needs_input_grad[1:])


def _chunks(matches: Sequence[Tensor], student: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Slices of student rows with their matches, a few rows at a time."""
    start = 0
    for group in matches:
        for matched in group.split(rows_per_chunk(student)):
            yield slice(start, start + len(matched)), matched
            start += len(matched)


def _targets(teacher: Tensor, matched: Tensor) -> Tensor:
    """Sum of the teacher rows matched to each student row, (r, K)."""
    if matched.shape[1] == 1:
        return teacher.index_select(0, matched[:, 0])
    return F.embedding_bag(matched, teacher, mode="sum")
