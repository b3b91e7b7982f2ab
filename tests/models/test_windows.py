"""Windows by index equal windows by padding, rolling and partitioning, and so does the attention over them."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from esvit_core.models.layers.attention import attend
from esvit_core.models.layers.windows import FromWindows, ToWindows, WindowAttention, attend_fused, window_layout

CPU = torch.device("cpu")


@st.composite
def maps(draw) -> tuple[int, int, int, int]:
    """Height, width, window, shift."""
    window = draw(st.integers(2, 5))
    side = st.integers(1, 11)
    return draw(side), draw(side), window, draw(st.sampled_from([0, window // 2]))


def cut(x: torch.Tensor, window: int, shift: int) -> torch.Tensor:
    """Partition (B, H, W, C) -> (B, windows, N, C) by reshaping."""
    B, H, W, C = x.shape
    x = F.pad(x, (0, 0, 0, -W % window, 0, -H % window)).roll((-shift, -shift), (1, 2))
    x = x.unflatten(1, (-1, window)).unflatten(3, (-1, window)).transpose(2, 3)  # (B, rows, columns, w, w, C)
    return x.reshape(B, -1, window**2, C)


def paste(windows: torch.Tensor, height: int, width: int, window: int, shift: int) -> torch.Tensor:
    """The inverse of the partition."""
    rows, columns = -(-height // window), -(-width // window)
    x = windows.unflatten(1, (rows, columns)).unflatten(3, (window, window)).transpose(2, 3)
    x = x.reshape(len(x), rows * window, columns * window, -1)
    return x.roll((shift, shift), (1, 2))[:, :height, :width]


@settings(max_examples=60, deadline=None)
@given(maps())
def test_windows_hold_the_tokens_and_give_them_back(shape):
    height, width, window, shift = shape
    x = torch.randn(2, height, width, 3)
    layout = window_layout(height, width, window, shift, CPU)
    windows = ToWindows.apply(x.flatten(1, 2), torch.zeros(3), layout)
    assert torch.equal(windows.view(2, layout.windows, -1, 3), cut(x, window, shift))
    assert torch.equal(FromWindows.apply(windows, layout), x.flatten(1, 2))


def test_gradients_by_finite_differences():
    layout = window_layout(3, 4, 2, 1, CPU)
    tokens = torch.randn(2, 12, 2, dtype=torch.float64, requires_grad=True)
    fill = torch.randn(2, dtype=torch.float64, requires_grad=True)
    windows = torch.randn(2, len(layout.index), 2, dtype=torch.float64, requires_grad=True)
    assert layout.padding is not None
    assert torch.autograd.gradcheck(lambda t, f: ToWindows.apply(t, f, layout), (tokens, fill))
    assert torch.autograd.gradcheck(lambda w: FromWindows.apply(w, layout), windows)


def plain_attention(layer: WindowAttention, x: torch.Tensor) -> torch.Tensor:
    """The published order: pad, roll, partition, project, add bias and mask, reverse."""
    _, H, W, C = x.shape
    w, shift, heads = layer.window_size, layer.shift_size, layer.num_heads
    windows = cut(x, w, shift)  # (B, windows, N, C)
    q, k, v = layer.qkv(windows).unflatten(-1, (3, heads, -1)).permute(3, 0, 1, 4, 2, 5)
    logits = q @ k.mT * (C // heads) ** -0.5
    table = layer.relative_position_bias_table[layer.relative_position_index.view(-1)]
    logits = logits + table.view(w * w, w * w, heads).permute(2, 0, 1)
    if shift:
        part = torch.zeros(1, -(-H // w) * w, -(-W // w) * w, 1)
        borders = (slice(0, -w), slice(-w, -shift), slice(-shift, None))
        for i, rows in enumerate(borders):
            for j, columns in enumerate(borders):
                part[:, rows, columns] = 3 * i + j
        part = cut(part, w, 0)  # (1, windows, N, 1)
        logits = logits - 100 * (part != part.mT)[:, :, None].float()
    out = (logits.softmax(-1) @ v).transpose(2, 3).flatten(3)
    return layer.proj(paste(out, H, W, w, shift))


@settings(max_examples=40, deadline=None)
@given(maps(), st.integers(1, 3), st.booleans())
def test_attention_equals_padding_rolling_and_masking(shape, heads, bias):
    height, width, window, shift = shape
    torch.manual_seed(0)
    layer = WindowAttention(4 * heads, heads, window, shift, qkv_bias=bias).double()
    with torch.no_grad():
        for p in layer.parameters():
            p.normal_()
    x = torch.randn(2, height, width, 4 * heads, dtype=torch.float64, requires_grad=True)
    results = []
    for attention in (layer, lambda x: plain_attention(layer, x)):
        out = attention(x)
        inputs = [x, *layer.parameters()]
        results.append((out, *torch.autograd.grad(out.square().sum(), inputs)))
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("biases", [1, 3])
def test_the_form_for_gpus_computes_the_same(biases):
    torch.manual_seed(0)
    inputs = [torch.randn(2, 3, 4, 9, 8, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    inputs.append(torch.randn(biases, 4, 9, 9, dtype=torch.float64, requires_grad=True))
    results = []
    for form in (attend, attend_fused):
        out = form(*inputs, 8**-0.5)
        results.append((out, *torch.autograd.grad(out.square().sum(), inputs)))
    torch.testing.assert_close(*results)


def test_layouts_are_computed_once_per_resolution():
    assert window_layout(6, 6, 4, 2, CPU) is window_layout(6, 6, 4, 2, CPU)
    assert window_layout(6, 6, 4, 2, CPU).mask is not None
    assert window_layout(6, 6, 4, 0, CPU).mask is None
