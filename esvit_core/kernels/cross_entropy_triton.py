"""Matched cross-entropy on a GPU: one forward and one backward kernel; the only (rows x K) tensor is the gradient.

The forward kernel reads each student row once and computes its log-sum-exp online together with its product with the
matched teacher rows. Only the log-sum-exp is saved. The backward kernel computes and writes the gradient, and reads the
outer gradient on the device. The formula is in :mod:`esvit_core.losses.cross_entropy`; ``tests/losses/test_cross_entropy_triton.py`` runs the
kernels in Triton's interpreter on a CPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 4096  # columns that a program processes at a time


@triton.jit
def _forward_kernel(  # type: ignore[no-untyped-def]
    student, teacher, matches, weights, loss, lse, K, inverse_temp, Q: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    largest = tl.full((), float("-inf"), tl.float32)
    total = tl.zeros((), tl.float32)
    score = tl.zeros((), tl.float32)
    for start in range(0, K, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        inside = columns < K
        s = tl.load(student + row * K + columns, mask=inside, other=float("-inf")).to(tl.float32) * inverse_temp
        new_largest = tl.maximum(largest, tl.max(s, 0))
        total = total * tl.exp(largest - new_largest) + tl.sum(tl.exp(s - new_largest), 0)
        largest = new_largest
        for q in tl.static_range(Q):
            match = tl.load(matches + row * Q + q)
            valid = inside & (match >= 0)
            p = tl.load(teacher + match * K + columns, mask=valid, other=0.0)
            score += tl.sum(p * tl.where(inside, s, 0.0), 0)
    matched = tl.zeros((), tl.float32)
    for q in tl.static_range(Q):
        matched += (tl.load(matches + row * Q + q) >= 0).to(tl.float32)
    log_sum = largest + tl.log(total)
    tl.store(lse + row, log_sum)
    tl.store(loss + row, tl.load(weights + row) * (matched * log_sum - score))


@triton.jit
def _backward_kernel(  # type: ignore[no-untyped-def]
    student, teacher, matches, weights, lse, outer, gradient, K, inverse_temp, Q: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < K
    s = tl.load(student + row * K + columns, mask=inside, other=0.0).to(tl.float32) * inverse_temp
    target = tl.zeros((BLOCK,), tl.float32)
    matched = tl.zeros((), tl.float32)
    for q in tl.static_range(Q):
        match = tl.load(matches + row * Q + q)
        matched += (match >= 0).to(tl.float32)
        target += tl.load(teacher + match * K + columns, mask=inside & (match >= 0), other=0.0)
    scale = tl.load(weights + row) * inverse_temp * tl.load(outer)
    value = (tl.exp(s - tl.load(lse + row)) * matched - target) * scale
    tl.store(gradient + row * K + columns, value.to(gradient.dtype.element_ty), mask=inside)


class MatchedCrossEntropyTriton(torch.autograd.Function):
    """Arguments as in :class:`~esvit_core.losses.cross_entropy.MatchedCrossEntropy`; the teacher is float32."""

    @staticmethod
    def forward(
        ctx: Any, student: Tensor, teacher: Tensor, weights: Tensor, student_temp: float, *matches: Tensor
    ) -> Tensor:
        student, rows = student.contiguous(), len(student)
        table = _table(matches)
        loss, lse = student.new_empty((2, rows), dtype=torch.float32).unbind()
        K = student.shape[1]
        _forward_kernel[(rows,)](
            student, teacher, table, weights, loss, lse, K, 1 / student_temp, Q=table.shape[1], BLOCK=_block(K)
        )
        ctx.save_for_backward(student, teacher, table, weights, lse)
        ctx.student_temp = student_temp
        return loss.sum()

    @staticmethod
    def backward(ctx: Any, outer: Tensor) -> tuple[Tensor | None, ...]:
        student, teacher, table, weights, lse = ctx.saved_tensors
        gradient = torch.empty_like(student)
        rows, K = student.shape
        block = _block(K)
        _backward_kernel[(rows, triton.cdiv(K, block))](
            *(student, teacher, table, weights, lse, outer.contiguous(), gradient, K, 1 / ctx.student_temp),
            Q=table.shape[1],
            BLOCK=block,
        )
        return gradient, *(None for _ in ctx.needs_input_grad[1:])


def _table(matches: Sequence[Tensor]) -> Tensor:
    """Collect the groups' matches in one table (R, Q), padded with -1."""
    Q = max(group.shape[1] for group in matches)
    return torch.cat([torch.nn.functional.pad(group, (0, Q - group.shape[1]), value=-1) for group in matches])


def _block(K: int) -> int:
    return min(BLOCK, triton.next_power_of_2(K))
