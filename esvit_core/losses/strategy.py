"""Select how a training computes the cross-entropy of the objective.

All implementations compute the formula of :mod:`esvit_core.losses.cross_entropy`. The strategy is selected once, when a
training is assembled; heads and objective get it, and nothing else depends on it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from esvit_core.config import Config
from esvit_core.kernels.fused_softmax import C_KERNELS, TORCH_KERNELS, select_softmax_kernels
from esvit_core.kernels.triton_support import triton_problem
from esvit_core.losses.blockwise import blockwise_cross_entropy
from esvit_core.losses.cross_entropy import Pairs, Teacher, chunked_cross_entropy, triton_cross_entropy
from esvit_core.losses.lazy_triton import lazy_triton_cross_entropy
from esvit_core.models.lazy_logits import Logits, lazy_on_cpu

LAZY_SHARE = 0.1  # of a GPU's memory; stored logits of more than that are computed lazily


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
LAZY_TRITON = LossStrategy("lazy logits, fused Triton kernels", "lazy-triton", True, lazy_triton_cross_entropy)
BLOCKWISE = {
    kernels: LossStrategy(
        f"lazy logits, fused softmax in {kernels.name}",
        f"lazy-{kernels.name.lower()}",
        True,
        functools.partial(blockwise_cross_entropy, kernels=kernels),
    )
    for kernels in (C_KERNELS, TORCH_KERNELS)
}


def select_strategy(
    device: torch.device, prototypes: int, lazy: bool | Literal["auto"] = "auto", stored_bytes: float = 0
) -> LossStrategy:
    """Select the fastest strategy for a device and a number of prototypes K.

    Args:
        device: of the training.
        prototypes: K.
        lazy: ``training.lazy_logits``.
        stored_bytes: size of the logits of a micro-batch, see :func:`logit_bytes`; only for ``auto`` on a GPU.
    """
    if device.type == "cpu" and lazy_on_cpu(lazy, prototypes):
        return BLOCKWISE[select_softmax_kernels()]
    if device.type == "cuda":
        problem = triton_problem(device)
        if problem:
            return replace(CHUNKED, name=f"{CHUNKED.name}, because {problem}")
        memory = torch.cuda.get_device_properties(device).total_memory if lazy == "auto" else 0
        return LAZY_TRITON if wants_lazy_logits(lazy, stored_bytes, memory) else TRITON
    return CHUNKED


def wants_lazy_logits(lazy: bool | Literal["auto"], stored_bytes: float, memory: float) -> bool:
    """Return whether a GPU with so many bytes of memory computes the logits lazily."""
    return stored_bytes > LAZY_SHARE * memory if lazy == "auto" else lazy


def logit_bytes(config: Config, backbone: Any, images: int, dtype: torch.dtype) -> float:
    """Estimate the size of the stored logits of ``images`` images: the student's, their gradient, and the teacher's.

    Args:
        config: of the run.
        backbone: tells by how much it reduces an image; if it does not, 16 is assumed.
        images: of a micro-batch.
        dtype: of the logits.
    """
    try:
        reduction = int(backbone.feature_info[-1]["reduction"])
    except (AttributeError, IndexError, KeyError, TypeError):
        reduction = 16
    kinds = (config.augment.global_crops, *config.augment.local_kinds)
    regions = [(kind.size // reduction) ** 2 for kind in kinds for _ in range(kind.number)]
    rows = [1 + count * config.objective.region for count in regions]
    return float(images) * config.head.out_dim * dtype.itemsize * (2 * sum(rows) + sum(rows[:2]))
