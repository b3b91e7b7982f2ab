"""``torch.export``: a graph of PyTorch operators that runs without this project's code."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from esvit_core.models.region_map import FeatureNetwork

DESCRIPTION = "backbone.json"  # extra file in the program


def write(backbone: nn.Module, path: Path, description: dict[str, Any], regions: bool) -> None:
    """Write the backbone as an exported program.

    Its input (B, 3, S, S) takes any number of normalized images of ``eval_crop`` pixels; it returns a tuple of the view
    features (B, D) and, with ``regions``, the regions (B, H, W, D'). The extra file ``backbone.json`` contains the
    preprocessing.
    """
    network = FeatureNetwork(backbone, regions).eval()
    size = description["eval_crop"]
    with torch.no_grad():
        program = torch.export.export(
            network,
            (torch.zeros(2, 3, size, size),),
            dynamic_shapes={"pixels": {0: torch.export.Dim("batch", min=1)}},
            strict=False,
        )
    torch.export.save(program, path, extra_files={DESCRIPTION: json.dumps(description, indent=1)})


def read(path: Path) -> Callable[[Tensor], tuple[Tensor, ...]]:
    """Load the program as a function of images (B, 3, S, S)."""
    return torch.export.load(path).module()


def usage(path: Path, description: dict[str, Any]) -> list[str]:
    """Return the lines of Python that load the file."""
    size = description["eval_crop"]
    return [
        "import torch",
        f"network = torch.export.load({str(path)!r}).module()",
        f"view, *regions = network(torch.zeros(1, 3, {size}, {size}))",
    ]
