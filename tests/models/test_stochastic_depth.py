"""Dropped branches are not computed, and the sum equals that of timm's stochastic depth."""

from __future__ import annotations

import pytest
import torch
from timm.layers import DropPath
from torch import Tensor, nn

from esvit_core.kernels.choose import select_kernels_
from esvit_core.models.layers.stochastic_depth import StochasticDepth


class Branch(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.images: list[int] = []

    def forward(self, x: Tensor) -> Tensor:
        self.images.append(len(x))
        return self.layer(x)


def run(drop: float, seed: int, ours: bool, training: bool = True) -> tuple[Branch, list[Tensor], Tensor]:
    """The branch, the sum with its gradients, and the next random number."""
    torch.manual_seed(7)
    branch, x = Branch(), torch.randn(6, 5, 4, requires_grad=True)
    torch.manual_seed(seed)
    if ours:
        depth = StochasticDepth(drop).train(training)
        select_kernels_(depth, torch.float32, torch.device("cpu"))
        out = depth(x, branch)
    else:
        out = x + DropPath(drop).train(training)(branch(x))
    drawn = torch.rand(3)
    out.square().sum().backward()
    return branch, [out.detach(), x.grad, *(p.grad for p in branch.parameters())], drawn


@pytest.mark.parametrize("drop", [0.0, 0.1, 0.5, 0.9, 0.999])
@pytest.mark.parametrize("training", [True, False])
def test_sum_and_gradients_are_those_of_timm(drop: float, training: bool) -> None:
    counts = set()
    for seed in range(8):
        branch, found, drawn = run(drop, seed, True, training)
        _, expected, drawn_there = run(drop, seed, False, training)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
        assert torch.equal(drawn, drawn_there)
        counts.update(branch.images)
    if training and 0 < drop < 0.99:
        assert min(counts) < 6  # the others were not computed
    elif not training or drop == 0:
        assert counts == {6}


def test_if_every_image_drops_the_branch_its_gradients_are_zero_and_not_missing() -> None:
    branch, (out, of_x, *others), _ = run(0.999, 0, True)
    assert branch.images == [1]
    assert all(torch.equal(gradient, torch.zeros_like(gradient)) for gradient in others)
    torch.testing.assert_close(of_x, 2 * out)


def test_before_selection_every_image_is_computed() -> None:
    torch.manual_seed(0)
    branch, depth = Branch(), StochasticDepth(0.5)
    depth(torch.randn(6, 5, 4), branch)
    assert branch.images == [6]
