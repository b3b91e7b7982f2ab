"""Match imported weights to a network and report mismatches."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from esvit_core.config import ModelConfig
from esvit_core.errors import UserError
from esvit_core.models.factory import architecture_names, create_backbone
from esvit_core.weights.resize_weights import RESIZABLE
from esvit_core.weights.snapshot import Weights, part_of
from esvit_core.weights.timm_names import COMPUTED, from_timm

# A weight name of each family, so that not all networks have to be built to recognize an architecture.
_FAMILIES = {
    "swin": "layers.0.blocks.",
    "cvt": "stage0.",
    "vil": "layer1.0.proj.",
    "deit": "blocks.0.attn.qkv.",
    "vit": "blocks.0.attn.qkv.",
    "resnet": "layer1.0.conv1.",
}
_BLOCK = re.compile(r"^(.*\.\d+)\.")


def fit_weights(network: nn.Module, weights: Mapping[str, Tensor], origin: str, into: str) -> Weights:
    """Return the state of ``network`` with ``weights`` in it; the network itself does not change.

    Buffers that a network computes on construction may be missing.

    Args:
        network: target network.
        weights: weights under the names of the network.
        origin: source of the weights, for messages.
        into: description of the network and the setting that selects it, for messages.

    Raises:
        UserError: names are missing or unexpected, or shapes differ; the message lists all of them.
    """
    own = network.state_dict()
    computed = {name for name in (*own, *weights) if name.rpartition(".")[2] in COMPUTED}
    missing = [name for name in own if name not in weights and name not in computed]
    unexpected = [name for name in weights if name not in own and name not in computed]
    shapes = [
        f"{name} {_shape(weights[name])} in the file, {_shape(own[name])} in the network"
        for name in own
        if name in weights and weights[name].shape != own[name].shape
    ]
    if missing or unexpected or shapes:
        lists = (
            ("missing", group_by_block(missing)),
            ("unexpected", group_by_block(unexpected)),
            ("different shape", shapes),
        )
        mismatches = "; ".join(f"{what}: {', '.join(names)}" for what, names in lists if names)
        arch = recognize_architecture(part_of(weights, "backbone") or weights)
        theirs = f" They fit {arch}." if arch else ""
        raise UserError(f"weights {origin}: they do not fit {into}; {mismatches}.{theirs}")
    return {**own, **{name: value for name, value in weights.items() if name in own}}


def group_by_block(names: Iterable[str]) -> list[str]:
    """Group the names of each block into one entry such as ``layers.2.blocks.6.* (13)``."""
    blocks: dict[str, list[str]] = {}
    for name in names:
        match = _BLOCK.match(name)
        blocks.setdefault(match[1] if match else name, []).append(name)
    return [group[0] if len(group) == 1 else f"{block}.* ({len(group)})" for block, group in blocks.items()]


def recognize_architecture(weights: Mapping[str, Tensor], *, resizable: bool = False) -> str | None:
    """Return the architecture whose backbone has exactly these names and shapes, or None.

    Args:
        weights: weights of a backbone, under this project's names or timm's.
        resizable: position embeddings and bias tables may have other sizes, if no architecture fits exactly.
    """
    families = [family for family, name in _FAMILIES.items() if any(key.startswith(name) for key in weights)]
    # The bare name of a family does not determine the sizes.
    named = [arch for arch in architecture_names() if arch not in _FAMILIES]
    candidates = [arch for arch in named if arch.startswith(tuple(families))]
    exact = (arch for arch in candidates if _own_shapes(arch) == _shapes(from_timm(arch, weights)))
    if (found := next(exact, None)) is not None or not resizable:
        return found
    return next((a for a in candidates if _fixed(_own_shapes(a)) == _fixed(_shapes(from_timm(a, weights)))), None)


def _fixed(shapes: Mapping[str, torch.Size]) -> dict[str, tuple[int, ...]]:
    """Return the shapes, without the sizes that can be changed."""
    return {name: shape[-1:] if name.endswith(RESIZABLE) else shape for name, shape in shapes.items()}


@functools.cache
def _own_shapes(arch: str) -> dict[str, torch.Size]:
    with torch.device("meta"):
        return _shapes(create_backbone(ModelConfig(arch=arch)).state_dict())


def _shapes(weights: Mapping[str, Tensor]) -> dict[str, torch.Size]:
    return {name: value.shape for name, value in weights.items() if name.rpartition(".")[2] not in COMPUTED}


def _shape(value: Tensor) -> str:
    return "x".join(map(str, value.shape)) or "scalar"
