"""Micro networks of every architecture, with the description of a published backbone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
from torch import nn

from esvit_core.config import Config
from esvit_core.models import create_backbone
from esvit_core.weights.backbone import describe_backbone

SPARSE = "l1,h2,d8,n1,s1,g1,p2,f3,a0_l2,h2,d16,n1,s0,g0,p2,f3,a0"
SWIN = {"patch_size": 4, "embed_dim": 8, "depths": (1, 2), "num_heads": (1, 2), "window_size": 4}
MICRO: dict[str, dict[str, Any]] = {
    "cvt_tiny": {"dims": (8, 12), "depths": (1, 1), "num_heads": (1, 2), "window_size": 3},
    "vil_2262": {"arch": SPARSE, "out_indices": (0, 1)},
    "deit_tiny": {"patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2},
    "resnet50": {"layers": (1, 1, 1, 1), "channels": (4, 6, 8, 10), "stem_width": 8},
}


def describe(backbone: nn.Module, model: dict[str, Any], size: int) -> nn.Module:
    crops = {"size": size, "number": 2, "scale": [0.4, 1.0]}
    config = Config.from_mapping(
        {"augment": {"global_crops": crops}, "model": model, "evaluation": {"resize": size + 4, "crop": size}}
    )
    backbone.backbone_config = describe_backbone(backbone, config)  # type: ignore[assignment]
    return backbone.eval()


@pytest.fixture(scope="session")
def described() -> Callable[..., nn.Module]:
    """``described(arch, size=32, **model)``: a backbone as ``load_backbone`` gives it.

    Swin and networks of timm take any size by their configuration; of the others these are micro ones, which a
    configuration cannot ask for.
    """

    def make(arch: str, size: int = 32, **model: Any) -> nn.Module:
        torch.manual_seed(0)
        if arch in MICRO:
            return describe(timm.create_model(f"esvit_{arch}", img_size=size, **MICRO[arch]), {"arch": arch}, size)
        model = {"arch": arch, **(SWIN if arch == "swin" else {}), **model}
        backbone = create_backbone(Config.from_mapping({"model": model}).model, img_size=size, drop_path=0.0)
        return describe(backbone, model, size)

    return make
