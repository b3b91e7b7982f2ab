"""Every implementation of attention computes the same, and the fastest for the device is selected."""

from __future__ import annotations

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor

from esvit_core.kernels.choose import select_kernels_
from esvit_core.models.layers.attention import attend

CPU = torch.device("cpu")
SHAPES = {
    "windows": ((2, 3, 4, 9, 8), (2, 3, 4, 19, 8), (3, 4, 9, 19)),
    "map": ((2, 4, 9, 8), (2, 4, 9, 8), (1, 4, 9, 9)),
}


@pytest.mark.parametrize("shapes", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_values_and_gradients_are_those_of_the_formula(
    shapes: tuple[tuple[int, ...], ...], biased: bool, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    queries, keys, biases = shapes
    inputs = [torch.randn(shape, dtype=torch.float64) for shape in (queries, keys, keys, biases)]
    inputs[3][..., -2:] = -torch.inf  # as where a window would see padding

    def measured(form: str, dtype: torch.dtype) -> list[Tensor]:
        q, k, v, bias = given = [t.to(dtype).requires_grad_() for t in inputs]
        if form == "ours":
            out = attend(q, k, v, bias if biased else None, 0.3)
        else:
            logits = 0.3 * torch.einsum("...nd,...md->...nm", q, k) + (bias if biased else 0)
            out = torch.einsum("...nm,...md->...nd", F.softmax(logits, -1), v)
        used = given if biased else given[:3]
        return [t.double() for t in (out, *torch.autograd.grad(out.square().sum(), used))]

    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 0.05}[dtype]
    for found, expected in zip(measured("ours", dtype), measured("formula", torch.float64), strict=True):
        torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance * expected.abs().max().item())


def test_timm_networks_do_not_use_fused_attention_in_bfloat16_on_a_cpu() -> None:
    network = timm.create_model("vit_tiny_patch16_224", depth=2, img_size=32, num_classes=0)
    images = torch.randn(2, 3, 32, 32)
    fused = network(images)
    for dtype, device in ((torch.float32, CPU), (torch.bfloat16, torch.device("cuda"))):
        select_kernels_(network, dtype, device)
        assert all(block.attn.fused_attn for block in network.blocks)
    select_kernels_(network, torch.bfloat16, CPU)
    assert not any(block.attn.fused_attn for block in network.blocks)
    torch.testing.assert_close(network(images), fused)
