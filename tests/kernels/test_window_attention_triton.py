"""The Triton kernels of window attention, in Triton's interpreter on a CPU, agree with the plain formula."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from esvit_core.models.layers.attention import attend_plainly
from esvit_core.models.layers.windows import FromWindows, WindowAttention, window_layout

pytest.importorskip("triton")
if torch.cuda.is_available():
    pytest.skip("compiled here, not interpreted", allow_module_level=True)

from esvit_core.kernels import large_window_attention_triton as large
from esvit_core.kernels import window_attention_triton as small
from esvit_core.kernels.choose import select_triton_kernels_

BOTH = pytest.mark.parametrize("kernels", [small, large], ids=["small", "large"])
CPU = torch.device("cpu")


def layer_of(heads: int, width: int, window: int, shift: int, bias: bool = True) -> WindowAttention:
    layer = WindowAttention(heads * width, heads, window, shift, bias)
    for parameter in (layer.relative_position_bias_table, *([layer.qkv.bias] if bias else [])):
        nn.init.normal_(parameter)
    return layer


def plainly(layer: WindowAttention, qkv: Tensor, maps: tuple[tuple[int, int, int], ...]) -> Tensor:
    """The formula for each kind of map, in windows that are copied."""
    outputs = []
    for part, (images, height, width) in zip(qkv.split([b * h * w for b, h, w in maps]), maps, strict=True):
        layout = window_layout(height, width, layer.window_size, layer.shift_size, CPU)
        q, k, v = layer._in_windows(part.view(images, height * width, -1), layout)
        out = attend_plainly(q, k, v, layer._masked_bias(layout), layer.scale)
        outputs.append(FromWindows.apply(out.transpose(2, 3).reshape(images, -1, qkv.shape[1] // 3), layout))
    return torch.cat([out.flatten(0, 1) for out in outputs])


@settings(max_examples=12, deadline=None)
@given(
    maps=st.lists(st.tuples(st.integers(1, 2), st.integers(1, 7), st.integers(1, 7)), min_size=1, max_size=2),
    heads=st.integers(1, 2),
    width=st.sampled_from([8, 16]),
    window=st.integers(2, 6),
    shift=st.integers(0, 2),
    bias=st.booleans(),
    seed=st.integers(0, 2**31),
)
@BOTH
def test_values_and_gradients_are_those_of_the_formula(kernels, maps, heads, width, window, shift, bias, seed) -> None:
    maps, shift = tuple(maps), min(shift, window - 1)
    torch.manual_seed(seed)
    layer = layer_of(heads, width, window, shift, bias)
    tokens = sum(b * h * w for b, h, w in maps)
    qkv = torch.randn(tokens, 3 * heads * width, requires_grad=True)
    outer = torch.randn(tokens, heads * width)
    leaves = [qkv, layer.relative_position_bias_table, *([layer.qkv.bias] if bias else [])]
    layer.triton_kernel = kernels
    results = []
    for out in (layer.attend_to_maps(qkv, maps), plainly(layer, qkv, maps)):
        results.append([out, *torch.autograd.grad(out, leaves, outer, allow_unused=True)])
    for found, expected in zip(*results, strict=True):
        expected = torch.zeros_like(found) if expected is None else expected  # no padding
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("kernels", "window"), [(small, 7), (large, 9)])
def test_half_precision_is_rounded_once(kernels: ModuleType, window: int) -> None:
    """float16, because the interpreter knows no product of bfloat16."""
    torch.manual_seed(0)
    layer, maps = layer_of(2, 32, window, 3), ((1, 9, 8),)
    layer.triton_kernel = kernels
    qkv = torch.randn(72, 192).half().requires_grad_()
    out = layer.attend_to_maps(qkv, maps)
    exact = qkv.detach().float().requires_grad_()
    expected = plainly(layer, exact, maps)
    outer = torch.randn(72, 64).half()
    out.backward(outer)
    expected.backward(outer.float())
    assert out.dtype == qkv.grad.dtype == torch.float16
    torch.testing.assert_close(out.float(), expected, rtol=2e-3, atol=2e-3)
    torch.testing.assert_close(qkv.grad.float(), exact.grad, rtol=5e-3, atol=5e-3)


def test_the_published_windows_of_14() -> None:
    torch.manual_seed(0)
    layer, maps = layer_of(1, 8, 14, 7), ((1, 15, 14), (1, 6, 6))
    layer.triton_kernel = large
    qkv, outer = torch.randn(246, 24, requires_grad=True), torch.randn(246, 8)
    leaves = [qkv, layer.relative_position_bias_table, layer.qkv.bias]
    found, expected = layer.attend_to_maps(qkv, maps), plainly(layer, qkv, maps)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    for mine, theirs in zip(*(torch.autograd.grad(out, leaves, outer) for out in (found, expected)), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("window", "kernels"), [(7, small), (8, small), (9, large), (16, large)])
def test_the_kernels_are_selected_by_the_size_of_the_window(window: int, kernels: ModuleType) -> None:
    layer = layer_of(1, 8, window, 0)
    select_triton_kernels_(layer)
    assert layer.triton_kernel is kernels and layer.supports_triton(window**2)


@BOTH
def test_the_layer_uses_the_kernel_for_the_windows_it_supports(
    kernels: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    layer, x = layer_of(2, 8, 3, 1), torch.randn(2, 5, 4, 16)
    expected = layer(x)
    layer.triton_kernel = kernels
    torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=1e-4)
    monkeypatch.setattr(kernels, "MAX_WINDOW", 2)
    assert torch.equal(layer(x), expected)


@BOTH
def test_offsets_that_need_more_than_32_bits_are_not_supported(kernels: ModuleType) -> None:
    assert kernels.supports(5_000_000, 96, 3, 7)
    assert not kernels.supports(10_000_000, 96, 3, 7)
