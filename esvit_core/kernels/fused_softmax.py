"""Fused softmax kernels of the objective with many prototypes: teacher softmax, and cross-entropy with soft targets.

Each makes one pass over rows of K values. The C kernels (``fused_softmax.c``) keep a row in the cache from the first read
of its logits to the write of its gradient. The torch versions need several operations per pass.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from esvit_core.kernels import call, library
from esvit_core.kernels.chunked_softmax import rows_per_chunk, softmax_and_log_sum, teacher_distribution

_ROWS_PER_CALL = 8  # per thread: enough to amortize the call, and few enough that threads finish together

_Job = tuple[Tensor | float | None, ...]  # arguments of a call


@dataclass(frozen=True)
class SoftmaxKernels:
    """An implementation of both kernels.

    Attributes:
        name: ``C`` or ``torch``.
        teacher_softmax: ``(logits, rows, center, temp, out)``: write the centered, sharpened distributions of some
            teacher rows to ``out``. ``logits`` is (R, K), ``rows`` the indices (r,), ``center`` (1, K), ``temp`` tau_t,
            and ``out`` (r, K) in the dtype of the center.
        soft_cross_entropy: ``(logits, slices, matches, targets, temp, scale, values, out)``: compute the cross-entropies
            of student rows with the mean ``t`` of their matched targets, and the gradients. ``logits`` is (R, K), and
            ``z`` is logits / temp; ``slices`` are the rows, in groups; ``matches`` holds for each group the matched rows
            of ``targets``, (rows of the group, Q of the group); ``targets`` is (T, K), each row a distribution;
            ``temp`` is tau_s; ``scale`` holds the factors of the gradient, (R,). ``values`` (R,) gets
            ``logsumexp(z) - t . z``, and ``out`` (R, K) gets ``scale (softmax(z) - t)``; it may alias ``logits`` or be
            None.
    """

    name: str
    teacher_softmax: Callable[[Tensor, Tensor, Tensor, float, Tensor], None]
    soft_cross_entropy: Callable[
        [Tensor, Sequence[slice], Sequence[Tensor], Tensor, float, Tensor, Tensor, Tensor | None], None
    ]


def select_softmax_kernels() -> SoftmaxKernels:
    """Return the C kernels if they are available on this machine, else the torch versions."""
    return TORCH_KERNELS if library() is None else C_KERNELS


def _teacher_softmax_c(logits: Tensor, rows: Tensor, center: Tensor, temp: float, out: Tensor) -> None:
    _check(logits, center, out)
    args: _Job = (logits, logits.dtype == torch.bfloat16, logits.shape[1], center, 1 / temp)
    chunks = zip(rows.split(_ROWS_PER_CALL), out.split(_ROWS_PER_CALL), strict=True)
    jobs: list[_Job] = [(*args, chunk, len(chunk), part) for chunk, part in chunks]
    call("teacher_softmax", jobs)


def _teacher_softmax_torch(logits: Tensor, rows: Tensor, center: Tensor, temp: float, out: Tensor) -> None:
    step = rows_per_chunk(logits)
    for chunk, part in zip(rows.split(step), out.split(step), strict=True):
        teacher_distribution(logits[chunk], center, temp, part)


def _soft_cross_entropy_c(
    logits: Tensor,
    slices: Sequence[slice],
    matches: Sequence[Tensor],
    targets: Tensor,
    temp: float,
    scale: Tensor,
    values: Tensor,
    out: Tensor | None,
) -> None:
    _check(logits, targets, scale, values)
    if out is not None and not (out.is_contiguous() and out.dtype == logits.dtype):
        raise ValueError("the C kernels need a contiguous out in the dtype of the logits")
    args: _Job = (logits.dtype == torch.bfloat16, logits.shape[1], 1 / temp, targets)
    jobs: list[_Job] = []
    for rows, matched in _chunks(slices, matches, _ROWS_PER_CALL):
        written = values[rows], None if out is None else out[rows]
        jobs.append((logits[rows], len(matched), *args, matched, matched.shape[1], scale[rows], *written))
    call("soft_cross_entropy", jobs)


def _soft_cross_entropy_torch(
    logits: Tensor,
    slices: Sequence[slice],
    matches: Sequence[Tensor],
    targets: Tensor,
    temp: float,
    scale: Tensor,
    values: Tensor,
    out: Tensor | None,
) -> None:
    for rows, matched in _chunks(slices, matches, rows_per_chunk(logits)):
        z = logits[rows].to(targets.dtype) * (1 / temp)  # (r, K)
        p, lse = softmax_and_log_sum(z)
        if matched.shape[1] == 1:
            target = targets.index_select(0, matched[:, 0])
        else:
            target = F.embedding_bag(matched, targets, mode="mean")
        values[rows] = lse - torch.linalg.vecdot(z, target)
        if out is not None:
            torch.mul(p.sub_(target), scale[rows, None], out=out[rows])


C_KERNELS = SoftmaxKernels("C", _teacher_softmax_c, _soft_cross_entropy_c)
TORCH_KERNELS = SoftmaxKernels("torch", _teacher_softmax_torch, _soft_cross_entropy_torch)


def _chunks(slices: Sequence[slice], matches: Sequence[Tensor], step: int) -> Iterator[tuple[slice, Tensor]]:
    """Yield slices of at most ``step`` rows with their matches."""
    for rows, group in zip(slices, matches, strict=True):
        for start, matched in zip(range(rows.start, rows.stop, step), group.split(step), strict=True):
            yield slice(start, start + len(matched)), matched


def _check(logits: Tensor, *others: Tensor) -> None:
    """Check what the C kernels rely on: contiguous CPU tensors, float32 except for bfloat16 logits."""
    if not (
        logits.device.type == "cpu"
        and logits.dtype in (torch.float32, torch.bfloat16)
        and all(other.dtype == torch.float32 for other in others)
        and all(tensor.is_contiguous() for tensor in (logits, *others))
    ):
        raise ValueError("the C kernels need contiguous CPU tensors, logits in float32 or bfloat16, others in float32")
