"""The strategy of the cross-entropy is selected by device and number of prototypes, and reaches heads and objective."""

from __future__ import annotations

import pytest
import torch

from esvit_core.config import Config
from esvit_core.kernels.fused_softmax import select_softmax_kernels
from esvit_core.losses import strategy
from esvit_core.losses.strategy import BLOCKWISE, CHUNKED, TRITON, select_strategy
from esvit_core.models.lazy_logits import MIN_LAZY_PROTOTYPES, LazyLogits
from esvit_core.models.multicrop import build_network

CPU, GPU = torch.device("cpu"), torch.device("cuda")


def test_a_cpu_uses_lazy_logits_from_many_prototypes_on() -> None:
    assert select_strategy(CPU, MIN_LAZY_PROTOTYPES - 1) is CHUNKED
    assert select_strategy(CPU, MIN_LAZY_PROTOTYPES) is BLOCKWISE[select_softmax_kernels()]


@pytest.mark.parametrize("available", [True, False])
def test_a_gpu_uses_triton_where_it_is_installed(available: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(strategy, "has_triton", lambda: available)
    assert select_strategy(GPU, 65536) is (TRITON if available else CHUNKED)


def test_both_heads_return_lazy_logits_when_enabled() -> None:
    network = build_network(Config.load("demo"))
    crops = [torch.zeros(1, 3, 32, 32)]
    assert isinstance(network(crops).view_logits, torch.Tensor)
    network.set_lazy_logits()
    output = network(crops)
    assert isinstance(output.view_logits, LazyLogits) and isinstance(output.region_logits, LazyLogits)
