"""Swin computes crops of several sizes at once as it computes them one after the other; Triton's interpreter runs the kernels."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from esvit_core.kernels.half_linear import HalfWeights
from esvit_core.models.layers.windows import WindowAttention
from esvit_core.models.swin import SwinTransformer

pytest.importorskip("triton")
if torch.cuda.is_available():
    pytest.skip("compiled here, not interpreted", allow_module_level=True)

from esvit_core.kernels import window_attention_triton
from esvit_core.models import packed_swin
from esvit_core.models.packed_swin import views_and_regions_of_sizes


def networks(drop_path: float = 0.0) -> tuple[SwinTransformer, SwinTransformer]:
    """A network that can be packed, and its copy that computes plainly."""
    torch.manual_seed(0)
    size = {"img_size": 16, "patch_size": 2, "embed_dim": 8, "window_size": 3}
    plain = SwinTransformer(depths=(2, 1), num_heads=(1, 2), drop_path_rate=drop_path, **size)
    for module in plain.modules():
        if isinstance(module, nn.LayerNorm | WindowAttention):
            for parameter in module.parameters(recurse=False):
                nn.init.normal_(parameter)
    packed = copy.deepcopy(plain)
    HalfWeights([packed], torch.float32).update_()
    for module in packed.modules():
        if isinstance(module, WindowAttention):
            module.triton_kernel = window_attention_triton
    return packed, plain


def crops() -> list[torch.Tensor]:
    return [torch.randn(1, 3, 15, 12), torch.randn(2, 3, 6, 6)]  # odd maps, padded windows, cut images


@pytest.mark.parametrize("checkpointing", [False, True])
def test_features_and_gradients_are_those_of_the_plain_network(checkpointing: bool) -> None:
    packed, plain = networks()
    packed.set_grad_checkpointing(checkpointing)
    batches = crops()
    found = views_and_regions_of_sizes(packed, batches)
    expected = [plain.views_and_regions(batch) for batch in batches]
    weights = [torch.randn_like(regions) for _, regions in expected]
    for (view, regions), (wanted_view, wanted_regions) in zip(found, expected, strict=True):
        torch.testing.assert_close(view, wanted_view, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(regions, wanted_regions, rtol=1e-4, atol=1e-5)
    for outputs in (found, expected):
        loss = torch.zeros(())
        for (view, regions), weight in zip(outputs, weights, strict=True):
            loss = loss + view.square().sum() + (regions * weight).sum()
        loss.backward()
    for (name, parameter), other in zip(packed.named_parameters(), plain.parameters(), strict=True):
        if other.grad is not None:
            torch.testing.assert_close(parameter.grad, other.grad, rtol=1e-3, atol=1e-4, msg=name)


def test_each_branch_is_dropped_for_whole_images() -> None:
    packed, _ = networks(drop_path=0.5)
    torch.manual_seed(1)
    scales = list(packed_swin._draw_scales(packed, 400, torch.device("cpu")))
    assert scales[:2] == [None, None] and len(scales) == 6  # the rate of the first block is 0
    for scale, keep in zip(scales[2:], [0.75, 0.75, 0.5, 0.5], strict=True):
        assert scale is not None and set(scale.tolist()) == {0.0, (1 / torch.tensor(keep)).item()}
        assert abs((scale > 0).float().mean().item() - keep) < 0.1
    packed.eval()
    assert set(packed_swin._draw_scales(packed, 4, torch.device("cpu"))) == {None}


def test_a_network_without_the_kernels_computes_one_size_after_the_other() -> None:
    _, plain = networks()
    batches = crops()
    for found, batch in zip(views_and_regions_of_sizes(plain, batches), batches, strict=True):
        for mine, theirs in zip(found, plain.views_and_regions(batch), strict=True):
            assert torch.equal(mine, theirs)
