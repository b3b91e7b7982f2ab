"""Whether Triton can compile and run kernels on this machine."""

from __future__ import annotations

import functools
import importlib.util
import os
import shutil
from typing import Any

import torch
from torch import Tensor

from esvit_core.torch_private import deregister_triton_kernels

LONGEST_REASON = 200  # characters


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **constants: Any) -> None:
    """Launch a kernel; under a mode of fake tensors, which have shapes and no values, do nothing.

    The first argument is a tensor that is no parameter.
    """
    if type(arguments[0]) is Tensor:
        kernel[grid](*arguments, **constants)


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
    teacher, center, weights = torch.zeros(1, 2), torch.zeros(1, 2), torch.ones(1)
    match = torch.zeros(1, 1, dtype=torch.long)
    others = [t.to(device) for t in (teacher, center, weights, match)]
    MatchedCrossEntropyTriton.apply(student, others[0], others[1], (1.0, 1.0), *others[2:]).backward()
