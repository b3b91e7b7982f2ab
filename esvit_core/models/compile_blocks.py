"""Compile the blocks of a backbone with torch.compile, for networks that have no kernels of their own.

Norms, activations, casts, residual connections and stochastic depth between two products become one kernel. Each block
is one graph, and blocks of equal shapes share its kernels, so a network of twelve blocks compiles two or three per size of
crops. What is random is drawn before a pass, because a graph cannot draw on the CPU.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from esvit_core.models.layers import longformer, resize
from esvit_core.models.layers.drawn_depth import FactorDraw, replace_stochastic_depth_

_GRAPHS = 64  # of one block's code: sizes of crops, student and teacher, the last micro-batch


def find_blocks(backbone: nn.Module) -> list[nn.Module]:
    """Return the repeated parts of a backbone: modules with siblings of their class in a list, without such parts inside."""
    kinds = set()
    for parent in backbone.modules():
        if isinstance(parent, nn.Sequential | nn.ModuleList):
            children = [type(child) for child in parent if next(child.children(), None) is not None]
            kinds |= {kind for kind in children if children.count(kind) > 1 and kind is not nn.ModuleList}
    return _outermost(backbone, tuple(kinds))


def _outermost(module: nn.Module, kinds: tuple[type[nn.Module], ...]) -> list[nn.Module]:
    found: list[nn.Module] = []
    for child in module.children():
        inside = list(child.modules())[1:]
        if isinstance(child, kinds) and not any(isinstance(part, kinds) for part in inside):
            found.append(child)
        else:
            found += _outermost(child, kinds)
    return found


class CompiledPasses:
    """The passes of a network whose blocks are compiled, see ``MultiCropNetwork.passes``.

    Args:
        backbone: changed in place: stochastic depth is replaced, and blocks are compiled at their first calls. Its
            parameters and their names stay the same.
        options: of ``torch.compile``.

    Attributes:
        blocks: the compiled blocks.
    """

    def __init__(self, backbone: nn.Module, **options: Any) -> None:
        for constant in (longformer.window_mask, resize.axis_matrices):
            torch.compiler.assume_constant_result(constant)
        self._device = next(backbone.parameters()).device
        self._depth = FactorDraw(replace_stochastic_depth_(backbone), self._device)
        self._sparse = [module for module in backbone.modules() if isinstance(module, longformer.SparseAttention)]
        self.blocks = find_blocks(backbone)
        for block in self.blocks:
            block.compile(fullgraph=True, dynamic=False, recompile_limit=_GRAPHS, **options)

    def __call__(self, backbone: Any, batches: list[Tensor]) -> list[tuple[Tensor, Tensor]]:
        """Return views (B, D) and regions (B, N, D) of each batch (B, 3, S, S)."""
        results = []
        for batch in batches:
            self._depth.draw_(len(batch))
            longformer.draw_neighbors_(self._sparse, self._device)
            results.append(backbone.views_and_regions(batch))
        return results

    def undo_(self) -> None:
        """Let the blocks compute without compiled kernels."""
        for block in self.blocks:
            block._compiled_call_impl = None
        self.blocks = []
