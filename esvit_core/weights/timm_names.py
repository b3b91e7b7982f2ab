"""Mapping between weight names of stock timm networks and of this project.

The names of timm's ViT, DeiT and ResNet are equal. timm's Swin differs in three points:

* Patch merging is the first step of the next stage (``layers.1.downsample``); here it is the last step of the previous
  stage (``layers.0.downsample``), as in the files of the Swin authors, which timm also reads.
* The relative position indices (``relative_position_index``) and the masks of shifted windows are computed, not saved.
* Its layer norms use eps 1e-5, whereas the published EsViT uses 1e-6. Weight files do not contain eps: a stock network
  computes the same features only if it is built with the arguments of :func:`stock_network`.

A classifier is not part of a backbone: it is dropped on import, and exports have none.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from typing import Any, TypeVar

import timm
from torch import nn

from esvit_core.errors import UserError

Value = TypeVar("Value")

# Buffers that every network computes on construction but some files contain.
COMPUTED = ("relative_position_index", "attn_mask")
_TIMM = "timm:"
_MERGING = re.compile(r"^layers\.(\d+)\.downsample\.")
_CLASSIFIERS = ("head.fc.", "head.weight", "head.bias", "fc.")
_STOCK = {
    "deit_tiny": "deit_tiny_patch16_224",
    "deit_small": "deit_small_patch16_224",
    "vit_base": "vit_base_patch16_224",
    "resnet50": "resnet50",
}

_SAME_NETWORK = {"vit_tiny_patch16_224": "deit_tiny", "vit_small_patch16_224": "deit_small"}


def stock_network(arch: str) -> tuple[str, dict[str, Any]]:
    """Return the stock timm network that computes the same as ``arch`` at 224 pixels.

    Args:
        arch: value of ``model.arch``: a Swin, DeiT, ViT or ResNet architecture, or ``timm:<name>``.

    Returns:
        The name and the keyword arguments for ``timm.create_model``, including the eps of the layer norms.

    Raises:
        UserError: timm has no such network (CvT and ViL).
    """
    if arch.startswith(_TIMM):
        return arch.removeprefix(_TIMM), {}
    if arch in _STOCK:
        return _STOCK[arch], {}  # timm's ViT also has eps 1e-6
    if found := re.fullmatch(r"swin_(tiny|small|base|large)_w(7|14)", arch):
        arguments: dict[str, Any] = {"norm_layer": functools.partial(nn.LayerNorm, eps=1e-6)}
        if found[2] != "7":
            arguments["window_size"] = int(found[2])
        return f"swin_{found[1]}_patch4_window7_224", arguments
    raise UserError(
        f"model.arch {arch}: stock timm has no equivalent network; it has equivalents of {', '.join(_STOCK)}, "
        "swin_{tiny,small,base,large}_w{7,14}"
    )


def arch_of_timm(name: str) -> str | None:
    """Return the architecture of this project that has the weights of a stock timm network; None: there is none.

    Args:
        name: name of the network, with or without the tag of its weights, such as ``vit_small_patch16_224.dino``.
    """
    stock = name.partition(".")[0]
    if found := re.fullmatch(r"swin_(tiny|small|base|large)_patch4_window7_224", stock):
        return f"swin_{found[1]}_w7"
    return {**{timms: ours for ours, timms in _STOCK.items()}, **_SAME_NETWORK}.get(stock)


def from_timm(arch: str, state: Mapping[str, Value]) -> dict[str, Value]:
    """Rename the entries of a timm network to the names of the backbone ``arch``; drop classifier and computed buffers.

    ``relative_position_index`` of a Swin is therefore missing: the target network has its own.
    """
    kept = _weights_of_the_backbone(state, _classifiers(arch))
    if arch.startswith(_TIMM):
        return {f"model.{name}": value for name, value in kept.items()}
    if "layers.0.downsample.reduction.weight" in kept:  # files of the Swin authors
        return kept
    return {_moved(name, -1): value for name, value in kept.items()}


def to_timm(arch: str, state: Mapping[str, Value]) -> dict[str, Value]:
    """Rename the entries of the backbone ``arch`` to timm's names, for :func:`stock_network` without a classifier."""
    if arch.startswith(_TIMM):
        state = {name.removeprefix("model."): value for name, value in state.items()}
        return _weights_of_the_backbone(state, _classifiers(arch))
    return {_moved(name, +1): value for name, value in _weights_of_the_backbone(state, _classifiers(arch)).items()}


def _classifiers(arch: str) -> tuple[str, ...]:
    """Return the name prefixes of a network's classifiers."""
    if not arch.startswith(_TIMM):
        return _CLASSIFIERS
    description = timm.get_pretrained_cfg(arch.removeprefix(_TIMM))
    named = description.classifier if description else None
    return tuple(f"{name}." for name in ([named] if isinstance(named, str) else named or ()))


def _weights_of_the_backbone(state: Mapping[str, Value], classifiers: tuple[str, ...]) -> dict[str, Value]:
    return {
        name: value
        for name, value in state.items()
        if not name.startswith(classifiers) and name.rpartition(".")[2] not in COMPUTED
    }


def _moved(name: str, stages: int) -> str:
    return _MERGING.sub(lambda found: f"layers.{int(found[1]) + stages}.downsample.", name)
