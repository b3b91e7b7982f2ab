"""Compiled blocks: one graph each, the same numbers, and random numbers that are drawn before the pass."""

from __future__ import annotations

import copy
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from esvit_core.models.compile_blocks import CompiledPasses, find_blocks
from esvit_core.models.layers.drawn_depth import DrawnDepth, FactorDraw, replace_stochastic_depth_
from esvit_core.models.layers.longformer import OFFSETS, OWN, SparseAttention, draw_neighbors_
from esvit_core.models.layers.position_table import LookUp, places_of_rows
from esvit_core.models.timm_backbone import TimmBackbone

CPU = torch.device("cpu")
KINDS = {"cvt": "PreNorm", "vil": "AttnBlock MlpBlock", "vit": "Block", "resnet": "Bottleneck"}


def values(network: nn.Module, passes: Callable[..., list[tuple[Tensor, Tensor]]]) -> list[Tensor]:
    """Return outputs for crops of two sizes, and the gradients of the parameters."""
    generator = torch.Generator().manual_seed(1)
    batches = [torch.randn(3, 3, size, size, generator=generator) for size in (64, 32)]
    outputs = [part for pair in passes(network, batches) for part in pair]
    weighted = [(part * torch.randn(part.shape, generator=generator)).sum() for part in outputs]
    torch.stack(weighted).sum().backward()
    gradients = [p.grad for p in network.parameters() if p.grad is not None]
    return [part.detach() for part in outputs] + gradients


def plain_passes(network: nn.Module, batches: list[Tensor]) -> list[tuple[Tensor, Tensor]]:
    return [network.views_and_regions(batch) for batch in batches]


@pytest.mark.parametrize("name", [*KINDS, "timm:convnext_atto", "timm:vit_tiny_patch16_224"])
def test_compiled_blocks_are_one_graph_and_compute_the_same(make_micro, name: str) -> None:
    """aot_eager traces forward and backward as inductor does; with fullgraph a part that cannot be traced raises."""
    torch.manual_seed(0)
    if name.startswith("timm:"):
        network = TimmBackbone(name.removeprefix("timm:"), 64, **({"depth": 2} if "vit" in name else {}))
    else:
        network = make_micro(name, **({"mode": 0} if name == "vil" else {}))
    plain, compiled = network.train(), copy.deepcopy(network)
    expected = values(plain, plain_passes)
    passes = CompiledPasses(compiled, backend="aot_eager")
    found = values(compiled, passes)
    assert len(found) == len(expected) > 10
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
    assert all(block._compiled_call_impl is not None for block in passes.blocks)
    if name in KINDS:
        assert {type(block).__name__ for block in passes.blocks} == set(KINDS[name].split())
    assert list(compiled.state_dict()) == list(plain.state_dict())


def test_blocks_of_equal_shapes_share_one_graph(make_micro) -> None:
    network = make_micro("vit", depth=6, drop_path_rate=0.3).train()
    passes, graphs = CompiledPasses(network, backend="aot_eager"), torch._dynamo.utils.counters["stats"]
    before = graphs["unique_graphs"]
    passes(network, [torch.randn(2, 3, 32, 32)])
    assert len(passes.blocks) == 6
    assert graphs["unique_graphs"] - before == 2  # the first block drops nothing


def test_the_networks_without_repeated_parts_have_no_blocks() -> None:
    assert find_blocks(nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2))) == []


def test_stochastic_depth_with_drawn_factors_keeps_the_expectation_and_whole_images(make_micro) -> None:
    network = make_micro("vil", drop_path_rate=0.5).train()
    depths = replace_stochastic_depth_(network)
    assert depths and all(isinstance(depth, DrawnDepth) and depth.drop_prob > 0 for depth in depths)
    torch.manual_seed(0)
    FactorDraw(depths, CPU).draw_(4001)
    for depth in depths:
        keep = 1 - depth.drop_prob
        assert depth.factors.unique().tolist() == [0.0, pytest.approx(1 / keep)]
        assert depth.factors.mean().item() == pytest.approx(1, abs=6 * (depth.drop_prob / keep / 4001) ** 0.5)
    depth, x = depths[-1], torch.randn(4001, 2, 3)
    torch.testing.assert_close(depth(x, lambda y: 2 * y), x + 2 * x * depth.factors.view(-1, 1, 1))
    torch.testing.assert_close(depth(x), x * depth.factors.view(-1, 1, 1))
    assert torch.equal(depth.eval()(x), x)


@pytest.mark.parametrize("offset", [i for i in range(9) if i != OWN])
def test_a_neighbor_drawn_on_the_device_gives_what_one_drawn_in_the_call_gives(offset: int, monkeypatch) -> None:
    torch.manual_seed(0)
    layer = SparseAttention(8, 2, 3, 1, qkv_bias=True, mode=1).train()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_()
    x = torch.randn(2, 1 + 5 * 8, 8)
    results = []
    for drawn in (None, torch.tensor([offset])):
        layer.drawn = drawn
        monkeypatch.setattr(layer, "_neighbor_windows", lambda: [OWN, offset]) if drawn is None else monkeypatch.undo()
        layer.zero_grad()
        given_x = x.clone().requires_grad_()
        out = layer(given_x, 5, 8)
        (out * torch.arange(8.0)).sum().backward()
        results.append([out.detach(), given_x.grad, *(p.grad for p in layer.parameters())])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_every_neighbor_is_drawn_and_the_window_itself_is_not() -> None:
    layers = [SparseAttention(4, 1, 2, 0, qkv_bias=True, mode=1) for _ in range(300)]
    torch.manual_seed(0)
    draw_neighbors_(layers, CPU)
    assert {int(layer.drawn) for layer in layers} == set(range(len(OFFSETS))) - {OWN}


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 3), st.integers(1, 12), st.integers(1, 6), st.integers(0, 99))
def test_the_gradient_of_a_table_is_the_sum_over_the_places_of_each_row(n, length, rows, seed) -> None:
    index = np.random.default_rng(seed).integers(0, rows, (n, length))
    places = torch.from_numpy(places_of_rows(index, rows))
    torch.manual_seed(seed)
    table, outer = torch.randn(rows, 2, requires_grad=True), torch.randn(n, length, 2)
    out = LookUp.apply(table, torch.from_numpy(index), places)
    expected = table[torch.from_numpy(index)]
    assert torch.equal(out, expected)
    (of_table,) = torch.autograd.grad(out, table, outer)
    (expected_of_table,) = torch.autograd.grad(expected, table, outer)
    torch.testing.assert_close(of_table, expected_of_table)
