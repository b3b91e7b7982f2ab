"""The matched cross-entropy of many prototypes, picture by picture, so that nothing of (all rows x K) is stored.

The regions of a picture are compared with each other only. So the teacher's distributions of a few pictures are made,
of the rows that match one of the student's, compared with the student's logits of the same pictures, and forgotten;
the softmax serves loss and gradient at once. Where the logits are themselves a product
(:class:`~esvit_core.models.prototype_logits.PrototypeLogits`) they are made and forgotten likewise, and their gradient,
before it is, goes into those of embeddings and prototypes.

The formula is in :mod:`esvit_core.losses.cross_entropy`; with ``t`` the mean of the teacher rows matched to row ``r``,

    loss_r = w_r Q (logsumexp(z_r) - t . z_r)        z_r = s_r / tau        dloss_r / dz_r = w_r Q (softmax(z_r) - t)
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from esvit_core.losses.cross_entropy import rows_per_chunk, softmax_and_log_sum, teacher_distribution
from esvit_core.models.prototype_logits import PrototypeLogits

Logits = Tensor | PrototypeLogits

_ROWS_PER_BLOCK = 256  # of the student, at least one picture: enough for the matrix products to be efficient
_CHUNK_VALUES = 1 << 19  # 2 MB of float32: few enough for the caches, and enough to be shared by a few threads


@dataclass(frozen=True)
class Teacher:
    """What the student is compared with.

    Attributes:
        logits: (2 * B * T, K), crop by crop, picture by picture.
        centre: (1, K).
        temp: tau_t.
    """

    logits: Logits
    centre: Tensor
    temp: float

    def distributions(self, rows: Tensor) -> Tensor:
        """Of the given rows, (their number, K)."""
        out, step = self.centre.new_empty(len(rows), self.centre.shape[1]), rows_per_chunk(self.logits)
        for chunk, part in zip(rows.split(step), out.split(step), strict=True):
            teacher_distribution(self.logits[chunk], self.centre, self.temp, part)
        return out


def cross_entropy_by_picture(
    student: Logits, teacher: Teacher, matches: Sequence[Tensor], weights: Tensor, student_temp: float, pictures: int
) -> Tensor:
    """Weighted sum of the cross-entropies of all matched rows.

    Args:
        student: (R, K), crop by crop, picture by picture.
        teacher: of the same pictures.
        matches: for each crop the teacher rows of its rows, (rows of the crop, Q of the crop), of the same picture.
        weights: factor of each student row, (R,).
        student_temp: temperature of the student.
        pictures: B.

    Returns:
        Scalar.
    """
    blocks = list(_blocks(matches, pictures))
    if isinstance(student, PrototypeLogits):
        return _OfProducts.apply(student.embeddings, student.weight, teacher, blocks, weights, student_temp)
    return _OfTensors.apply(student, teacher, blocks, weights, student_temp)


@dataclass(frozen=True)
class _Block:
    """A few pictures.

    Attributes:
        student: their rows, crop by crop.
        teacher: the rows of it that match one of these, each once.
        matches: for each crop which of those, by their place in ``teacher``.
    """

    student: list[slice]
    teacher: Tensor
    matches: list[Tensor]


def _blocks(matches: Sequence[Tensor], pictures: int) -> Iterator[_Block]:
    counts = [len(group) // pictures for group in matches]
    step = max(1, _ROWS_PER_BLOCK // sum(counts))
    for first in range(0, pictures, step):
        last = min(pictures, first + step)
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
        ctx: Any, student: Tensor, teacher: Teacher, blocks: list[_Block], weights: Tensor, student_temp: float
    ) -> Tensor:
        loss = torch.zeros((), dtype=teacher.centre.dtype, device=student.device)
        gradient = torch.empty_like(student) if ctx.needs_input_grad[0] else None
        for block in blocks:
            targets = teacher.distributions(block.teacher)
            for crop, matches in zip(block.student, block.matches, strict=True):
                step = _rows_per_chunk(student)
                Q, start = matches.shape[1], crop.start
                for matched in matches.split(step):
                    rows = slice(start, start + len(matched))
                    z = student[rows].to(targets.dtype) * (1 / student_temp)  # (r, K)
                    p, target, value = _compare(z, targets, matched)
                    loss += Q * weights[rows].dot(value)
                    if gradient is not None:
                        torch.mul(p.sub_(target), weights[rows, None] * (Q / student_temp), out=gradient[rows])
                    start += len(matched)
        ctx.save_for_backward(*([] if gradient is None else [gradient]))
        return loss

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
        weights: Tensor,
        student_temp: float,
    ) -> Tensor:
        loss = torch.zeros((), dtype=teacher.centre.dtype, device=embeddings.device)
        prototypes = weight.to(embeddings.dtype)
        wanted = any(ctx.needs_input_grad)
        if wanted:
            of_embeddings, of_weight = torch.zeros_like(embeddings), torch.zeros_like(weight)
        for block in blocks:
            targets = teacher.distributions(block.teacher)
            own = torch.cat([embeddings[s] for s in block.student])  # (r, D)
            tile = (own * (1 / student_temp)) @ prototypes.T  # (r, K): the logits, then their gradient
            factors, start = [], 0
            for crop, matches in zip(block.student, block.matches, strict=True):
                Q, step = matches.shape[1], _rows_per_chunk(tile)
                factors.append(weights[crop, None] * Q)
                for matched, factor in zip(matches.split(step), factors[-1].split(step), strict=True):
                    chunk = tile[start : start + len(matched)]
                    p, target, value = _compare(chunk.to(targets.dtype), targets, matched)
                    loss += factor[:, 0].dot(value)
                    torch.sub(p, target, out=chunk)
                    start += len(matched)
            if wanted:
                scale = torch.cat(factors) * (1 / student_temp)  # (r, 1), on the narrow side of both products
                scaled = (own * scale).to(own.dtype)
                if of_weight.dtype == tile.dtype:
                    of_weight.addmm_(tile.T, scaled)
                else:
                    of_weight += tile.T @ scaled
                of_own = (tile @ prototypes).mul_(scale).split([s.stop - s.start for s in block.student])
                for crop, part in zip(block.student, of_own, strict=True):
                    of_embeddings[crop] = part
            del tile, targets  # before the next are made
        ctx.save_for_backward(*((of_embeddings, of_weight) if wanted else ()))
        return loss

    @staticmethod
    def backward(ctx: Any, outer: Tensor) -> tuple[Tensor | None, ...]:
        of_embeddings, of_weight = (_times(gradient, outer) for gradient in ctx.saved_tensors)
        return of_embeddings, of_weight, None, None, None, None


def _compare(z: Tensor, targets: Tensor, matched: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of logits (r, K) over the temperature: softmax (r, K), mean matched target (r, K), their cross-entropy (r,)."""
    p, lse = softmax_and_log_sum(z)
    if matched.shape[1] == 1:
        target = targets.index_select(0, matched[:, 0])
    else:
        target = F.embedding_bag(matched, targets, mode="mean")
    return p, target, lse - torch.linalg.vecdot(z, target)


def _rows_per_chunk(logits: Tensor) -> int:
    return max(1, _CHUNK_VALUES // logits.shape[1])


def _times(gradient: Tensor, outer: Tensor) -> Tensor:
    return gradient if outer == 1 else gradient * outer
