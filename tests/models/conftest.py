"""Micro networks of every architecture."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
from torch import nn

import esvit_core.models  # noqa: F401  (registers the networks)

SIZE = 32  # the side the micro networks are built for, pixels
SPARSE = "l1,h2,d8,n1,s1,g1,p2,f3,a0_l2,h2,d16,n2,s0,g1,p2,f3,a0_l3,h2,d24,n1,s0,g0,p2,f3,a0"
MICRO: dict[str, tuple[str, dict[str, Any]]] = {
    "swin": (
        "esvit_swin",
        {"patch_size": 2, "embed_dim": 8, "depths": (2, 2, 2), "num_heads": (1, 2, 2), "window_size": 4},
    ),
    "cvt": ("esvit_cvt_tiny", {"dims": (8, 12, 16), "depths": (1, 1, 2), "num_heads": (1, 2, 2), "window_size": 3}),
    "vil": ("esvit_vil_2262", {"arch": SPARSE, "out_indices": (0, 1, 2)}),
    "vit": ("esvit_deit_tiny", {"patch_size": 8, "embed_dim": 16, "depth": 4, "num_heads": 2}),
    "resnet": ("esvit_resnet50", {"layers": (1, 1, 1, 2), "channels": (4, 6, 8, 10), "stem_width": 8}),
}


def make(name: str, **changes: Any) -> nn.Module:
    arch, sizes = MICRO[name]
    torch.manual_seed(0)
    return timm.create_model(arch, **{"img_size": SIZE, **sizes, **changes})


@pytest.fixture(params=MICRO)
def micro(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def make_micro():
    """``make_micro(name, **changes)`` builds one."""
    return make


@pytest.fixture
def backbone(micro: str) -> nn.Module:
    return make(micro).eval()
