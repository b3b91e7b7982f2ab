"""Blockwise cross-entropy: process a few images at a time, so that no (all rows x K) intermediate is stored.

Regions are only compared within an image. For a block of images the teacher's distributions of the matched rows are
computed, compared with the student's logits of the same images, and discarded; the softmax serves loss and gradient at
once. With lazy logits (:class:`~esvit_core.models.lazy_logits.LazyLogits`) the student's logits and their gradient are
discarded as well, after the gradient has been added to those of embeddings and prototypes.

The formula is in :mod:`esvit_core.losses.cross_entropy`; with ``t`` the mean of the teacher rows matched to row ``r``,

    loss_r = w_r Q (logsumexp(z_r) - t . z_r)        z_r = s_r / tau        dloss_r / dz_r = w_r Q (softmax(z_r) - t)

The passes over rows are in :mod:`esvit_core.kernels.fused_softmax`.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from esvit_core.kernels.fused_softmax import SoftmaxKernels
from esvit_core.kernels.onednn_linear import linear
from esvit_core.losses.cross_entropy import Pairs, Teacher
from esvit_core.models.lazy_logits import WEIGHT_CHUNK_ROWS, LazyLogits, Logits

# Student rows per block, but at least those of one image.
_DENSE_BLOCK_ROWS = 256
LAZY_BLOCK_ROWS = 512  # larger, because each block reads the prototypes and adds to their whole gradient
_TEACHER_ROWS = 256  # rows of lazy teacher logits per product: the product of fewer takes as long


def blockwise_cross_entropy(
    student_logits: Logits, teacher: Teacher, pairs: Pairs, student_temp: float, kernels: SoftmaxKernels
) -> Tensor:
    """Compute the weighted sum of the cross-entropies of all pairs, a block of images at a time.

    Args:
        student_logits: (R, K).
        teacher: logits, center and temperature of the teacher; it gets no gradient.
        pairs: matches and weights.
        student_temp: tau_s.
        kernels: implementation of the passes over rows.

    Returns:
        Scalar.
    """
    matches = pairs.matches_by_crop()
    weights = pairs.weights.split([len(group) for group in matches])
    factors = torch.cat([group.shape[1] * part for group, part in zip(matches, weights, strict=True)])
    if isinstance(student_logits, LazyLogits):
        blocks = list(_blocks(matches, pairs.images, LAZY_BLOCK_ROWS))
        return _LazyCrossEntropy.apply(
            student_logits.embeddings, student_logits.weight, teacher, blocks, factors, student_temp, kernels
        )
    blocks = list(_blocks(matches, pairs.images, _DENSE_BLOCK_ROWS))
    return _DenseCrossEntropy.apply(student_logits, teacher, blocks, factors, student_temp, kernels)


@dataclass(frozen=True)
class _Block:
    """A few images.

    Attributes:
        student: slices of their student rows, one per crop.
        teacher: the matched teacher rows, each once.
        matches: for each crop the matches as indices into ``teacher``.
    """

    student: list[slice]
    teacher: Tensor
    matches: list[Tensor]

    @property
    def sizes(self) -> list[int]:
        """Number of rows in each crop."""
        return [len(group) for group in self.matches]

    @property
    def slices(self) -> list[slice]:
        """Slices of each crop's rows within the block."""
        ends = itertools.accumulate(self.sizes, initial=0)
        return [slice(start, stop) for start, stop in itertools.pairwise(ends)]


def _blocks(matches: Sequence[Tensor], images: int, rows: int) -> Iterator[_Block]:
    """Divide the images into blocks of at most ``rows`` student rows, or of one image."""
    counts = [len(group) // images for group in matches]
    step = max(1, rows // sum(counts))
    for first in range(0, images, step):
        last = min(images, first + step)
        student, matched, start = [], [], 0
        for n, group in zip(counts, matches, strict=True):
            student.append(slice(start + first * n, start + last * n))
            matched.append(group[first * n : last * n])
            start += len(group)
        teacher, index = torch.cat([group.flatten() for group in matched]).unique(return_inverse=True)
        parts = index.split([group.numel() for group in matched])
        yield _Block(student, teacher, [part.view_as(group) for part, group in zip(parts, matched, strict=True)])


def _distributions(teacher: Teacher, rows: Tensor, kernels: SoftmaxKernels) -> Tensor:
    """Return the teacher's distributions of the given rows, (r, K)."""
    out = teacher.center.new_empty(len(rows), teacher.center.shape[1])
    if isinstance(teacher.logits, Tensor):
        kernels.teacher_softmax(teacher.logits, rows, teacher.center, teacher.temp, out)
        return out
    for chunk, part in zip(rows.split(_TEACHER_ROWS), out.split(_TEACHER_ROWS), strict=True):
        kernels.teacher_softmax(teacher.logits[chunk], torch.arange(len(chunk)), teacher.center, teacher.temp, part)
    return out


class _DenseCrossEntropy(torch.autograd.Function):
    """Cross-entropy of stored logits, (R, K)."""

    @staticmethod
    def forward(
        ctx: Any,
        student: Tensor,
        teacher: Teacher,
        blocks: list[_Block],
        factors: Tensor,
        student_temp: float,
        kernels: SoftmaxKernels,
    ) -> Tensor:
        gradient = torch.empty_like(student) if ctx.needs_input_grad[0] else None
        values, scale = torch.empty_like(factors), factors / student_temp
        for block in blocks:
            targets = _distributions(teacher, block.teacher, kernels)
            kernels.soft_cross_entropy(
                student, block.student, block.matches, targets, student_temp, scale, values, gradient
            )
        ctx.save_for_backward(*([] if gradient is None else [gradient]))
        return factors.dot(values)

    @staticmethod
    def backward(ctx: Any, outer: Tensor) -> tuple[Tensor | None, ...]:
        return _times(ctx.saved_tensors[0], outer), None, None, None, None, None


class _LazyCrossEntropy(torch.autograd.Function):
    """Cross-entropy of the logits of embeddings (R, D) and prototypes (K, D)."""

    @staticmethod
    def forward(
        ctx: Any,
        embeddings: Tensor,
        weight: Tensor,
        teacher: Teacher,
        blocks: list[_Block],
        factors: Tensor,
        student_temp: float,
        kernels: SoftmaxKernels,
    ) -> Tensor:
        loss = torch.zeros((), dtype=teacher.center.dtype, device=embeddings.device)
        prototypes = weight.to(embeddings.dtype)
        needs_grad = any(ctx.needs_input_grad)
        if needs_grad:
            of_embeddings, of_weight = torch.zeros_like(embeddings), torch.zeros_like(weight)
        for block in blocks:
            targets = _distributions(teacher, block.teacher, kernels)
            own = torch.cat([embeddings[rows] for rows in block.student])  # (r, D)
            factor = torch.cat([factors[rows] for rows in block.student])  # (r,)
            tile, values = linear(own, prototypes), torch.empty_like(factor)  # (r, K): the logits, then their gradient
            kernels.soft_cross_entropy(
                tile, block.slices, block.matches, targets, student_temp, factor / student_temp, values, tile
            )
            loss += factor.dot(values)
            if needs_grad:
                if of_weight.dtype == tile.dtype:
                    of_weight.addmm_(tile.T, own)
                else:
                    _add_(of_weight, tile.T @ own)
                for rows, part in zip(block.student, linear(tile, prototypes.T).split(block.sizes), strict=True):
                    of_embeddings[rows] = part
            del tile, targets  # free the memory before the next block
        ctx.save_for_backward(*((of_embeddings, of_weight) if needs_grad else ()))
        return loss

    @staticmethod
    def backward(ctx: Any, outer: Tensor) -> tuple[Tensor | None, ...]:
        of_embeddings, of_weight = (_times(gradient, outer) for gradient in ctx.saved_tensors)
        return of_embeddings, of_weight, None, None, None, None, None


def _add_(total: Tensor, term: Tensor) -> None:
    """Add a matrix of another dtype in chunks, which are converted in the cache rather than as a whole."""
    for part, other in zip(total.split(WEIGHT_CHUNK_ROWS), term.split(WEIGHT_CHUNK_ROWS), strict=True):
        part += other


def _times(gradient: Tensor, outer: Tensor) -> Tensor:
    return gradient if outer == 1 else gradient * outer
