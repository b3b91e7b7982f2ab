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


def without_keeping(function: Callable[[Tensor], Tensor], x: Tensor, then: Callable[[Tensor], Tensor]) -> Tensor:
    """``then(function(x))``, where the backward pass of ``then`` computes ``function(x)`` once more.

    Args:
        function: of ``x`` alone, and always the same: a norm, an activation. It must keep ``x`` for its own backward
            pass, or ``x`` must be kept anyway, for else nothing is gained.
        x: its argument.
        then: a layer, or several.
    """
    y = function(x)
    if not y.requires_grad or torch.compiler.is_compiling() or _others_decide():
        return then(y)
    storage, size = y.untyped_storage()._cdata, y.numel()
    # `detach`: what is packed must not lead back to the graph that holds it.
    argument = x.detach()

    def pack(kept: Tensor) -> Any:
        # The same values in the same order: the output itself, or a contiguous view of it as rows.
        if kept.untyped_storage()._cdata == storage and kept.numel() == size and kept.is_contiguous():
            return kept.shape
        return kept

    def unpack(packed: Any) -> Tensor:
        if isinstance(packed, Tensor):
            return packed
        with torch.no_grad():
            return function(argument).view(packed)

    with saved_tensors_hooks(pack, unpack):
        return then(y)


def _others_decide() -> bool:
    """Whether hooks are set already on what is kept: those of a block that is recomputed as a whole keep nothing."""
    return torch._C._autograd._top_saved_tensors_default_hooks(False) is not None
