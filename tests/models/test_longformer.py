"""Sparse attention of Vision Longformer against full attention with a mask."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from esvit_core.models.longformer import OFFSETS, OWN, FullAttention, SparseAttention
from esvit_core.models.vil import parse_architecture

HEADS, DIM = 2, 8


def made(window: int, global_tokens: int, mode: int) -> SparseAttention:
    torch.manual_seed(0)
    layer = SparseAttention(DIM, HEADS, window, global_tokens, qkv_bias=True, mode=mode)
    with torch.no_grad():
        for p in layer.parameters():
            p.normal_()
    return layer


def plain_attention(layer: SparseAttention, x: torch.Tensor, height: int, width: int, seen: list[int]) -> torch.Tensor:
    """Full attention where a token may look at the windows ``seen`` from its own, with biases by distance."""
    G, w = layer.global_tokens, layer.window_size
    q = layer.query(x).unflatten(-1, (HEADS, -1)).transpose(1, 2)
    k, v = layer.kv(x).unflatten(-1, (2, HEADS, -1)).permute(2, 0, 3, 1, 4)
    row, column = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    row, column = row.flatten(), column.flatten()
    difference = [a[:, None] - a[None] for a in (row, column)]  # query minus key
    window = [(a // w)[None] - (a // w)[:, None] for a in (row, column)]  # key's minus query's
    allowed = sum(((window[0] == OFFSETS[i][0]) & (window[1] == OFFSETS[i][1])) for i in seen).bool()
    reach = 2 * w - 1
    index = (difference[0] + reach).clamp(0, 2 * reach) * (2 * reach + 1) + (difference[1] + reach).clamp(0, 2 * reach)
    bias = torch.zeros(HEADS, G + height * width, G + height * width)
    bias[:, G:, G:] = layer.local_relative_position_bias_table[index].permute(2, 0, 1)
    bias[:, G:, G:].masked_fill_(~allowed, -torch.inf)
    if G:
        bias[:, :G, :G] = layer.g2g_relative_position_bias
        bias[:, :G, G:] = layer.g2l_relative_position_bias[0][..., None]
        bias[:, G:, :G] = layer.g2l_relative_position_bias[1][:, None]
    out = (q @ k.mT * (DIM // HEADS) ** -0.5 + bias).softmax(-1) @ v
    return layer.proj(out.transpose(1, 2).flatten(2))


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 9), st.integers(1, 9), st.integers(2, 4), st.integers(0, 2), st.sampled_from([-1, 0, 1]))
def test_sparse_attention_is_full_attention_with_a_mask(height, width, window, global_tokens, mode):
    layer = made(window, global_tokens, mode).eval()
    x = torch.randn(2, global_tokens + height * width, DIM)
    expected = plain_attention(layer, x, height, width, [OWN] if mode == -1 else list(range(9)))
    torch.testing.assert_close(layer(x, height, width), expected, rtol=1e-3, atol=1e-3)


def test_training_in_mode_1_sees_one_random_neighbour():
    layer = made(2, 1, mode=1).train()
    x = torch.randn(2, 1 + 36, DIM)
    drawn = set()
    for seed in range(40):
        torch.manual_seed(seed)
        (own, neighbour) = layer._neighbours()
        assert own == OWN and neighbour != OWN
        drawn.add(neighbour)
        torch.manual_seed(seed)
        torch.testing.assert_close(
            layer(x, 6, 6), plain_attention(layer, x, 6, 6, [own, neighbour]), rtol=1e-3, atol=1e-3
        )
    assert drawn == set(range(9)) - {OWN}


def test_full_attention_resizes_its_biases_for_other_maps():
    torch.manual_seed(0)
    layer = FullAttention(DIM, HEADS, (4, 4), 1, qkv_bias=True)
    assert layer._bias(16).shape == (1, HEADS, 17, 17)
    bias = layer._bias(9)
    assert bias.shape == (1, HEADS, 10, 10)
    assert torch.equal(bias[0, :, 0, 0], layer.g2g_relative_position_bias[:, 0, 0])
    out = layer(torch.randn(2, 10, DIM), 3, 3)
    torch.testing.assert_close(layer.weights(torch.randn(2, 10, DIM), 3, 3).sum(-1), torch.ones(2, HEADS, 10))
    assert out.shape == (2, 10, DIM)


def test_architecture_strings():
    first, second = parse_architecture("l1,h3,d96,n2,s1,g1,p4,f7,a0_l2,h6,d192,s0,g0,a0")
    assert (first.heads, first.dim, first.blocks, first.sparse, first.patch, first.window) == (3, 96, 2, True, 4, 7)
    assert (second.blocks, second.sparse, second.global_tokens, second.patch) == (1, False, 0, 2)
    with pytest.raises(ValueError, match="relative positions"):
        parse_architecture("l1,h3,d96,n2,s1,g1,p4,f7,a1")
