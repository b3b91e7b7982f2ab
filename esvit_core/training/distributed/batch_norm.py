"""Batch norms with statistics over the global batch.

The published code synchronizes every batch norm in student and teacher: those of ResNet-50, and those of the heads with
``head.batch_norm``. PyTorch's ``SyncBatchNorm`` works on GPUs only; :class:`CpuSyncBatchNorm` replaces it on CPUs.
"""

from __future__ import annotations

import torch
import torch.distributed.nn.functional as differentiable
import torch.nn.functional as F
from timm.layers import convert_sync_batchnorm
from torch import Tensor, nn

from esvit_core.collectives import collective
from esvit_core.training.distributed.processes import World

BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


def synchronize_batch_norms_(network: nn.Module, world: World) -> None:
    """Make every batch norm in ``network`` use the global batch; parameters and their names do not change."""
    if world.size == 1:
        return
    if world.device.type == "cuda":
        convert_sync_batchnorm(network)
        return
    for module in list(network.modules()):
        for name, child in module.named_children():
            if isinstance(child, BATCH_NORMS):
                setattr(module, name, CpuSyncBatchNorm(child))


class CpuSyncBatchNorm(nn.BatchNorm1d):
    """A batch norm over the batches of all processes, on CPUs.

    Args:
        norm: batch norm to replace; its parameters, statistics and (in timm's networks) activation are taken over.
    """

    def __init__(self, norm: nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d | nn.SyncBatchNorm) -> None:
        super().__init__(norm.num_features, norm.eps, norm.momentum, norm.affine, norm.track_running_stats)
        self._parameters.update(norm._parameters)
        self._buffers.update(norm._buffers)
        self._modules.update(norm._modules)
        self.train(norm.training)

    def forward(self, x: Tensor) -> Tensor:
        """Normalize (B, C, ...) over all dimensions but the channels."""
        if self.training:
            with torch.autocast(x.device.type, enabled=False):
                y = self._normalize(x.to(torch.promote_types(x.dtype, torch.float32))).to(x.dtype)
        else:
            y = F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps)
        for module in self.children():  # timm's norms end with dropout and an activation
            y = module(y)
        return y

    def _normalize(self, x: Tensor) -> Tensor:
        channel = (1, -1, *[1] * (x.ndim - 2))
        dims = [0, *range(2, x.ndim)]
        count = x.new_tensor([x.numel() / x.shape[1]])
        with collective():
            sums = differentiable.all_reduce(torch.cat((x.sum(dims), count)))  # (C + 1,)
        rows = sums[-1].detach()
        mean = sums[:-1] / rows
        centered = x - mean.view(channel)
        with collective():
            variance = differentiable.all_reduce(centered.square().sum(dims)) / rows
        with torch.no_grad():
            self.num_batches_tracked.add_(1)  # type: ignore[union-attr]
            self.running_mean.lerp_(mean, self.momentum)  # type: ignore[union-attr, arg-type]
            self.running_var.lerp_(variance * (rows / (rows - 1)), self.momentum)  # type: ignore[union-attr, arg-type]
        scale = self.weight * (variance + self.eps).rsqrt()
        return centered * scale.view(channel) + self.bias.view(channel)
