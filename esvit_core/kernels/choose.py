"""Select the fastest implementations of a network's layers for its device.

A newly created network uses plain torch operations, which match the published code bit for bit in float32 where
possible. Training and feature extraction select faster kernels that compute the same formulas.
"""

from __future__ import annotations

import torch
from torch import nn

from esvit_core.kernels.onednn_linear import Linear, linear
from esvit_core.kernels.replace_linear import replace_linear_layers_
from esvit_core.kernels.triton_support import triton_problem
from esvit_core.models import cvt
from esvit_core.models.layers.stochastic_depth import StochasticDepth
from esvit_core.models.layers.windows import WindowAttention
from esvit_core.models.multicrop import MultiCropNetwork
from esvit_core.models.swin import SwinTransformer


def select_kernels_(network: nn.Module, dtype: torch.dtype, device: torch.device) -> None:
    """Select the fastest kernels for the layers of ``network``, in place.

    Args:
        network: any network; the attention layers of timm are controlled by their ``fused_attn``.
        dtype: precision of the network.
        device: device of the network.
    """
    if device.type == "cuda":
        # cuDNN's attention with a bias has given wrong gradients (pytorch/pytorch#196678); torch has other kernels.
        torch.backends.cuda.enable_cudnn_sdp(False)
    if device.type == "cuda" and dtype != torch.float32 and not triton_problem(device):
        select_triton_kernels_(network)
    if device.type != "cpu":
        return
    if dtype == torch.float32:
        replace_linear_layers_(network, Linear)
    for module in network.modules():
        if isinstance(module, WindowAttention | cvt.Attention):
            module.use_c_kernel = True
        if isinstance(module, cvt.FeedForward):
            module.fold_activation = True
        if isinstance(module, StochasticDepth):
            module.skip_dropped = True
        if dtype == torch.float32 and isinstance(module, cvt.PointwiseConv):
            module.linear = linear
        if dtype == torch.bfloat16 and isinstance(getattr(module, "fused_attn", None), bool):
            setattr(module, "fused_attn", False)  # noqa: B010  mypy assumes that attributes of modules are tensors


def select_triton_kernels_(network: nn.Module) -> None:
    """Select the Triton kernels for a training in half precision on a GPU, in place."""
    from esvit_core.kernels import large_window_attention_triton, window_attention_triton
    from esvit_core.models.packed_swin import views_and_regions_of_sizes

    if isinstance(network, MultiCropNetwork) and isinstance(network.backbone, SwinTransformer):
        network.passes = views_and_regions_of_sizes
    for module in network.modules():
        if isinstance(module, WindowAttention):
            small = module.window_size <= window_attention_triton.MAX_WINDOW
            module.triton_kernel = window_attention_triton if small else large_window_attention_triton
