"""Checkpoints in the layout of the published code."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from torch import nn

from esvit_core.config import Config
from esvit_core.models.heads import ProjectionHead
from esvit_core.models.multicrop import MultiCropNetwork, build_network

MICRO: dict[str, Any] = {
    "augment": {"global_crops": {"size": 16, "number": 2, "scale": (0.4, 1.0)}},
    "model": {
        "arch": "swin",
        "patch_size": 2,
        "embed_dim": 8,
        "depths": (1, 2),
        "num_heads": (1, 2),
        "window_size": 4,
        "drop_path": 0.0,
    },
    "head": {"out_dim": 12, "hidden_dim": 10, "bottleneck_dim": 6},
}


def config(**sections: dict[str, Any]) -> Config:
    return Config.from_mapping({**MICRO, **{name: {**MICRO.get(name, {}), **new} for name, new in sections.items()}})


SMALL: dict[str, dict[str, Any]] = {
    "deit_tiny": {"img_size": 16, "patch_size": 8, "embed_dim": 8, "depth": 1, "num_heads": 2},
    "resnet50": {"layers": (1, 1, 1, 1), "channels": (4, 4, 6, 6), "stem_width": 4},
    "cvt_tiny": {"img_size": 32, "dims": (8, 12), "depths": (1, 1), "num_heads": (1, 2), "window_size": 3},
    "vil_2262": {"img_size": 32, "arch": "l1,h2,d8,n1,s1,g1,p2,f3,a0_l2,h2,d16,n1,s0,g0,p2,f3,a0"},
}


def small_network(settings: Config) -> MultiCropNetwork:
    """The network of a configuration, of its kind but small."""
    if settings.model.arch == "swin":
        return build_network(settings)
    backbone = timm.create_model(f"esvit_{settings.model.arch}", **SMALL[settings.model.arch])
    heads = [ProjectionHead(backbone.num_features, 12, 10, 6) for _ in range(1 + settings.objective.region)]
    return MultiCropNetwork(backbone, *heads)


@pytest.fixture
def network() -> Callable[[Config], MultiCropNetwork]:
    """``network(config)``: the network of a configuration, of its kind but small."""
    return small_network


@pytest.fixture
def settings() -> Callable[..., Config]:
    """``settings(objective={"region": False})``: the configuration of a micro run."""
    return config


def published_names(network: MultiCropNetwork, prefix: str, resnet: bool) -> dict[str, torch.Tensor]:
    """The state under the published names: heads next to the backbone's entries, a ResNet's two levels down."""
    where = "backbone.backbone." if resnet else ""
    state = {f"{where}{name}": value for name, value in network.backbone.state_dict().items()}
    state |= {f"head.{name}": value for name, value in network.head.state_dict().items()}
    if network.head_dense is not None:
        state |= {f"head_dense.{name}": value for name, value in network.head_dense.state_dict().items()}
    return {f"{prefix}{name}": value for name, value in state.items()}


def trained(network: nn.Module, freeze: bool) -> torch.optim.Optimizer:
    """AdamW with the published groups after two steps; the prototypes frozen as in the first epoch."""
    named = [(name, p) for name, p in network.named_parameters() if p.requires_grad]
    spared = [p for name, p in named if name.endswith(".bias") or p.ndim == 1]
    decayed = [p for name, p in named if not (name.endswith(".bias") or p.ndim == 1)]
    optimizer = torch.optim.AdamW([{"params": decayed}, {"params": spared, "weight_decay": 0.0}])
    generator = torch.Generator().manual_seed(3)
    for _ in range(2):
        for group in optimizer.param_groups:
            group["lr"] = np.float64(5e-4 / 3)  # the schedules are NumPy's
        for name, parameter in named:
            frozen = freeze and "last_layer" in name
            parameter.grad = None if frozen else torch.randn(parameter.shape, generator=generator)
        optimizer.step()
    return optimizer


@pytest.fixture
def published_file(tmp_path: Path) -> Callable[..., Path]:
    """``published_file(config, **changes of the entries)`` writes a checkpoint as the published code does."""

    def write(settings: Config, name: str = "checkpoint.pth", freeze: bool = False, **entries: Any) -> Path:
        torch.manual_seed(1)
        student, teacher = small_network(settings), small_network(settings)
        optimizer = trained(student, freeze)
        resnet = settings.model.arch == "resnet50"
        batch_norms = settings.model.arch in ("resnet50", "cvt_tiny")
        centers = {"center": torch.randn(1, settings.head.out_dim)}
        if settings.objective.region:
            centers["center_grid"] = torch.randn(1, settings.head.out_dim)
        payload = {
            "student": published_names(student, "module.", resnet),
            "teacher": published_names(teacher, "module." if batch_norms else "", resnet),
            "optimizer": optimizer.state_dict(),
            "epoch": 2,
            "args": argparse.Namespace(arch="swin_tiny", out_dim=12, lr=0.0005, local_crops_number=(8,), opts=[]),
            "dino_loss": centers,
            "fp16_scaler": {"scale": 65536.0, "growth_interval": 2000, "_growth_tracker": 2},
            **entries,
        }
        path = tmp_path / name
        torch.save({key: value for key, value in payload.items() if value is not None}, path)
        return path

    return write
