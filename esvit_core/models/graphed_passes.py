"""Replay the passes of a network as CUDA graphs: the processor launches one graph instead of hundreds of kernels.

A graph is recorded once, with its kernels and the addresses of their operands. Hence it fits one size of batch, and nothing
in it may depend on values that the processor knows. Weights keep their addresses when the optimizer changes them, and
random numbers are drawn anew at each replay, from the device's default generator.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from esvit_core.models.multicrop import MultiCropNetwork, Passes, passes_one_by_one


class GraphedPasses:
    """The passes of a network as one graph, and its backward pass as another, see ``MultiCropNetwork.passes``.

    Gradients of parameters are always written to the same memory, so a step may have one backward pass only.

    Args:
        network: on a GPU, in training mode.
        batches: blank crops, (n * B, 3, S, S) of each size; a batch of other shapes is computed without the graph.
    """

    def __init__(self, network: MultiCropNetwork, batches: list[Tensor]) -> None:
        self._plain: Passes = network.passes or passes_one_by_one
        self._shapes = [batch.shape for batch in batches]
        passes = _FlatPasses(network.backbone, self._plain)
        self._replay: Any = torch.cuda.make_graphed_callables(passes, tuple(batches), allow_unused_input=True)

    def __call__(self, backbone: Any, batches: list[Tensor]) -> list[tuple[Tensor, Tensor]]:
        """Return views (B, D) and regions (B, N, D) of each batch (B, 3, S, S); they are valid until the next call."""
        if not backbone.training or [batch.shape for batch in batches] != self._shapes:
            return self._plain(backbone, batches)
        found = self._replay(*batches)
        return list(zip(found[::2], found[1::2], strict=True))


class _FlatPasses(nn.Module):
    """Passes as a module whose inputs and outputs are tensors."""

    def __init__(self, backbone: nn.Module, passes: Passes) -> None:
        super().__init__()
        self._backbone, self._passes = backbone, passes

    def forward(self, *batches: Tensor) -> tuple[Tensor, ...]:
        return tuple(part for outputs in self._passes(self._backbone, list(batches)) for part in outputs)
