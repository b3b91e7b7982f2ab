"""Multiply many tensors on a GPU, each by its own factor, in one kernel.

torch's ``_foreach_mul_`` with a list of factors launches one kernel for each tensor.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 4096  # elements that a program processes at a time
_PROGRAMS = 64  # for each tensor, at most


@triton.jit
def _multiply_kernel(pointers, sizes, factors, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    number = tl.program_id(0)
    values = tl.load(pointers + number).to(tl.pointer_type(tl.float32))
    size = tl.load(sizes + number)
    factor = tl.load(factors + number)
    start = tl.program_id(1).to(tl.int64) * BLOCK
    while start < size:
        elements = start + tl.arange(0, BLOCK)
        inside = elements < size
        tl.store(values + elements, tl.load(values + elements, mask=inside) * factor, mask=inside)
        start += tl.num_programs(1) * BLOCK


def multiply_each_(tensors: Sequence[Tensor], factors: Tensor) -> None:
    """Multiply each tensor by its factor, in place.

    Args:
        tensors: dense float32 tensors on one device.
        factors: (number of tensors,), float32.
    """
    facts = [[t.data_ptr() for t in tensors], [t.numel() for t in tensors]]
    host = torch.tensor(facts, dtype=torch.int64, pin_memory=factors.is_cuda)
    pointers, sizes = host.to(factors.device, non_blocking=True).unbind()
    largest = max(facts[1])
    grid = (len(tensors), min(_PROGRAMS, triton.cdiv(largest, _BLOCK)))
    _multiply_kernel[grid](pointers, sizes, factors, BLOCK=_BLOCK)
