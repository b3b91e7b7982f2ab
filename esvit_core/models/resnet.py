"""ResNets as torchvision defines them (He et al., 2016), with the regions of their last feature map.

The network is timm's, which has torchvision's weight names and numerics; its initialization is torchvision's.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from timm.models import generate_default_cfgs
from timm.models.resnet import BasicBlock, Bottleneck
from timm.models.resnet import ResNet as TimmResNet
from torch import Tensor, nn

from esvit_core.models.timm_entrypoints import default_cfg, register


class ResNet(TimmResNet):
    """Residual network; regions are the positions of the last feature map, the view feature is their mean.

    Args:
        num_classes: outputs of the classifier; 0: no classifier, the forward pass returns the view feature.
        img_size: accepted for the interface; the network takes any resolution.
        drop_path_rate: accepted for the interface; the published ResNet has no stochastic depth.
        kwargs: arguments of timm's ``ResNet``.
    """

    def __init__(
        self,
        num_classes: int = 0,
        img_size: int | tuple[int, int] = 224,
        drop_path_rate: float = 0.0,
        **kwargs: Any,
    ) -> None:
        super().__init__(num_classes=num_classes, zero_init_last=False, **kwargs)

    def views_and_regions(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return view features (B, D) and regions (B, N, D)."""
        regions = self.forward_features(x).flatten(2).mT  # (B, N, D)
        return regions.mean(1), regions

    def last_blocks(self, x: Tensor, n: int = 4) -> Tensor:
        """Return the linear-probe feature: the averages of the last ``n`` residual blocks, concatenated, (B, D')."""
        return self.view_and_last_blocks(x, n)[1]

    def view_and_last_blocks(self, x: Tensor, n: int = 4) -> tuple[Tensor, Tensor]:
        """Return the view feature (B, D) of :meth:`forward` and the linear-probe feature (B, D') in one pass."""
        x = self.maxpool(self.act1(self.bn1(self.conv1(x))))
        outputs = []
        for name in ("layer1", "layer2", "layer3", "layer4"):
            for block in cast(nn.Sequential, getattr(self, name)):
                x = block(x)
                outputs.append(x)
        return self.forward_head(x), torch.cat([y.mean((2, 3)) for y in outputs[-n:]], -1)

    def last_attention(self, x: Tensor) -> Tensor:
        """Not available: a ResNet has no attention.

        Raises:
            ValueError: always.
        """
        raise ValueError("a ResNet has no attention; attention_map returns the norms of its regions")

    def attention_map(self, x: Tensor) -> Tensor:
        """Return the norm of each region's feature in place of attention, (B, 1, H, W)."""
        return self.forward_features(x).norm(dim=1, keepdim=True)


# The networks of torchvision, which the published code creates by name.
_NETWORKS: dict[str, dict[str, Any]] = {
    "esvit_resnet18": {"block": BasicBlock, "layers": (2, 2, 2, 2)},
    "esvit_resnet34": {"block": BasicBlock, "layers": (3, 4, 6, 3)},
    "esvit_resnet50": {"block": Bottleneck, "layers": (3, 4, 6, 3)},
    "esvit_resnet101": {"block": Bottleneck, "layers": (3, 4, 23, 3)},
    "esvit_resnet152": {"block": Bottleneck, "layers": (3, 8, 36, 3)},
    "esvit_resnext50_32x4d": {"block": Bottleneck, "layers": (3, 4, 6, 3), "cardinality": 32, "base_width": 4},
    "esvit_wide_resnet50_2": {"block": Bottleneck, "layers": (3, 4, 6, 3), "base_width": 128},
}

default_cfgs = generate_default_cfgs({name: default_cfg(first_conv="conv1", classifier="fc") for name in _NETWORKS})

for _name, _values in _NETWORKS.items():
    register(__name__, ResNet, _name, out_indices=(0, 1, 2, 3, 4), **_values)
