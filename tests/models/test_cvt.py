"""CvT's faster implementations compute the same."""

from __future__ import annotations

import copy

import torch

from esvit_core.kernels.choose import select_kernels_
from esvit_core.models import cvt


def test_folding_the_factor_of_quick_gelu_computes_the_same() -> None:
    plain = cvt.FeedForward(6, 2.0).double()
    folded = copy.deepcopy(plain)
    select_kernels_(folded, torch.float64, torch.device("cpu"))
    assert folded.fold_activation and not plain.fold_activation
    x, outer = torch.randn(2, 3, 5, 4, 6, dtype=torch.float64)
    for module in (plain, folded):
        module(x).backward(outer)
    torch.testing.assert_close(folded(x), plain(x))
    for (name, parameter), other in zip(plain.named_parameters(), folded.parameters(), strict=True):
        torch.testing.assert_close(other.grad, parameter.grad, msg=name)
