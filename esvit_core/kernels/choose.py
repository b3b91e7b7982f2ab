"""Forms of a network's layers that compute the same and are the fastest where it runs.

A network that was only built computes in torch's own operations, as published bit for bit in float32 where ours can; one
that is trained, or used for features, in these.
"""

from __future__ import annotations

import torch
from torch import nn

from esvit_core.kernels.onednn_linear import Linear, linear
from esvit_core.models import cvt
from esvit_core.models.layers.stochastic_depth import StochasticDepth
from esvit_core.models.layers.windows import WindowAttention


def choose_fastest_(network: nn.Module, dtype: torch.dtype, device: torch.device) -> None:
    """Have the layers of ``network`` compute in the fastest form.

    Args:
        network: any; the attention layers of timm say by ``fused_attn`` how they compute.
        dtype: of its arithmetic.
        device: where it is.
    """
    if device.type != "cpu":
        return
    if dtype == torch.float32:
        _replace_linear_layers_(network)
    for module in network.modules():
        if isinstance(module, WindowAttention | cvt.Attention):
            module.compiled = True
        if isinstance(module, cvt.FeedForward):
            module.folded = True
        if isinstance(module, StochasticDepth):
            module.sparing = True
        if dtype == torch.float32 and isinstance(module, cvt.PointwiseConv):
            module.product = linear
        if dtype == torch.bfloat16 and isinstance(getattr(module, "fused_attn", None), bool):
            setattr(module, "fused_attn", False)  # noqa: B010  mypy takes attributes of modules for tensors


def _replace_linear_layers_(network: nn.Module) -> None:
    """Put a :class:`Linear` with the same parameters in the place of every ``nn.Linear`` below ``network``."""
    replaced: dict[nn.Module, Linear] = {}  # one that has several places stays one
    for parent in list(network.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is nn.Linear:
                if child not in replaced:
                    replaced[child] = Linear.of(child)
                setattr(parent, name, replaced[child])
