"""Cross-entropy of lazy logits on a GPU, a few images at a time: the logits of all rows are never stored.

Regions are only compared within an image. For a few images the logits of student and teacher are computed, compared by the
Triton kernels, and replaced by the gradient, which is added to those of embeddings and prototypes. It takes the products
that stored logits take, and the memory of a few images; see :mod:`esvit_core.losses.blockwise` for the same on a CPU.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from esvit_core.kernels.half_linear import product
from esvit_core.losses.cross_entropy import Pairs, Teacher
from esvit_core.models.lazy_logits import LazyLogits, Logits

CHUNK_ROWS = 2048  # student rows at a time, but at least those of one image: 256 MB with K = 65,536


def lazy_triton_cross_entropy(student_logits: Logits, teacher: Teacher, pairs: Pairs, student_temp: float) -> Tensor:
    """Compute the weighted sum of the cross-entropies of all pairs; float32 centers only.

    Args:
        student_logits: (R, K), lazy.
        teacher: lazy logits, center and temperature of the teacher; it gets no gradient.
        pairs: matches and weights.
        student_temp: tau_s.

    Returns:
        Scalar.
    """
    assert isinstance(student_logits, LazyLogits)
    loss: Tensor = _LazyTritonCrossEntropy.apply(
        student_logits.embeddings, student_logits.weight, teacher, pairs, student_temp
    )
    return loss


class _LazyTritonCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, embeddings: Tensor, weight: Tensor, teacher: Teacher, pairs: Pairs, student_temp: float
    ) -> Tensor:
        from esvit_core.kernels import cross_entropy_triton as kernels

        assert isinstance(teacher.logits, LazyLogits)
        needs_grad = any(ctx.needs_input_grad)
        if needs_grad:
            of_embeddings = torch.empty_like(embeddings)
            of_weight = torch.zeros_like(weight)
        prototypes, teacher_prototypes = weight.to(embeddings.dtype), teacher.logits.weight.to(teacher.logits.dtype)
        table, temps = kernels.match_table(pairs.matches), (student_temp, teacher.temp)
        one = torch.ones((), device=embeddings.device)
        losses = []
        for first, last in _chunks(pairs):
            own = _rows(pairs, first, last)
            regions = len(teacher.logits) // (2 * pairs.images)
            theirs = [slice((crop + first) * regions, (crop + last) * regions) for crop in (0, pairs.images)]
            x, weights = _take(embeddings, own), _take(pairs.weights, own)
            logits = x @ prototypes.T  # (r, K), then the gradient
            targets = _take(teacher.logits.embeddings, theirs) @ teacher_prototypes.T
            matches = _local(_take(table, own), first, last, pairs.images, regions)
            arguments = (logits, targets, teacher.center, temps, weights, matches)
            loss, lse, teacher_lse = kernels.cross_entropies(*arguments)
            losses.append(loss.sum())
            if needs_grad:
                kernels.write_gradient(*arguments, lse, teacher_lse, one, logits)
                of_weight += product(logits.T, x, of_weight.dtype)
                for rows, part in zip(own, (logits @ prototypes).split([_size(rows) for rows in own]), strict=True):
                    of_embeddings[rows] = part
            del logits, targets, arguments  # frees the memory before the next images
        ctx.save_for_backward(*((of_embeddings, of_weight) if needs_grad else ()))
        return torch.stack(losses).sum()

    @staticmethod
    def backward(ctx: Any, outer: Tensor) -> tuple[Tensor | None, ...]:
        of_embeddings, of_weight = ctx.saved_tensors
        return of_embeddings * outer, of_weight * outer, None, None, None


def _chunks(pairs: Pairs) -> list[tuple[int, int]]:
    """Return the first image of each chunk, and the one after its last."""
    step = max(1, CHUNK_ROWS * pairs.images // sum(pairs.rows_per_crop))
    return [(first, min(first + step, pairs.images)) for first in range(0, pairs.images, step)]


def _rows(pairs: Pairs, first: int, last: int) -> list[slice]:
    """Return the student rows of some images, a slice for each crop."""
    slices, start = [], 0
    for rows in pairs.rows_per_crop:
        each = rows // pairs.images
        slices.append(slice(start + first * each, start + last * each))
        start += rows
    return slices


def _size(rows: slice) -> int:
    return int(rows.stop - rows.start)


def _take(x: Tensor, slices: list[slice]) -> Tensor:
    return torch.cat([x[rows] for rows in slices])


def _local(table: Tensor, first: int, last: int, images: int, regions: int) -> Tensor:
    """Return matches as rows of the teacher's logits of some images; rows are ordered by crop, image and region."""
    second = table >= images * regions
    local = table - first * regions - second * ((images - last + first) * regions)
    return torch.where(table < 0, -1, local)
