"""Matched cross-entropy on a GPU: one kernel for the teacher, one forward and one backward; the only (rows x K) tensor is
the gradient.

The teacher's kernel computes the log-sum-exp of each centered and sharpened row; its distribution is computed again where
it is used and never stored. The forward kernel reads each student row once and computes its log-sum-exp online together
with its product with the matched teacher rows. The backward kernel computes and writes the gradient, and reads the outer
gradient on the device. The formula is in :mod:`esvit_core.losses.cross_entropy`;
``tests/losses/test_cross_entropy_triton.py`` runs the kernels in Triton's interpreter on a CPU.
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
def _probabilities(logits, center, log_sum, columns, inside, inverse_temp):  # type: ignore[no-untyped-def]
    """Return the teacher's probabilities of some prototypes; 0 outside."""
    z = tl.load(logits + columns, mask=inside, other=float("-inf")).to(tl.float32)
    return tl.exp((z - tl.load(center + columns, mask=inside, other=0.0)) * inverse_temp - log_sum)


@triton.jit
def _teacher_kernel(logits, center, lse, K, inverse_temp, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    row = tl.program_id(0).to(tl.int64)
    largest = tl.full((), float("-inf"), tl.float32)
    total = tl.zeros((), tl.float32)
    for start in range(0, K, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        inside = columns < K
        z = tl.load(logits + row * K + columns, mask=inside, other=float("-inf")).to(tl.float32)
        z = (z - tl.load(center + columns, mask=inside, other=0.0)) * inverse_temp
        new_largest = tl.maximum(largest, tl.max(z, 0))
        total = total * tl.exp(largest - new_largest) + tl.sum(tl.exp(z - new_largest), 0)
        largest = new_largest
    tl.store(lse + row, largest + tl.log(total))


@triton.jit
def _forward_kernel(  # type: ignore[no-untyped-def]
    student, teacher, center, teacher_lse, matches, weights, loss, lse, K, inverse_temp, teacher_inverse_temp,
    Q: tl.constexpr, BLOCK: tl.constexpr,
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
            log_sum = tl.load(teacher_lse + match, mask=match >= 0, other=0.0)
            p = _probabilities(teacher + match * K, center, log_sum, columns, valid, teacher_inverse_temp)
            score += tl.sum(p * tl.where(inside, s, 0.0), 0)
    matched = tl.zeros((), tl.float32)
    for q in tl.static_range(Q):
        matched += (tl.load(matches + row * Q + q) >= 0).to(tl.float32)
    log_sum = largest + tl.log(total)
    tl.store(lse + row, log_sum)
    tl.store(loss + row, tl.load(weights + row) * (matched * log_sum - score))


@triton.jit
def _backward_kernel(  # type: ignore[no-untyped-def]
    student, teacher, center, teacher_lse, matches, weights, lse, outer, gradient, K, inverse_temp, teacher_inverse_temp,
    Q: tl.constexpr, BLOCK: tl.constexpr,
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
        log_sum = tl.load(teacher_lse + match, mask=match >= 0, other=0.0)
        valid = inside & (match >= 0)
        target += _probabilities(teacher + match * K, center, log_sum, columns, valid, teacher_inverse_temp)
    scale = tl.load(weights + row) * inverse_temp * tl.load(outer)
    value = (tl.exp(s - tl.load(lse + row)) * matched - target) * scale
    tl.store(gradient + row * K + columns, value.to(gradient.dtype.element_ty), mask=inside)


class MatchedCrossEntropyTriton(torch.autograd.Function):
    """Cross-entropy of student logits (R, K) with the distributions of matched teacher logits (T, K).

    The center (1, K) is float32, and the temperatures are those of student and teacher. Weights and matches are as in
    :class:`~esvit_core.losses.cross_entropy.MatchedCrossEntropy`.
    """

    @staticmethod
    def forward(
        ctx: Any,
        student: Tensor,
        teacher: Tensor,
        center: Tensor,
        temps: tuple[float, float],
        weights: Tensor,
        *matches: Tensor,
    ) -> Tensor:
        student, teacher = student.contiguous(), teacher.contiguous()
        table = match_table(matches)
        loss, lse, teacher_lse = cross_entropies(student, teacher, center, temps, weights, table)
        ctx.temps = temps
        # The center is updated before the backward pass.
        ctx.save_for_backward(student, teacher, center.clone(), weights, table, lse, teacher_lse)
        return loss.sum()

    @staticmethod
    def backward(ctx: Any, outer: Tensor) -> tuple[Tensor | None, ...]:
        student, teacher, center, weights, table, lse, teacher_lse = ctx.saved_tensors
        gradient = torch.empty_like(student)
        write_gradient(student, teacher, center, ctx.temps, weights, table, lse, teacher_lse, outer, gradient)
        return gradient, *(None for _ in ctx.needs_input_grad[1:])


def cross_entropies(
    student: Tensor, teacher: Tensor, center: Tensor, temps: tuple[float, float], weights: Tensor, table: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the weighted cross-entropy of each student row (R,), and the log-sum-exps of student (R,) and teacher (T,).

    Args:
        student: logits, (R, K), contiguous.
        teacher: logits, (T, K), contiguous.
        center: (1, K), float32.
        temps: temperatures of student and teacher.
        weights: (R,).
        table: matched teacher rows of each student row, (R, Q); -1: none.
    """
    K, inverse_temps = student.shape[1], [1 / temp for temp in temps]
    loss, lse = student.new_empty((2, len(student)), dtype=torch.float32).unbind()
    teacher_lse = torch.empty(len(teacher), device=teacher.device)
    _teacher_kernel[(len(teacher),)](teacher, center, teacher_lse, K, inverse_temps[1], BLOCK=_block(K))
    _forward_kernel[(len(student),)](
        *(student, teacher, center, teacher_lse, table, weights, loss, lse, K, *inverse_temps),
        Q=table.shape[1],
        BLOCK=_block(K),
        num_warps=8,
    )
    return loss, lse, teacher_lse


def write_gradient(
    student: Tensor,
    teacher: Tensor,
    center: Tensor,
    temps: tuple[float, float],
    weights: Tensor,
    table: Tensor,
    lse: Tensor,
    teacher_lse: Tensor,
    outer: Tensor,
    gradient: Tensor,
) -> None:
    """Write the gradient of ``outer`` times the sum of the losses to ``gradient`` (R, K), which may be ``student``."""
    rows, K = student.shape
    block = _block(K)
    _backward_kernel[(rows, triton.cdiv(K, block))](
        *(student, teacher, center, teacher_lse, table, weights, lse, outer.contiguous(), gradient, K),
        *(1 / temp for temp in temps),
        Q=table.shape[1],
        BLOCK=block,
    )


def match_table(matches: Sequence[Tensor]) -> Tensor:
    """Collect the groups' matches in one table (R, Q), padded with -1."""
    Q = max(group.shape[1] for group in matches)
    return torch.cat([torch.nn.functional.pad(group, (0, Q - group.shape[1]), value=-1) for group in matches])


def _block(K: int) -> int:
    return min(BLOCK, triton.next_power_of_2(K))
