"""The matched cross-entropy of many prototypes, image by image, so that nothing of (all rows x K) is stored.

The regions of an image are compared with each other only. So the teacher's distributions of a few images are made,
of the rows that match one of the student's, compared with the student's logits of the same images, and forgotten;
the softmax serves loss and gradient at once. Where the logits are themselves a product
(:class:`~esvit_core.models.lazy_logits.LazyLogits`) they are made and forgotten likewise, and their gradient,
before it is, goes into those of embeddings and prototypes.

The formula is in :mod:`esvit_core.losses.cross_entropy`; with ``t`` the mean of the teacher rows matched to row ``r``,

    loss_r = w_r Q (logsumexp(z_r) - t . z_r)        z_r = s_r / tau        dloss_r / dz_r = w_r Q (softmax(z_r) - t)

Its two passes over rows, sharpening the teacher's and comparing the student's, are in :mod:`esvit_core.kernels.fused_softmax`.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from esvit_core.kernels.fused_softmax import soft_cross_entropy, teacher_softmax
from esvit_core.kernels.onednn_linear import linear
from esvit_core.models.lazy_logits import WEIGHT_ROWS, LazyLogits

Logits = Tensor | LazyLogits

# Rows of the student that are worked off at a time, at least those of one image.
_ROWS_OF_TENSORS = 256
_TEACHER_ROWS = 256  # rows of lazy teacher logits per product: the product of fewer takes as long
ROWS_OF_PRODUCTS = 512  # each time the prototypes are read and their whole gradient is added to


@dataclass(frozen=True)
class Teacher:
    """What the student is compared with.

    Attributes:
        logits: (2 * B * T, K), crop by crop, image by image.
        center: (1, K).
        temp: tau_t.
    """

    logits: Logits
    center: Tensor
    temp: float

    def distributions(self, rows: Tensor) -> Tensor:
        """Of the given rows, (their number, K)."""
        out = self.center.new_empty(len(rows), self.center.shape[1])
        if isinstance(self.logits, Tensor):
            teacher_softmax(self.logits, rows, self.center, self.temp, out)
            return out
        for chunk, part in zip(rows.split(_TEACHER_ROWS), out.split(_TEACHER_ROWS), strict=True):
            teacher_softmax(self.logits[chunk], torch.arange(len(chunk)), self.center, self.temp, part)
        return out


def blockwise_cross_entropy(
    student: Logits, teacher: Teacher, matches: Sequence[Tensor], weights: Tensor, student_temp: float, images: int
) -> Tensor:
    """Weighted sum of the cross-entropies of all matched rows.

    Args:
        student: (R, K), crop by crop, image by image.
        teacher: of the same images.
        matches: for each crop the teacher rows of its rows, (rows of the crop, Q of the crop), of the same image.
        weights: factor of each student row, (R,).
        student_temp: temperature of the student.
        images: B.

    Returns:
        Scalar.
    """
    of_crops = weights.split([len(group) for group in matches])
    factors = torch.cat([group.shape[1] * part for group, part in zip(matches, of_crops, strict=True)])
    if isinstance(student, LazyLogits):
        blocks = list(_blocks(matches, images, ROWS_OF_PRODUCTS))
        return _OfProducts.apply(student.embeddings, student.weight, teacher, blocks, factors, student_temp)
    blocks = list(_blocks(matches, images, _ROWS_OF_TENSORS))
    return _OfTensors.apply(student, teacher, blocks, factors, student_temp)


@dataclass(frozen=True)
class _Block:
    """A few images.

    Attributes:
        student: their rows, crop by crop.
        teacher: the rows of it that match one of these, each once.
        matches: for each crop which of those, by their place in ``teacher``.
    """

    student: list[slice]
    teacher: Tensor
    matches: list[Tensor]

    @property
    def sizes(self) -> list[int]:
        """How many rows of each crop."""
        return [len(group) for group in self.matches]

    @property
    def places(self) -> list[slice]:
        """Where these rows are among those of the block."""
        ends = itertools.accumulate(self.sizes, initial=0)
        return [slice(start, stop) for start, stop in itertools.pairwise(ends)]


def _blocks(matches: Sequence[Tensor], images: int, most: int) -> Iterator[_Block]:
    counts = [len(group) // images for group in matches]
    step = max(1, most // sum(counts))
    for first in range(0, images, step):
        last = min(images, first + step)
        student, matched, start = [], [], 0
        for n, group in zip(counts, matches, strict=True):
            student.append(slice(start + first * n, start + last * n))
            matched.append(group[first * n : last * n])
            start += len(group)
        teacher, places = torch.cat([group.flatten() for group in matched]).unique(return_inverse=True)
        parts = places.split([group.numel() for group in matched])
        yield _Block(student, teacher, [part.view_as(group) for part, group in zip(parts, matched, strict=True)])


class _OfTensors(torch.autograd.Function):
    """Logits that are there, (R, K)."""

    @staticmethod
    def forward(
        ctx: Any, student: Tensor, teacher: Teacher, blocks: list[_Block], factors: Tensor, student_temp: float
    ) -> Tensor:
        gradient = torch.empty_like(student) if ctx.needs_input_grad[0] else None
        values, scale = torch.empty_like(factors), factors / student_temp
        for block in blocks:
            targets = teacher.distributions(block.teacher)
            soft_cross_entropy(student, block.student, block.matches, targets, student_temp, scale, values, gradient)
        ctx.save_for_backward(*([] if gradient is None else [gradient]))
        return factors.dot(values)

    @staticmethod
    def backward(ctx: Any, outer: Tensor) -> tuple[Tensor | None, ...]:
        return _times(ctx.saved_tensors[0], outer), None, None, None, None


class _OfProducts(torch.autograd.Function):
    """Logits of embeddings (R, D) and prototypes (K, D)."""

    @staticmethod
    def forward(
        ctx: Any,
        embeddings: Tensor,
        weight: Tensor,
        teacher: Teacher,
        blocks: list[_Block],
        factors: Tensor,
        student_temp: float,
    ) -> Tensor:
        loss = torch.zeros((), dtype=teacher.center.dtype, device=embeddings.device)
        prototypes = weight.to(embeddings.dtype)
        wanted = any(ctx.needs_input_grad)
        if wanted:
            of_embeddings, of_weight = torch.zeros_like(embeddings), torch.zeros_like(weight)
        for block in blocks:
            targets = teacher.distributions(block.teacher)
            own = torch.cat([embeddings[rows] for rows in block.student])  # (r, D)
            factor = torch.cat([factors[rows] for rows in block.student])  # (r,)
            tile, values = linear(own, prototypes), torch.empty_like(factor)  # (r, K): the logits, then their gradient
            soft_cross_entropy(
                tile, block.places, block.matches, targets, student_temp, factor / student_temp, values, tile
            )
            loss += factor.dot(values)
            if wanted:
                if of_weight.dtype == tile.dtype:
                    of_weight.addmm_(tile.T, own)
                else:
                    _add_(of_weight, tile.T @ own)
                for rows, part in zip(block.student, linear(tile, prototypes.T).split(block.sizes), strict=True):
                    of_embeddings[rows] = part
            del tile, targets  # before the next are made
        ctx.save_for_backward(*((of_embeddings, of_weight) if wanted else ()))
        return loss

    @staticmethod
    def backward(ctx: Any, outer: Tensor) -> tuple[Tensor | None, ...]:
        of_embeddings, of_weight = (_times(gradient, outer) for gradient in ctx.saved_tensors)
        return of_embeddings, of_weight, None, None, None, None


def _add_(total: Tensor, term: Tensor) -> None:
    """Add a matrix in another dtype, converted while in the cache rather than as a whole."""
    for part, other in zip(total.split(WEIGHT_ROWS), term.split(WEIGHT_ROWS), strict=True):
        part += other


def _times(gradient: Tensor, outer: Tensor) -> Tensor:
    return gradient if outer == 1 else gradient * outer
