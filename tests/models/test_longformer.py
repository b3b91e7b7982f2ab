"""Sparse attention of Vision Longformer against full attention with a mask."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from esvit_core.models.layers.longformer import OFFSETS, OWN, FullAttention, SparseAttention
from esvit_core.models.vil import VisionLongformer, parse_architecture, switch_mode_

HEADS, DIM = 2, 8


def made(window: int, global_tokens: int, mode: int) -> SparseAttention:
    torch.manual_seed(0)
    layer = SparseAttention(DIM, HEADS, window, global_tokens, qkv_bias=True, mode=mode)
    with torch.no_grad():
        for p in layer.parameters():
            p.normal_()
    return layer


def plain_attention(layer: SparseAttention, x: torch.Tensor, height: int, width: int, seen: list[int]) -> torch.Tensor:
    """Full attention in which a token attends to the windows ``seen`` from its own, with biases by distance."""
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


def test_training_in_mode_1_attends_to_one_random_neighbor():
    layer = made(2, 1, mode=1).train()
    x = torch.randn(2, 1 + 36, DIM)
    drawn = set()
    for seed in range(40):
        torch.manual_seed(seed)
        (own, neighbour) = layer._neighbor_windows()
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
    assert (first.absolute, parse_architecture("l1")[0].absolute) == (False, True)
    assert [stage.sparse for stage in parse_architecture("l1,s1_l2,s0_l3,s1")] == [True, False, False]


@pytest.mark.parametrize("text", ["", "l1,h3,x2", "l1,h", "l1 h3", "l1,h3,d96,r1"])
def test_other_strings_are_refused(text):
    with pytest.raises(ValueError, match="stage 1"):
        parse_architecture(text)


def network(arch: str, **values) -> VisionLongformer:
    torch.manual_seed(0)
    return VisionLongformer(arch, img_size=16, drop_path_rate=0.0, **values)


SMALL = "l1,h2,d8,n1,s1,g1,p2,f2,a0_l2,h2,d16,n1,s0,g0,p2,f2,a0"


def test_global_tokens_can_have_separate_weights():
    shared, own = network(SMALL, mode=0), network(SMALL, mode=0, share_weights=False)
    state = shared.state_dict()
    assert set(state) == set(own.state_dict())  # shared weights carry both names
    own.load_state_dict(state)
    x = torch.randn(2, 3, 16, 16)
    torch.testing.assert_close(own(x), shared(x))
    with torch.no_grad():
        own.layer1[1].attn.kv_global.weight.normal_()
    before = shared.last_blocks(x, 2)
    assert not torch.allclose(own.last_blocks(x, 2), before)  # the global token is the first stage's feature


@torch.no_grad()
def test_absolute_positions_distinguish_positions():
    absolute = network(SMALL.replace("a0", "a1").replace("s1", "s0")).eval()
    assert not [name for name in absolute.state_dict() if "relative" in name]
    same = torch.ones(1, 3, 16, 16)
    regions = absolute.views_and_regions(same)[1][0]
    assert (regions[0] - regions[-1]).abs().max() > 1e-4
    for embed in ("x_pos_embed", "y_pos_embed"):
        for stage in (absolute.layer1, absolute.layer2):
            getattr(stage[0], embed).zero_()
    regions = absolute.views_and_regions(same)[1][0]
    torch.testing.assert_close(regions, regions[:1].expand_as(regions))
    for size in (8, 16, 24, (8, 16)):
        height, width = (size, size) if isinstance(size, int) else size
        assert absolute.forward_features(torch.zeros(1, 3, height, width)).shape[1:3] == (height // 4, width // 4)


@pytest.mark.parametrize(
    ("mode", "switch", "expected"),
    [(1, 0.75, [1, 1, 1, 0]), (1, 1.0, [1, 1, 1, 1]), (1, 0.0, [0, 0, 0, 0]), (-1, 0.5, [-1] * 4), (0, 0.5, [0] * 4)],
)
def test_random_neighbors_end_after_their_share_of_the_epochs(mode, switch, expected):
    backbone = network(SMALL, mode=mode)
    found = []
    for epoch in range(4):
        switch_mode_(backbone, switch, epoch, 4)
        found.append(backbone.layer1[1].attn.mode)
    assert found == expected
    switch_mode_(backbone, switch, 0, 4)  # the mode depends on the epoch only: a run that goes on has the same
    assert backbone.layer1[1].attn.mode == expected[0]
    switch_mode_(torch.nn.Identity(), switch, 3, 4)
