"""Selective activation checkpointing: recompute cheap activations in the backward pass instead of saving them.

A layer norm or a GELU costs a hundredth of the linear layer that follows it, but that layer saves its output for the
backward pass: a third of all saved activations in Swin. The recomputed values are the same bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from esvit_core.torch_private import hooks_on_saved_tensors, storage_key


def checkpoint_activation(function: Callable[[Tensor], Tensor], x: Tensor, then: Callable[[Tensor], Tensor]) -> Tensor:
    """Compute ``then(function(x))``; the backward pass of ``then`` recomputes ``function(x)``.

    Args:
        function: deterministic function of ``x`` alone, such as a norm or an activation. Memory is only saved if ``x``
            itself is saved for the backward pass, by ``function`` or by another layer.
        x: argument of ``function``.
        then: one or more layers, of which the first is a linear one.
    """
    if (dtype := _autocast_dtype(x.device)) is not None:
        activation = function
        # Autocast would cast the float32 output of a norm within `then`, and save that copy, which is not y.
        function = lambda t: activation(t).to(dtype)  # noqa: E731
    y = function(x)
    # If hooks are set already, the whole block is checkpointed and saves nothing.
    if not y.requires_grad or torch.compiler.is_compiling() or hooks_on_saved_tensors():
        return then(y)
    storage, size = storage_key(y), y.numel()
    # `detach`: the packed value must not reference the graph that holds it.
    argument = x.detach()

    def pack(saved: Tensor) -> Any:
        # The same values in the same order: y itself, or a contiguous view of it as rows.
        if storage_key(saved) == storage and saved.numel() == size and saved.is_contiguous():
            return saved.shape
        return saved

    def unpack(packed: Any) -> Tensor:
        if isinstance(packed, Tensor):
            return packed
        autocast = torch.autocast(argument.device.type, dtype) if dtype is not None else nullcontext()
        with torch.no_grad(), autocast:
            return function(argument).view(packed)

    with saved_tensors_hooks(pack, unpack):
        return then(y)


def _autocast_dtype(device: torch.device) -> torch.dtype | None:
    """Return the dtype to which autocast casts the input of a linear layer on a GPU; None on a CPU or without autocast.

    On a CPU the kernels of the following layers are chosen by the dtype of their input.
    """
    if device.type == "cpu" or not torch.is_autocast_enabled(device.type):
        return None
    return torch.get_autocast_dtype(device.type)
