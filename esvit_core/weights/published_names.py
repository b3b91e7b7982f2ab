"""Mapping between weight names of the published checkpoints (microsoft/esvit) and of this project.

Inside backbones and heads the names are equal. The prefix of the backbone differs: published transformers have its
weights at the top level, next to ``head`` and ``head_dense``; published ResNets have them in ``backbone.backbone``; and
training wraps the student in ``module``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

Value = TypeVar("Value")

_HEADS = ("head.", "head_dense.")
_RESNET_ONLY = "backbone.conv1.weight"


def from_published(state: Mapping[str, Value]) -> dict[str, Value]:
    """Rename the entries of a published network to the names of :class:`~esvit_core.models.multicrop.MultiCropNetwork`."""
    renamed = {}
    for name, value in state.items():
        name = name.removeprefix("module.").removeprefix("backbone.").removeprefix("backbone.")
        renamed[name if name.startswith(_HEADS) else f"backbone.{name}"] = value
    return renamed


def to_published(state: Mapping[str, Value]) -> dict[str, Value]:
    """Rename the entries of a :class:`~esvit_core.models.multicrop.MultiCropNetwork` to the published names."""
    prefix = "backbone.backbone." if _RESNET_ONLY in state else ""
    return {
        name if name.startswith(_HEADS) else prefix + name.removeprefix("backbone."): value
        for name, value in state.items()
    }
