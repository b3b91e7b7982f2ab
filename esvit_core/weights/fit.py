"""Put weights from elsewhere into a network, all of them or none, and say what does not fit."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from esvit_core.config import ModelConfig
from esvit_core.errors import UserError
from esvit_core.models.factory import architecture_names, create_backbone
from esvit_core.weights.snapshot import Weights, part_of
from esvit_core.weights.timm_names import COMPUTED, from_timm

# A name that only this family's weights have, so that not all networks must be built to find theirs.
_FAMILIES = {
    "swin": "layers.0.blocks.",
    "cvt": "stage0.",
    "vil": "layer1.0.proj.",
    "deit": "blocks.0.attn.qkv.",
    "vit": "blocks.0.attn.qkv.",
    "resnet": "layer1.0.conv1.",
}
_BLOCK = re.compile(r"^(.*\.\d+)\.")


def fitting(network: nn.Module, weights: Mapping[str, Tensor], origin: str, into: str) -> Weights:
    """The whole state of ``network`` with ``weights`` in it; the network itself is left as it is.

    What a network computes when it is built may be missing.

    Args:
        network: that shall take them.
        weights: under its names.
        origin: where they are from, for the message.
        into: what the network is, for the message, with the setting that decides it.

    Raises:
        UserError: names are missing or left over, or shapes differ; all of them are listed.
    """
    own = network.state_dict()
    computed = {name for name in (*own, *weights) if name.rpartition(".")[2] in COMPUTED}
    missing = [name for name in own if name not in weights and name not in computed]
    left_over = [name for name in weights if name not in own and name not in computed]
    shapes = [
        f"{name} {_shape(weights[name])} there, {_shape(own[name])} here"
        for name in own
        if name in weights and weights[name].shape != own[name].shape
    ]
    if missing or left_over or shapes:
        lists = (("missing", condensed(missing)), ("left over", condensed(left_over)), ("of another shape", shapes))
        told = "; ".join(f"{what}: {', '.join(names)}" for what, names in lists if names)
        arch = recognise(part_of(weights, "backbone") or weights)
        theirs = f" They are those of {arch}." if arch else ""
        raise UserError(f"weights {origin}: they do not fit {into}; {told}.{theirs}")
    return {**own, **{name: value for name, value in weights.items() if name in own}}


def condensed(names: Iterable[str]) -> list[str]:
    """The names, those of one block as one: ``layers.2.blocks.6.* (13)``."""
    blocks: dict[str, list[str]] = {}
    for name in names:
        found = _BLOCK.match(name)
        blocks.setdefault(found[1] if found else name, []).append(name)
    return [group[0] if len(group) == 1 else f"{block}.* ({len(group)})" for block, group in blocks.items()]


def recognise(weights: Mapping[str, Tensor]) -> str | None:
    """The architecture of ours whose backbone has exactly these names and shapes; None where there is none.

    Args:
        weights: of a backbone, under its own names or timm's.
    """
    families = [family for family, name in _FAMILIES.items() if any(there.startswith(name) for there in weights)]
    # A family's bare name takes every size, and none says which.
    named = [arch for arch in architecture_names() if arch not in _FAMILIES]
    candidates = [arch for arch in named if arch.startswith(tuple(families))]
    return next((arch for arch in candidates if _own_shapes(arch) == _shapes(from_timm(arch, weights))), None)


@functools.cache
def _own_shapes(arch: str) -> dict[str, torch.Size]:
    with torch.device("meta"):
        return _shapes(create_backbone(ModelConfig(arch=arch)).state_dict())


def _shapes(weights: Mapping[str, Tensor]) -> dict[str, torch.Size]:
    return {name: value.shape for name, value in weights.items() if name.rpartition(".")[2] not in COMPUTED}


def _shape(value: Tensor) -> str:
    return "x".join(map(str, value.shape)) or "scalar"
