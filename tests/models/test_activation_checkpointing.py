"""Recomputed activations equal the saved ones, and they are not saved."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from esvit_core.models.layers import activation_checkpointing
from esvit_core.models.layers.activation_checkpointing import checkpoint_activation
from esvit_core.models.swin import SwinBlock


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("function", [nn.GELU(), nn.LayerNorm(16)])
def test_gradients_are_the_same_bit_for_bit(function: nn.Module, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    layer, x = nn.Linear(16, 8), torch.randn(2, 3, 5, 16)
    results = []
    for apply in (checkpoint_activation, lambda f, x, then: then(f(x))):
        inputs = x.clone().requires_grad_()
        layer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            out = apply(function, inputs, layer)
        out.float().square().sum().backward()
        results.append([out, inputs.grad, layer.weight.grad.clone(), layer.bias.grad.clone()])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def saved_bytes(out: torch.Tensor) -> int:
    """Bytes of the tensors that the graph of ``out`` keeps."""
    storages = {}

    def walk(node: Any) -> None:
        for name in dir(node):
            if name.startswith("_raw_saved"):
                for saved in s if isinstance(s := getattr(node, name), tuple) else (s,):
                    data = saved.data if isinstance(saved.data, torch.Tensor) else None
                    if data is not None:
                        storages[data.untyped_storage().data_ptr()] = data.untyped_storage().nbytes()
        for following, _ in node.next_functions:
            if following is not None:
                walk(following)

    walk(out.grad_fn)
    return sum(storages.values())


@pytest.mark.parametrize("input_dtype", [torch.float32, torch.bfloat16])
def test_a_norm_in_float32_is_recomputed_where_autocast_casts_its_output(
    monkeypatch: pytest.MonkeyPatch, input_dtype: torch.dtype
) -> None:
    """As on a GPU, where autocast computes norms in float32 and the linear layer saves a copy in bfloat16."""

    def norm(t: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.layer_norm(t.float(), (64,))

    torch.manual_seed(0)
    layer, x = nn.Linear(64, 16), torch.randn(32, 64).to(input_dtype)
    monkeypatch.setattr(activation_checkpointing, "_autocast_dtype", lambda device: torch.bfloat16)
    results, kept = [], []
    for apply in (checkpoint_activation, lambda f, x, then: then(f(x))):
        inputs = x.clone().requires_grad_()
        layer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            out = apply(norm, inputs, layer)
        kept.append(saved_bytes(out))
        out.float().square().sum().backward()
        results.append([out, inputs.grad, layer.weight.grad.clone(), layer.bias.grad.clone()])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert kept[1] - kept[0] >= 2 * x.numel()


@pytest.mark.parametrize("gradient", [True, False])
def test_the_activation_is_recomputed_once_if_there_is_a_gradient(gradient: bool) -> None:
    calls = []

    def function(t: torch.Tensor) -> torch.Tensor:
        calls.append(t)
        return torch.nn.functional.gelu(t)

    layer, x = nn.Linear(16, 8), torch.randn(4, 16, requires_grad=True)
    with torch.set_grad_enabled(gradient):
        out = checkpoint_activation(function, x, layer)
    assert len(calls) == 1
    if gradient:
        out.sum().backward()
        assert len(calls) == 2


def test_the_graph_of_a_block_saves_a_quarter_less() -> None:
    block, x = SwinBlock(32, 1, 7, 0, 4.0, True, 0.0), torch.randn(1, 14, 14, 32, requires_grad=True)

    def plain(x: torch.Tensor) -> torch.Tensor:
        y = x + block.attn(block.norm1(x))
        return y + block.mlp(block.norm2(y))

    assert saved_bytes(block(x)) < 0.75 * saved_bytes(plain(x))
