"""Select how a training computes the cross-entropy of the objective.

All implementations compute the formula of :mod:`esvit_core.losses.cross_entropy`. The strategy is selected once, when a
training is assembled; heads and objective get it, and nothing else depends on it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from esvit_core.kernels.fused_softmax import C_KERNELS, TORCH_KERNELS, select_softmax_kernels
from esvit_core.kernels.triton_support import triton_problem
from esvit_core.losses.blockwise import blockwise_cross_entropy
from esvit_core.losses.cross_entropy import Pairs, Teacher, chunked_cross_entropy, triton_cross_entropy
from esvit_core.models.lazy_logits import MIN_LAZY_PROTOTYPES, Logits


@dataclass(frozen=True)
class LossStrategy:
    """An implementation of the cross-entropy.

    Attributes:
        name: description for the log.
        form: short name for the metrics, one of a fixed set.
        lazy_logits: whether the heads return lazy logits.
        cross_entropy: ``(student_logits, teacher, pairs, student_temp)``: the weighted sum of the cross-entropies.
    """

    name: str
    form: str
    lazy_logits: bool
    cross_entropy: Callable[[Logits, Teacher, Pairs, float], Tensor]


CHUNKED = LossStrategy("softmax in torch", "torch", False, chunked_cross_entropy)
TRITON = LossStrategy("fused Triton kernels", "triton", False, triton_cross_entropy)
BLOCKWISE = {
    kernels: LossStrategy(
        f"lazy logits, fused softmax in {kernels.name}",
        f"lazy-{kernels.name.lower()}",
        True,
        functools.partial(blockwise_cross_entropy, kernels=kernels),
    )
    for kernels in (C_KERNELS, TORCH_KERNELS)
}


def select_strategy(device: torch.device, prototypes: int) -> LossStrategy:
    """Select the fastest strategy for a device and a number of prototypes K."""
    if device.type == "cpu" and prototypes >= MIN_LAZY_PROTOTYPES:
        return BLOCKWISE[select_softmax_kernels()]
    if device.type == "cuda":
        problem = triton_problem(device)
        return replace(CHUNKED, name=f"{CHUNKED.name}, because {problem}") if problem else TRITON
    return CHUNKED
