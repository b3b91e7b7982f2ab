"""The two passes over rows of K values that the objective of many prototypes consists of.

On a processor with a C compiler ``fused_softmax.c`` of :mod:`esvit_core.kernels` makes them: a row stays in the cache from its
first reading to the writing of its gradient. Elsewhere torch makes them, a few operations a pass.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from esvit_core.kernels import call, library
from esvit_core.kernels.chunked_softmax import rows_per_chunk, softmax_and_log_sum, teacher_distribution

_ROWS_PER_CALL = 8  # of one thread: its call costs little beside them, and threads end at nearly the same time

_Job = tuple[Tensor | float | None, ...]  # the arguments of a call


def teacher_softmax(logits: Tensor, rows: Tensor, center: Tensor, temp: float, out: Tensor) -> None:
    """Centered, sharpened distributions of some of the teacher's rows.

    Args:
        logits: (R, K), any floating dtype.
        rows: which of them, (r,).
        center: (1, K).
        temp: tau_t.
        out: (r, K), in the dtype of the center.
    """
    if _compiled_fits(logits, center):
        given: _Job = (logits, logits.dtype == torch.bfloat16, logits.shape[1], center, 1 / temp)
        chunks = zip(rows.split(_ROWS_PER_CALL), out.split(_ROWS_PER_CALL), strict=True)
        jobs: list[_Job] = [(*given, chunk, len(chunk), part) for chunk, part in chunks]
        call("teacher_softmax", jobs)
        return
    step = rows_per_chunk(logits)
    for chunk, part in zip(rows.split(step), out.split(step), strict=True):
        teacher_distribution(logits[chunk], center, temp, part)


def soft_cross_entropy(
    logits: Tensor,
    places: Sequence[slice],
    matches: Sequence[Tensor],
    targets: Tensor,
    temp: float,
    scale: Tensor,
    values: Tensor,
    out: Tensor | None,
) -> None:
    """Cross-entropies of the student's rows with the mean ``t`` of their matched targets, and the gradients.

    Args:
        logits: (R, K), any floating dtype; ``z`` is logits / temp.
        places: which rows, in groups.
        matches: for each group the matched rows of ``targets``, (rows of the group, Q of the group).
        targets: (T, K), each row a distribution.
        temp: tau_s.
        scale: factors of the gradient, (R,).
        values: (R,); gets ``logsumexp(z) - t . z`` of the rows.
        out: (R, K); gets ``scale (softmax(z) - t)`` of the rows. May be ``logits`` itself, or None.
    """
    if _compiled_fits(logits, targets, scale, values) and (out is None or out.is_contiguous()):
        given: _Job = (logits.dtype == torch.bfloat16, logits.shape[1], 1 / temp, targets)
        jobs: list[_Job] = []
        for rows, matched in _chunks(places, matches, _ROWS_PER_CALL):
            written = values[rows], None if out is None else out[rows]
            jobs.append((logits[rows], len(matched), *given, matched, matched.shape[1], scale[rows], *written))
        call("soft_cross_entropy", jobs)
        return
    for rows, matched in _chunks(places, matches, rows_per_chunk(logits)):
        z = logits[rows].to(targets.dtype) * (1 / temp)  # (r, K)
        p, lse = softmax_and_log_sum(z)
        if matched.shape[1] == 1:
            target = targets.index_select(0, matched[:, 0])
        else:
            target = F.embedding_bag(matched, targets, mode="mean")
        values[rows] = lse - torch.linalg.vecdot(z, target)
        if out is not None:
            torch.mul(p.sub_(target), scale[rows, None], out=out[rows])


def _chunks(places: Sequence[slice], matches: Sequence[Tensor], step: int) -> Iterator[tuple[slice, Tensor]]:
    """Slices of rows with their matches, ``step`` rows at most."""
    for place, group in zip(places, matches, strict=True):
        for start, matched in zip(range(place.start, place.stop, step), group.split(step), strict=True):
            yield slice(start, start + len(matched)), matched


# The compiled form


def _compiled_fits(logits: Tensor, *others: Tensor) -> bool:
    """Whether ``fused_softmax.c`` computes with these: on a processor, in float32, the logits in bfloat16 perhaps."""
    return (
        logits.device.type == "cpu"
        and logits.dtype in (torch.float32, torch.bfloat16)
        and all(other.dtype == torch.float32 for other in others)
        and all(tensor.is_contiguous() for tensor in (logits, *others))
        and library() is not None
    )
