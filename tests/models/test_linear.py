"""Linear layers through oneDNN compute the same as torch's, and are used only in float32 on a CPU."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from esvit_core.kernels import onednn_linear as module
from esvit_core.kernels.choose import select_kernels_
from esvit_core.kernels.onednn_linear import Linear, linear
from esvit_core.models.cvt import PointwiseConv

CPU = torch.device("cpu")
onednn = pytest.mark.skipif(not module._AVAILABLE, reason="torch without oneDNN or MKL")


@onednn
@given(
    shape=st.lists(st.integers(1, 9), min_size=1, max_size=3),
    width=st.integers(1, 70),
    out=st.integers(1, 70),
    biased=st.booleans(),
    transposed=st.booleans(),
    seed=st.integers(0, 99),
)
@settings(max_examples=40, deadline=None)
def test_values_and_gradients_are_those_of_the_product(
    shape: list[int], width: int, out: int, biased: bool, transposed: bool, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    x, outer = (torch.randn(*shape, n, generator=generator) for n in (width, out))
    weight = torch.randn(*((width, out) if transposed else (out, width)), generator=generator)
    bias = torch.randn(out, generator=generator)

    def measured(function, dtype: torch.dtype) -> list[torch.Tensor]:
        leaves = [t.detach().to(dtype).requires_grad_() for t in (x, weight, bias)[: 2 + biased]]
        given_weight = leaves[1].T if transposed else leaves[1]
        result = function(leaves[0], given_weight, leaves[2] if biased else None)
        result.backward(outer.to(dtype))
        return [result.detach().double(), *(leaf.grad.double() for leaf in leaves)]

    for found, expected in zip(measured(linear, torch.float32), measured(F.linear, torch.float64), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@onednn
def test_onednn_is_used_in_float32_on_a_cpu_only(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[torch.dtype] = []
    product = module.onednn_linear
    monkeypatch.setattr(module, "onednn_linear", lambda x, *rest: taken.append(x.dtype) or product(x, *rest))
    network = nn.Sequential(nn.Linear(4, 4), nn.GELU(), nn.Linear(4, 2))
    x = torch.randn(3, 4)
    expected = network(x)
    for dtype, device in ((torch.bfloat16, CPU), (torch.float32, torch.device("cuda"))):
        select_kernels_(network, dtype, device)
        assert type(network[0]) is nn.Linear
    select_kernels_(network, torch.float32, CPU)
    assert type(network[0]) is Linear
    torch.testing.assert_close(network(x), expected)
    assert taken == [torch.float32] * 2
    with torch.inference_mode():
        torch.testing.assert_close(network(x), expected)
    assert len(taken) == 4
    network.double()(x.double())
    with torch.autocast("cpu", torch.bfloat16):
        network.float()(x)
    assert len(taken) == 4


@onednn
def test_no_product_is_computed_for_a_frozen_layer_or_an_input_without_gradient() -> None:
    layer = Linear(3, 2)
    layer.weight.requires_grad_(False)
    x = torch.randn(5, 3, requires_grad=True)
    layer(x).sum().backward()
    assert layer.weight.grad is None and x.grad is not None and layer.bias.grad is not None
    layer.weight.requires_grad_(True)
    layer(x.detach()).sum().backward()
    assert layer.weight.grad is not None


@onednn
def test_it_is_exported_as_an_ordinary_layer() -> None:
    exported = torch.export.export(Linear(3, 2), (torch.randn(5, 3),))
    assert not any("mkldnn" in str(node.target) for node in exported.graph.nodes)


@onednn
def test_pointwise_convolutions_are_linear_layers_too(monkeypatch: pytest.MonkeyPatch) -> None:
    convolution, x = PointwiseConv(6, 5), torch.randn(2, 3, 3, 6)
    expected = convolution(x)
    select_kernels_(convolution, torch.float32, CPU)
    taken: list[torch.Size] = []
    product = module.onednn_linear
    monkeypatch.setattr(module, "onednn_linear", lambda x, *rest: taken.append(x.shape) or product(x, *rest))
    torch.testing.assert_close(convolution(x), expected)
    assert taken == [x.shape]
