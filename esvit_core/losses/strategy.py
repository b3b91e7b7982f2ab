"""Select how a training computes the cross-entropy of the objective.

All implementations compute the formula of :mod:`esvit_core.losses.cross_entropy`. The strategy is selected once, when a
training is assembled; heads and objective get it, and nothing else depends on it.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from esvit_core.kernels.fused_softmax import C_KERNELS, TORCH_KERNELS, select_softmax_kernels
from esvit_core.losses.blockwise import blockwise_cross_entropy
from esvit_core.losses.cross_entropy import Pairs, Teacher, chunked_cross_entropy, triton_cross_entropy
from esvit_core.models.lazy_logits import MIN_LAZY_PROTOTYPES, Logits
from esvit_core.torch_private import deregister_triton_kernels

LONGEST_REASON = 200  # characters


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


@functools.cache
def triton_problem(device: torch.device) -> str:
    """Return why Triton's kernels cannot run on ``device``, as part of a line; "" if they can.

    Triton compiles its driver interface from C at its first kernel. A container image may have no compiler, or one
    without Python's headers, so the kernels are tried with two prototypes. If they fail, torch's own kernels in Triton
    are replaced too, because they would raise in the first step.
    """
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    if not (os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")):
        return "Triton needs a C compiler and found none"
    try:
        _try_kernels(device)
    except Exception as error:  # of the compiler, the linker, the driver or Triton
        deregister_triton_kernels()
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        return f"Triton cannot compile its kernels ({reason[:LONGEST_REASON]})"
    return ""


def _try_kernels(device: torch.device) -> None:
    from esvit_core.kernels.cross_entropy_triton import MatchedCrossEntropyTriton

    student = torch.zeros(1, 2, device=device, requires_grad=True)
    teacher, weights = torch.full((1, 2), 0.5, device=device), torch.ones(1, device=device)
    match = torch.zeros(1, 1, dtype=torch.long, device=device)
    MatchedCrossEntropyTriton.apply(student, teacher, weights, 1.0, match).backward()
