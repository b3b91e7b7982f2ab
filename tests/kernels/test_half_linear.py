"""Linear layers with half-precision copies of their weights compute what autocast computes."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from esvit_core.kernels.half_linear import HalfLinear, HalfWeights, PointwiseConv

BF16 = torch.bfloat16


def measured(network: nn.Module, x: torch.Tensor, outer: torch.Tensor, autocast: bool) -> list[torch.Tensor]:
    x = x.clone().requires_grad_()
    with torch.autocast("cpu", BF16, enabled=autocast):
        out = network(x)
    out.backward(outer.to(out.dtype))
    return [out.detach().float(), x.grad, *(p.grad for p in network.parameters())]


@given(
    shape=st.lists(st.integers(1, 5), min_size=1, max_size=3),
    widths=st.tuples(st.integers(1, 20), st.integers(1, 20)),
    bias=st.booleans(),
    seed=st.integers(0, 99),
)
@settings(max_examples=25, deadline=None)
def test_values_and_gradients_are_those_of_autocast(shape, widths, bias, seed) -> None:
    generator = torch.Generator().manual_seed(seed)
    plain, half = (nn.Sequential(nn.Linear(*widths, bias=bias)) for _ in range(2))
    half.load_state_dict(plain.state_dict())
    HalfWeights([half], BF16).update_()
    x = torch.randn(*shape, widths[0], generator=generator)
    outer = torch.randn(*shape, widths[1], generator=generator)
    out, of_x, *of_weights = measured(half, x, outer, autocast=False)
    expected, expected_of_x, *expected_of_weights = measured(plain, x, outer, autocast=True)
    assert torch.equal(out, expected)
    torch.testing.assert_close(of_x, expected_of_x, rtol=1e-2, atol=1e-2)
    for found, wanted in zip(of_weights, expected_of_weights, strict=True):
        assert found.dtype == torch.float32
        torch.testing.assert_close(found, wanted, rtol=1e-2, atol=2e-2)  # autocast rounds them to bfloat16


def test_a_pointwise_convolution_on_a_map_with_gaps_computes_what_autocast_computes() -> None:
    torch.manual_seed(0)
    plain, half = (nn.Sequential(PointwiseConv(6, 5)) for _ in range(2))
    half.load_state_dict(plain.state_dict())
    HalfWeights([half], BF16).update_()
    x, outer = torch.randn(2, 6, 3, 4).permute(0, 2, 3, 1), torch.randn(2, 3, 4, 5)
    found, expected = measured(half, x, outer, autocast=False), measured(plain, x, outer, autocast=True)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-2, atol=2e-2)


def test_the_copies_follow_the_weights_and_are_no_part_of_the_state() -> None:
    network = nn.Sequential(nn.Linear(3, 4), nn.GELU(), nn.Linear(4, 2, bias=False))
    network.append(network[0])  # shared layers stay shared
    names = list(network.state_dict())
    weights = HalfWeights([network], BF16)
    assert list(network.state_dict()) == names
    assert isinstance(network[0], HalfLinear) and network[3] is network[0]
    with torch.no_grad():
        network[2].weight.fill_(0.3)
    weights.update_()
    assert torch.equal(network[2].half_weight, network[2].weight.to(BF16))
