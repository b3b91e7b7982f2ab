"""Cheap intermediates that the backward pass computes again instead of keeping them.

A layer norm or a GELU is a hundredth of the linear layer behind it, but its output is what that layer keeps for its
backward pass: in Swin a third of all that is kept. Recomputed, the values are the same bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from esvit_core.torch_private import hooks_on_saved_tensors, storage_key


def without_keeping(function: Callable[[Tensor], Tensor], x: Tensor, then: Callable[[Tensor], Tensor]) -> Tensor:
    """``then(function(x))``, where the backward pass of ``then`` computes ``function(x)`` once more.

    Args:
        function: of ``x`` alone, and always the same: a norm, an activation. It must keep ``x`` for its own backward
            pass, or ``x`` must be kept anyway, for else nothing is gained.
        x: its argument.
        then: a layer, or several.
    """
    y = function(x)
    # Under hooks that are set already, those of a block that is recomputed as a whole, nothing is kept anyway.
    if not y.requires_grad or torch.compiler.is_compiling() or hooks_on_saved_tensors():
        return then(y)
    storage, size = storage_key(y), y.numel()
    # `detach`: what is packed must not lead back to the graph that holds it.
    argument = x.detach()

    def pack(kept: Tensor) -> Any:
        # The same values in the same order: the output itself, or a contiguous view of it as rows.
        if storage_key(kept) == storage and kept.numel() == size and kept.is_contiguous():
            return kept.shape
        return kept

    def unpack(packed: Any) -> Tensor:
        if isinstance(packed, Tensor):
            return packed
        with torch.no_grad():
            return function(argument).view(packed)

    with saved_tensors_hooks(pack, unpack):
        return then(y)
