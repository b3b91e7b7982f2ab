"""The project's own format: a folder with ``model.safetensors`` and ``backbone.json``."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from esvit_core.models.region_map import FeatureNetwork
from esvit_core.weights.backbone import load_backbone, write_backbone


def write(backbone: nn.Module, path: Path, description: dict[str, Any], regions: bool) -> None:
    """Write the folder; its network always provides regions."""
    write_backbone(path, backbone, description)


def read(path: Path) -> Callable[[Tensor], tuple[Tensor, ...]]:
    """Load the network as a function of images (B, 3, S, S)."""
    return FeatureNetwork(load_backbone(path), regions=True)


def usage(path: Path, description: dict[str, Any]) -> list[str]:
    """Return the lines of Python that load the folder."""
    size = description["eval_crop"]
    return [
        "import esvit_core, torch",
        f"backbone = esvit_core.load_backbone({str(path)!r})  # how to prepare images: backbone.backbone_config",
        f"view, regions = backbone.views_and_regions(torch.zeros(1, 3, {size}, {size}))",
    ]
