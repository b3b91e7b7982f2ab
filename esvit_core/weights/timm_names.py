"""Names of weights in stock timm networks and here: the only place that knows both.

timm's ViT, DeiT and ResNet carry our names. timm's Swin differs in three things:

* Patch merging is the first step of the next stage (``layers.1.downsample``), here the last of the one before
  (``layers.0.downsample``). Files of the Swin authors, which timm reads too, have it where it is here.
* The tables of relative positions (``relative_position_index``) and the masks of shifted windows are computed, not
  kept.
* Its layer norms use eps 1e-5, ours (the published EsViT's) 1e-6. Weights know nothing of it: a stock network gives
  our features only when it is built with :func:`stock_network`'s arguments.

A classifier is no part of a backbone: it is dropped on the way here, and there is none on the way back.
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

# What every network computes when it is built, and some files keep all the same.
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


def stock_network(arch: str) -> tuple[str, dict[str, Any]]:
    """The network of stock timm that computes what ``arch`` computes at 224 pixels.

    Args:
        arch: as in ``model.arch``: one of the Swin, DeiT, ViT and ResNet architectures, or ``timm:<name>``.

    Returns:
        The name and the keyword arguments for ``timm.create_model``; among them the layer norms' eps.

    Raises:
        UserError: timm has no such network (CvT and ViL).
    """
    if arch.startswith(_TIMM):
        return arch.removeprefix(_TIMM), {}
    if arch in _STOCK:
        return _STOCK[arch], {}  # timm's ViT has eps 1e-6 too
    if found := re.fullmatch(r"swin_(tiny|small|base|large)_w(7|14)", arch):
        arguments: dict[str, Any] = {"norm_layer": functools.partial(nn.LayerNorm, eps=1e-6)}
        if found[2] != "7":
            arguments["window_size"] = int(found[2])
        return f"swin_{found[1]}_patch4_window7_224", arguments
    raise UserError(
        f"model.arch {arch}: stock timm has no network like it; it has those of {', '.join(_STOCK)}, "
        "swin_{tiny,small,base,large}_w{7,14}"
    )


def from_timm(arch: str, state: Mapping[str, Value]) -> dict[str, Value]:
    """Entries of a timm network under the names of our backbone ``arch``; classifier and computed buffers dropped.

    ``relative_position_index`` of a Swin is therefore missing: the network that takes the weights has its own.
    """
    kept = _weights_of_the_backbone(state, _classifiers(arch))
    if arch.startswith(_TIMM):
        return {f"model.{name}": value for name, value in kept.items()}
    if "layers.0.downsample.reduction.weight" in kept:  # the Swin authors' own files
        return kept
    return {_moved(name, -1): value for name, value in kept.items()}


def to_timm(arch: str, state: Mapping[str, Value]) -> dict[str, Value]:
    """Entries of our backbone ``arch`` under timm's names; loads into :func:`stock_network` without a classifier."""
    if arch.startswith(_TIMM):
        state = {name.removeprefix("model."): value for name, value in state.items()}
        return _weights_of_the_backbone(state, _classifiers(arch))
    return {_moved(name, +1): value for name, value in _weights_of_the_backbone(state, _classifiers(arch)).items()}


def _classifiers(arch: str) -> tuple[str, ...]:
    """How the names of a network's classifiers begin."""
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
