"""Names of weights in the published checkpoints (microsoft/esvit) and here: the only place that knows both.

Inside backbones and heads our names *are* the published ones. What differs is where the backbone sits: published
transformers hold its weights at the top, beside ``head`` and ``head_dense``; published ResNets hold them below
``backbone.backbone``; and training wraps the student in ``module``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

Value = TypeVar("Value")

_HEADS = ("head.", "head_dense.")
_RESNET_ONLY = "backbone.conv1.weight"


def from_published(state: Mapping[str, Value]) -> dict[str, Value]:
    """Entries of a published network under the names of :class:`~esvit_core.models.multicrop.MultiCropNetwork`."""
    renamed = {}
    for name, value in state.items():
        name = name.removeprefix("module.").removeprefix("backbone.").removeprefix("backbone.")
        renamed[name if name.startswith(_HEADS) else f"backbone.{name}"] = value
    return renamed


def to_published(state: Mapping[str, Value]) -> dict[str, Value]:
    """Entries of a :class:`~esvit_core.models.multicrop.MultiCropNetwork` under the published names."""
    prefix = "backbone.backbone." if _RESNET_ONLY in state else ""
    return {
        name if name.startswith(_HEADS) else prefix + name.removeprefix("backbone."): value
        for name, value in state.items()
    }
