"""Window attention in C computes the same values and gradients as torch."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from esvit_core.kernels import library, window_attention
from esvit_core.kernels.choose import select_kernels_
from esvit_core.models import cvt
from esvit_core.models.layers.windows import WindowAttention, window_layout

CPU = torch.device("cpu")
pytestmark = pytest.mark.skipif(library() is None, reason="no C compiler")


def attention(heads: int, window: int, shift: int, qkv_bias: bool = True, seed: int = 0) -> WindowAttention:
    torch.manual_seed(seed)
    made = WindowAttention(32 * heads, heads, window, shift, qkv_bias)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.copy_(torch.randn_like(parameter) * parameter.shape[-1] ** -0.5)
    return made


def measured(module: nn.Module, x: torch.Tensor, dtype: torch.dtype, outer: torch.Tensor) -> dict[str, torch.Tensor]:
    """The output, and the gradients of the input and of every parameter."""
    x = x.clone().requires_grad_()
    module.zero_grad()
    with torch.autocast("cpu", dtype=dtype, enabled=dtype == torch.bfloat16):
        out = module(x)
    out.backward(outer.to(out.dtype))
    assert x.grad is not None
    gradients = {name: p.grad for name, p in module.named_parameters() if p.grad is not None}
    return {"out": out.detach(), "x": x.grad, **gradients}


@given(
    batch=st.integers(1, 3),
    heads=st.integers(1, 3),
    window=st.sampled_from([6, 7, 8]),
    height=st.integers(3, 17),
    width=st.integers(3, 17),
    shifted=st.booleans(),
    qkv_bias=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    seed=st.integers(0, 99),
)
@settings(max_examples=40, deadline=None)
def test_values_and_gradients_are_those_of_torch_in_float64(
    batch: int, heads: int, window: int, height: int, width: int, shifted: bool, qkv_bias: bool, dtype, seed: int
) -> None:
    plain = attention(heads, window, window // 2 if shifted else 0, qkv_bias, seed)
    fast = copy.deepcopy(plain)
    select_kernels_(fast, dtype, CPU)
    assert fast.use_c_kernel and not plain.use_c_kernel
    x, outer = torch.randn(2, batch, height, width, 32 * heads)
    expected = measured(plain.double(), x.double(), torch.float64, outer.double())
    found = measured(fast, x, dtype, outer)
    check(found, expected, dtype)


def check(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], dtype: torch.dtype) -> None:
    assert found.keys() == expected.keys()
    tolerance = 2e-5 if dtype == torch.float32 else 0.03
    for name, value in expected.items():
        torch.testing.assert_close(
            found[name].double(), value, rtol=0, atol=tolerance * max(1.0, value.abs().max().item()), msg=name
        )


@given(
    batch=st.integers(1, 3),
    heads=st.integers(1, 3),
    width=st.sampled_from([32, 64]),
    rows=st.integers(6, 17),
    columns=st.integers(6, 17),
    seed=st.integers(0, 99),
)
@settings(max_examples=20, deadline=None)
def test_values_and_gradients_of_cvt_are_those_of_torch_in_float64(
    batch: int, heads: int, width: int, rows: int, columns: int, seed: int
) -> None:
    torch.manual_seed(seed)
    plain = cvt.Attention(heads * width, heads, 7, qkv_bias=True)
    fast = copy.deepcopy(plain)
    select_kernels_(fast, torch.float32, CPU)
    assert fast.use_c_kernel and not plain.use_c_kernel
    x, outer = torch.randn(2, batch, rows, columns, heads * width)
    expected = measured(plain.double(), x.double(), torch.float64, outer.double())
    check(measured(fast, x, torch.float32, outer), expected, torch.float32)


@pytest.mark.parametrize("width", [32, 64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_without_a_bias_the_kernel_computes_the_formula(width: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    heads, scale = 3, 0.3
    qkv = torch.randn(2, 14 * 21, 3 * heads * width).to(dtype).requires_grad_()
    index = window_layout(14, 21, 7, 0, CPU).token_index  # (windows, 49)
    out = window_attention.attend_in_windows(qkv, heads, None, index, None, None, scale)
    exact = qkv.detach().double().requires_grad_()
    q, k, v = exact[:, index].unflatten(-1, (3, heads, width)).permute(3, 0, 1, 4, 2, 5)
    expected = ((scale * q @ k.mT).softmax(-1) @ v).transpose(2, 3).flatten(3).flatten(1, 2)  # window by window
    outer = torch.randn_like(out)
    out.backward(outer)
    expected.backward(outer.double()[:, index.flatten()])
    assert exact.grad is not None and qkv.grad is not None
    check(
        {"out": out.detach()[:, index.flatten()], "qkv": qkv.grad},
        {"out": expected.detach(), "qkv": exact.grad},
        dtype,
    )


def test_the_c_kernel_runs_once_selected(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    monkeypatch.setattr(window_attention, "call", lambda name, jobs: calls.append(name))
    module = attention(1, 7, 3)
    module(torch.randn(1, 14, 14, 32))  # before selection
    assert not calls
    select_kernels_(module, torch.float32, CPU)
    module(torch.randn(1, 14, 14, 32)).sum().backward()
    assert calls == ["attend_32", "attend_backward_32"]


def test_heads_of_cvt_are_64_wide(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    monkeypatch.setattr(window_attention, "call", lambda name, jobs: calls.append(name))
    module = cvt.Attention(128, 2, 7, True)
    select_kernels_(module, torch.float32, CPU)
    module(torch.randn(1, 14, 14, 128)).sum().backward()
    assert calls == ["attend_64", "attend_backward_64"]


@pytest.mark.parametrize("window", [4, 14])
def test_torch_computes_unsupported_windows(window: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(window_attention, "call", pytest.fail)
    module = attention(2, window, 0)
    select_kernels_(module, torch.float32, CPU)
    assert module(torch.randn(1, 14, 14, 64)).shape == (1, 14, 14, 64)


def test_a_repeated_call_gives_the_same_bits() -> None:
    module = attention(2, 7, 3)
    select_kernels_(module, torch.float32, CPU)
    x, outer = torch.randn(2, 5, 13, 9, 64)
    first, second = (measured(module, x, torch.float32, outer) for _ in range(2))
    for name, value in first.items():
        torch.testing.assert_close(second[name], value, rtol=0, atol=0)


def test_nan_propagates() -> None:
    module = attention(1, 7, 0)
    select_kernels_(module, torch.float32, CPU)
    x = torch.randn(1, 7, 7, 32)
    x[0, 3, 3, 5] = torch.nan
    assert module(x).isnan().all()
