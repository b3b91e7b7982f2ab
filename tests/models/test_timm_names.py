"""Weights convert to stock timm networks and back, and give the same features there."""

from __future__ import annotations

from functools import partial

import pytest
import timm
import torch
from timm.models.resnet import Bottleneck, ResNet
from timm.models.swin_transformer import SwinTransformer
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from esvit_core.config import ModelConfig
from esvit_core.errors import UserError
from esvit_core.models import create_backbone
from esvit_core.weights.timm_names import COMPUTED, from_timm, stock_network, to_timm

IN_TIMM = ["swin_tiny_w7", "swin_base_w14", "deit_tiny", "vit_base", "resnet50"]
STOCK = {
    "swin": lambda: SwinTransformer(
        32, 2, 3, 5, embed_dim=8, depths=(2, 2, 2), num_heads=(1, 2, 2), window_size=4, norm_layer=LayerNorm
    ),
    "vit": lambda: VisionTransformer(32, 8, num_classes=5, embed_dim=16, depth=4, num_heads=2),
    "resnet": lambda: ResNet(Bottleneck, (1, 1, 1, 2), 5, channels=(4, 6, 8, 10), stem_width=8),
}
LayerNorm = partial(nn.LayerNorm, eps=1e-6)


def weights(network: nn.Module) -> dict[str, torch.Tensor]:
    """The entries of the state that are not computed on construction."""
    return {name: value for name, value in network.state_dict().items() if name.rpartition(".")[2] not in COMPUTED}


@torch.no_grad()
@pytest.mark.parametrize("name", STOCK)
def test_a_stock_network_with_our_weights_gives_our_features(name, make_micro):
    ours, stock = make_micro(name).eval(), STOCK[name]().eval()
    stock.reset_classifier(0)
    stock.load_state_dict(to_timm(name, ours.state_dict()), strict=True)
    x = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(stock(x), ours(x), atol=1e-5, rtol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("name", STOCK)
def test_our_network_with_stock_weights_gives_its_features(name, make_micro):
    ours, stock = make_micro(name).eval(), STOCK[name]().eval()
    missing, left_over = ours.load_state_dict(from_timm(name, stock.state_dict()), strict=False)
    assert not left_over and {key.rpartition(".")[2] for key in missing} <= {"relative_position_index"}
    x = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(
        ours(x), stock.forward_head(stock.forward_features(x), pre_logits=True), atol=1e-5, rtol=1e-5
    )


@pytest.mark.parametrize("name", STOCK)
def test_there_and_back_is_bitwise(name, make_micro):
    state = weights(make_micro(name))
    back = from_timm(name, to_timm(name, state))
    assert list(back) == list(state)
    assert all(torch.equal(back[key], state[key]) for key in state)


@pytest.mark.parametrize("arch", IN_TIMM)
def test_names_and_shapes_are_those_of_the_stock_network(arch):
    name, arguments = stock_network(arch)
    with torch.device("meta"):
        ours = create_backbone(ModelConfig(arch=arch))
        stock = timm.create_model(name, num_classes=0, **arguments)
    shapes = {key: value.shape for key, value in stock.state_dict().items()}
    assert {key: value.shape for key, value in to_timm(arch, ours.state_dict()).items()} == shapes


def test_files_of_the_swin_authors_keep_their_patch_merging(make_micro):
    state = make_micro("swin").state_dict()
    theirs = {**state, "layers.0.blocks.1.attn_mask": torch.zeros(4), "head.weight": torch.zeros(5, 32)}
    assert list(from_timm("swin", theirs)) == list(weights(make_micro("swin")))


def test_any_other_network_of_timm_loses_its_classifier_only():
    with torch.device("meta"):
        whole = timm.create_model("convnext_atto").state_dict()
        headless = timm.create_model("convnext_atto", num_classes=0).state_dict()
    taken = from_timm("timm:convnext_atto", whole)
    assert list(taken) == [f"model.{name}" for name in headless]
    assert list(to_timm("timm:convnext_atto", taken)) == list(headless)


@pytest.mark.parametrize("arch", ["cvt_tiny", "vil_2262"])
def test_what_timm_does_not_have_is_reported(arch):
    with pytest.raises(UserError, match=f"{arch}: stock timm has no equivalent network; .*swin"):
        stock_network(arch)
