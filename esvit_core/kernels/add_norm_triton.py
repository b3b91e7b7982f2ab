"""Residual connection and layer norm on a GPU in one kernel per pass: ``x + scale * y``, and the norm of it.

Statistics are computed in float32, whatever the dtypes of the operands are. The gradients of weight and bias are summed by
a fixed number of programs, whose sums are added in a fixed order. ``tests/kernels/test_add_norm_triton.py`` runs the kernels
in Triton's interpreter on a CPU.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor, nn

from esvit_core.kernels.triton_support import launch

_TILE = 4096  # elements that a program processes at a time
_PROGRAMS = 528  # of the backward pass


@triton.jit
def _add_norm_kernel(  # type: ignore[no-untyped-def]
    x, y, scales, images, weight, bias, total, normed, means, rstds, T, eps,
    C: tl.constexpr, ADDS: tl.constexpr, SCALES: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, WIDTH)
    inside = (rows < T)[:, None] & (columns < C)[None, :]
    at = rows[:, None] * C + columns[None, :]
    value = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    if ADDS:
        added = tl.load(y + at, mask=inside, other=0.0).to(tl.float32)
        if SCALES:
            image = tl.load(images + rows, mask=rows < T, other=0)
            added *= tl.load(scales + image)[:, None]
        rounded = (value + added).to(total.dtype.element_ty)
        tl.store(total + at, rounded, mask=inside)
        value = rounded.to(tl.float32)
    mean = tl.sum(value, 1) / C
    centered = tl.where(inside, value - mean[:, None], 0.0)
    rstd = 1 / tl.sqrt(tl.sum(centered * centered, 1) / C + eps)
    gain = tl.load(weight + columns, mask=columns < C, other=0.0)
    offset = tl.load(bias + columns, mask=columns < C, other=0.0)
    result = centered * rstd[:, None] * gain[None, :] + offset[None, :]
    tl.store(normed + at, result.to(normed.dtype.element_ty), mask=inside)
    tl.store(means + rows, mean, mask=rows < T)
    tl.store(rstds + rows, rstd, mask=rows < T)


@triton.jit
def _add_norm_backward_kernel(  # type: ignore[no-untyped-def]
    of_normed, of_total, total, scales, images, weight, means, rstds, of_x, of_y, of_weights, T,
    C: tl.constexpr, ADDS: tl.constexpr, SCALES: tl.constexpr, CONTINUES: tl.constexpr, ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
):  # fmt: skip
    columns = tl.arange(0, WIDTH)
    gain = tl.load(weight + columns, mask=columns < C, other=0.0)
    of_gain = tl.zeros((ROWS, WIDTH), tl.float32)
    of_offset = tl.zeros((ROWS, WIDTH), tl.float32)
    for start in range(tl.program_id(0) * ROWS, T, tl.num_programs(0) * ROWS):
        rows = tl.arange(0, ROWS).to(tl.int64) + start
        inside = (rows < T)[:, None] & (columns < C)[None, :]
        at = rows[:, None] * C + columns[None, :]
        mean = tl.load(means + rows, mask=rows < T, other=0.0)
        rstd = tl.load(rstds + rows, mask=rows < T, other=0.0)
        value = tl.load(total + at, mask=inside, other=0.0).to(tl.float32)
        unit = tl.where(inside, (value - mean[:, None]) * rstd[:, None], 0.0)
        outer = tl.load(of_normed + at, mask=inside, other=0.0).to(tl.float32)
        of_gain += outer * unit
        of_offset += outer
        outer *= gain[None, :]
        along = tl.sum(outer * unit, 1) / C
        gradient = (outer - unit * along[:, None] - (tl.sum(outer, 1) / C)[:, None]) * rstd[:, None]
        if CONTINUES:
            gradient += tl.load(of_total + at, mask=inside, other=0.0).to(tl.float32)
        tl.store(of_x + at, gradient.to(of_x.dtype.element_ty), mask=inside)
        if ADDS:
            if SCALES:
                image = tl.load(images + rows, mask=rows < T, other=0)
                gradient *= tl.load(scales + image)[:, None]
            tl.store(of_y + at, gradient.to(of_y.dtype.element_ty), mask=inside)
    first = of_weights + tl.program_id(0) * (2 * C) + columns
    tl.store(first, tl.sum(of_gain, 0), mask=columns < C)
    tl.store(first + C, tl.sum(of_offset, 0), mask=columns < C)


def add_norm(
    x: Tensor, y: Tensor | None, scales: Tensor | None, images: Tensor, norm: nn.LayerNorm, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Compute ``x + scales[images] * y`` and its layer norm.

    Args:
        x: (T, C).
        y: (T, C); None: zeros.
        scales: factor of each image, float32; None: ones.
        images: image of each row, (T,), int32.
        norm: with weight and bias.
        dtype: of the norm's output.

    Returns:
        The sum, (T, C), in the wider dtype of x and y, and its norm, (T, C).
    """
    total, normed = _AddNorm.apply(x, y, scales, images, norm.weight, norm.bias, norm.eps, dtype)
    return total, normed


class _AddNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        y: Tensor | None,
        scales: Tensor | None,
        images: Tensor,
        weight: Tensor,
        bias: Tensor,
        eps: float,
        dtype: torch.dtype,
    ) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        T, C = x.shape
        ctx.flags = {"ADDS": y is not None, "SCALES": scales is not None}
        ctx.dtypes = x.dtype, None if y is None else y.dtype
        total = x if y is None else torch.empty_like(x, dtype=torch.promote_types(x.dtype, y.dtype))
        normed = torch.empty_like(x, dtype=dtype)
        means, rstds = torch.empty(2, T, device=x.device).unbind()
        sizes = _sizes(C)
        launch(
            _add_norm_kernel,
            (triton.cdiv(T, sizes["ROWS"]),),
            *(x, x if y is None else y.contiguous(), images if scales is None else scales, images, weight, bias),
            *(total, normed, means, rstds, T, eps),
            **ctx.flags,
            **sizes,
        )
        ctx.save_for_backward(total, scales, images, weight, means, rstds)
        return (total.view_as(total) if y is None else total), normed

    @staticmethod
    def backward(ctx: Any, of_total: Tensor | None, of_normed: Tensor | None) -> tuple[Tensor | None, ...]:
        total, scales, images, weight, means, rstds = ctx.saved_tensors
        T, C = total.shape
        of_normed = torch.zeros_like(total) if of_normed is None else of_normed.contiguous()
        of_total = None if of_total is None else of_total.contiguous()
        x_dtype, y_dtype = ctx.dtypes
        of_x = torch.empty_like(total, dtype=x_dtype)
        of_y = None if y_dtype is None else torch.empty_like(total, dtype=y_dtype)
        sizes = _sizes(C)
        programs = min(_PROGRAMS, triton.cdiv(T, sizes["ROWS"]))
        of_weights = torch.empty(programs, 2, C, device=total.device)
        launch(
            _add_norm_backward_kernel,
            (programs,),
            *(of_normed, of_normed if of_total is None else of_total, total),
            *(images if scales is None else scales, images, weight, means, rstds),
            *(of_x, of_x if of_y is None else of_y, of_weights, T),
            CONTINUES=of_total is not None,
            **ctx.flags,
            **sizes,
        )
        of_weight, of_bias = of_weights.sum(0).unbind()
        return of_x, of_y, None, None, of_weight, of_bias, None, None


def _sizes(C: int) -> dict[str, int]:
    width = triton.next_power_of_2(C)
    return {"C": C, "WIDTH": width, "ROWS": max(1, min(32, _TILE // width)), "num_warps": 8 if width >= 1024 else 4}
