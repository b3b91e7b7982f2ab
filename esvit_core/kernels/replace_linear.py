"""Replace the linear layers of a network by those of another class with the same parameters."""

from __future__ import annotations

from typing import TypeVar

from torch import nn

LinearLayer = TypeVar("LinearLayer", bound=nn.Linear)


def replace_linear_layers_(network: nn.Module, kind: type[LinearLayer]) -> list[LinearLayer]:
    """Replace every ``nn.Linear`` in ``network`` by a ``kind``; return the new layers, each once."""
    replaced: dict[nn.Module, LinearLayer] = {}
    for name, child in list(network.named_modules(remove_duplicate=False)):  # a shared layer stays shared
        if type(child) is nn.Linear and name:
            if child not in replaced:
                layer = kind(child.in_features, child.out_features, child.bias is not None, device="meta")
                layer.weight, layer.bias = child.weight, child.bias
                replaced[child] = layer.train(child.training)
            parent, _, attribute = name.rpartition(".")
            setattr(network.get_submodule(parent), attribute, replaced[child])
    return list(replaced.values())
