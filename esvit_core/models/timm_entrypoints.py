"""Register the networks with timm."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import build_model_with_cfg, register_model
from torch import nn


def default_cfg(**changes: Any) -> dict[str, Any]:
    """Return timm's description of a network's input for EsViT's evaluation: resize to 256, center crop of 224 pixels."""
    return {
        "url": "",
        "num_classes": 0,
        "input_size": (3, 224, 224),
        "pool_size": (7, 7),
        "crop_pct": 224 / 256,
        "interpolation": "bicubic",
        "fixed_input_size": False,
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "first_conv": "patch_embed.proj",
        "classifier": "head.fc",
        "license": "mit",
        **changes,
    }


def register(module: str, network: Callable[..., nn.Module], name: str, **defaults: Any) -> None:
    """Make ``timm.create_model(name)`` build ``network`` with ``defaults`` and the caller's arguments.

    Args:
        module: module of the architecture; its ``default_cfgs`` describe ``name``.
        network: class of the network.
        name: name in the registry.
        defaults: keyword arguments of the class.
    """

    def entrypoint(pretrained: bool = False, **kwargs: Any) -> nn.Module:
        values = {**defaults, **kwargs}
        # Outputs of features_only: every stage, or the last three blocks of a network without stages.
        stages = len(values["arch"].split("_") if "arch" in values else values.get("depths", ()))
        out_indices = values.pop("out_indices", tuple(range(stages)) or 3)
        feature_cfg = {"feature_cls": "getter", "out_indices": out_indices}
        return build_model_with_cfg(network, name, pretrained, feature_cfg=feature_cfg, **values)

    entrypoint.__name__ = entrypoint.__qualname__ = name
    entrypoint.__module__ = module
    register_model(entrypoint)
