"""The fused residual connection, norm and MLP, in Triton's interpreter on a CPU, agree with torch."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from esvit_core.kernels.half_linear import HalfLinear, HalfWeights

pytest.importorskip("triton")
if torch.cuda.is_available():
    pytest.skip("compiled here, not interpreted", allow_module_level=True)

from esvit_core.kernels import add_norm_triton, gelu_triton
from esvit_core.kernels.add_norm_triton import add_norm


@settings(max_examples=25, deadline=None)
@given(
    rows=st.integers(1, 70),
    C=st.integers(8, 40),
    adds=st.booleans(),
    scaled=st.booleans(),
    used=st.sampled_from(["sum", "norm", "both"]),
    seed=st.integers(0, 2**31),
)
def test_sum_norm_and_gradients_are_those_of_torch(rows, C, adds, scaled, used, seed) -> None:
    torch.manual_seed(seed)
    norm = nn.LayerNorm(C, eps=1e-6)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    x = torch.randn(rows, C, requires_grad=True)
    y = torch.randn(rows, C, requires_grad=True) if adds else None
    images = torch.randint(3, (rows,), dtype=torch.int32)
    scales = torch.tensor([0.0, 1.0, 2.0]) if scaled else None
    outer = torch.randn(2, rows, C)

    def gradients(total: torch.Tensor, normed: torch.Tensor) -> list[torch.Tensor]:
        leaves = [leaf for leaf in (x, y, norm.weight, norm.bias) if leaf is not None]
        loss = (total * outer[0]).sum() * (used != "norm") + (normed * outer[1]).sum() * (used != "sum")
        grads = torch.autograd.grad(loss, leaves)
        return [total, normed, *grads]

    scale = scales[images][:, None] if scaled else 1.0
    plain = x + scale * y if adds else x * 1.0
    expected = gradients(plain, norm(plain))
    for found, wanted in zip(gradients(*add_norm(x, y, scales, images, norm, torch.float32)), expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-3)


def test_several_blocks_for_each_program(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(add_norm_triton, "_PROGRAMS", 2)
    monkeypatch.setattr(add_norm_triton, "_TILE", 32)
    norm, x = nn.LayerNorm(8), torch.randn(23, 8, requires_grad=True)
    outer = torch.randn(23, 8)
    expected = torch.autograd.grad(norm(x), (x, norm.weight, norm.bias), outer)
    normed = add_norm(x, None, None, torch.zeros(23, dtype=torch.int32), norm, torch.float32)[1]
    for found, wanted in zip(torch.autograd.grad(normed, (x, norm.weight, norm.bias), outer), expected, strict=True):
        torch.testing.assert_close(found, wanted)


def test_the_norm_of_a_rounded_sum_is_that_of_what_is_kept() -> None:
    """float16, because the interpreter cuts bfloat16 off instead of rounding it."""
    norm = nn.LayerNorm(16)
    x, y = torch.randn(2, 5, 16).half().unbind()
    total, normed = add_norm(x, y, None, torch.zeros(5, dtype=torch.int32), norm, torch.float32)
    assert total.dtype == torch.float16 and torch.equal(total, x + y)
    torch.testing.assert_close(normed, norm(total.float()), rtol=1e-5, atol=1e-5)


@settings(max_examples=10, deadline=None)
@given(rows=st.integers(1, 9), D=st.integers(1, 9), K=st.integers(1, 9), seed=st.integers(0, 2**31))
def test_gelu_and_linear_layer_are_those_of_torch(rows, D, K, seed) -> None:
    torch.manual_seed(seed)
    plain = nn.Linear(D, K)
    network = nn.Sequential(nn.Linear(D, K))
    network.load_state_dict({f"0.{name}": value for name, value in plain.state_dict().items()})
    HalfWeights([network], torch.float32).update_()
    layer = network[0]
    assert isinstance(layer, HalfLinear)
    h, outer = torch.randn(rows, D, requires_grad=True), torch.randn(rows, K)
    out, expected = gelu_triton.gelu_linear(h, layer), plain(F.gelu(h))
    torch.testing.assert_close(out, expected)
    found = torch.autograd.grad(out, (h, layer.weight, layer.bias), outer)
    wanted = torch.autograd.grad(expected, (h, plain.weight, plain.bias), outer)
    for mine, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)
