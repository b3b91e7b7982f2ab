"""Every network has timm's interface and EsViT's."""

from __future__ import annotations

import copy

import pytest
import timm
import torch
from timm.layers import DropPath
from timm.models._manipulate import group_parameters

from esvit_core.config import ModelConfig
from esvit_core.models import create_backbone
from esvit_core.models.timm_backbone import TimmBackbone


def images(size: int = 32, seed: int = 0) -> torch.Tensor:
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
@pytest.mark.parametrize("size", [32, 16, 40, 50])
def test_view_regions_and_timms_forward_agree(backbone, micro, size):
    x = images(size)
    view, regions = backbone.views_and_regions(x)
    features = backbone.forward_features(x)
    assert view.shape == (2, backbone.num_features)
    assert regions.shape[0] == 2 and regions.shape[2] == backbone.num_features
    torch.testing.assert_close(backbone(x), view)
    torch.testing.assert_close(backbone.forward_head(features, pre_logits=True), view)
    if micro == "vit":
        assert torch.equal(view, features[:, 0]) and torch.equal(regions, features[:, 1:])
    else:
        torch.testing.assert_close(regions.mean(1), view)
    heat = backbone.attention_map(x)
    assert heat.shape[0] == 2 and heat.shape[2] * heat.shape[3] == regions.shape[1]
    assert torch.isfinite(heat).all() and (heat >= 0).all()


@torch.no_grad()
def test_images_need_not_be_square(backbone):
    x = torch.randn(2, 3, 32, 48)
    view, regions = backbone.views_and_regions(x)
    heat = backbone.attention_map(x)
    assert heat.shape[3] > heat.shape[2]
    assert regions.shape[1] == heat.shape[2] * heat.shape[3]
    assert torch.isfinite(view).all()


@torch.no_grad()
def test_images_of_a_batch_do_not_affect_each_other(backbone):
    x = images()
    alone = torch.cat([backbone(image[None]) for image in x])
    torch.testing.assert_close(backbone(x), alone, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_last_blocks(backbone, micro):
    x = images()
    one, four = backbone.last_blocks(x, 1), backbone.last_blocks(x, 4)
    assert one.ndim == four.ndim == 2 and four.shape[1] > one.shape[1]
    view = backbone(x)
    if micro == "vit":
        assert four.shape[1] == 5 * backbone.num_features
        torch.testing.assert_close(one[:, : view.shape[1]], view)
    else:
        torch.testing.assert_close(one, view)  # the last block is the one that is normed
        torch.testing.assert_close(four[:, -view.shape[1] :], one)


@torch.no_grad()
def test_one_pass_gives_both_features_bit_for_bit(backbone):
    backbone.eval()
    view, blocks = backbone.view_and_last_blocks(images(), 2)
    assert torch.equal(view, backbone(images()))
    assert torch.equal(blocks, backbone.last_blocks(images(), 2))


@torch.no_grad()
@pytest.mark.parametrize("name", ["resnet18", "convnext_atto", "deit_tiny_distilled_patch16_224"])
def test_one_pass_of_a_network_of_timm_gives_both_features_bit_for_bit(name):
    backbone, passes = TimmBackbone(name, 64).eval(), []
    x = images(backbone.img_size)
    view, blocks = backbone(x), backbone.last_blocks(x, 2)
    stem = next(layer for layer in backbone.modules() if isinstance(layer, torch.nn.Conv2d))
    stem.register_forward_hook(lambda *_: passes.append(1))
    found = backbone.view_and_last_blocks(x, 2)
    assert torch.equal(found[0], view) and torch.equal(found[1], blocks)
    assert len(passes) == 1


@torch.no_grad()
def test_last_attention_is_a_distribution(backbone, micro):
    if micro == "resnet":
        with pytest.raises(ValueError, match="no attention"):
            backbone.last_attention(images())
        return
    attention = backbone.last_attention(images())
    assert attention.ndim == 4 and attention.shape[2] == attention.shape[3]
    torch.testing.assert_close(attention.sum(-1), torch.ones(attention.shape[:3]))


@torch.no_grad()
@pytest.mark.parametrize("size", [16, 24, 32, 48])
def test_attention_map_distributes_the_attention_of_the_queries(backbone, micro, size):
    x = images(size)
    heat = backbone.attention_map(x)
    attention = None if micro == "resnet" else backbone.last_attention(x)
    if micro == "vit":
        own = attention[:, :, 0, 0]  # what the class token keeps for itself
        torch.testing.assert_close(heat.sum((2, 3)), 1 - own)
    elif micro == "vil":
        torch.testing.assert_close(heat.sum((2, 3)), torch.ones(heat.shape[:2]))
    elif attention is not None:
        windows = attention.shape[0] / 2
        whole = heat[0, 0].numel() == windows * attention.shape[-1]  # without padding, which receives the rest
        total = heat.sum((2, 3))
        assert (total <= windows + 1e-4).all() and (total > 0).all()
        if whole:
            torch.testing.assert_close(total, torch.full_like(total, windows))


@torch.no_grad()
def test_intermediates(backbone, micro):
    x = images()
    final, maps = backbone.forward_intermediates(x)
    torch.testing.assert_close(final, backbone.forward_features(x))
    assert len(maps) == len(backbone.feature_info)
    for found, info in zip(maps, backbone.feature_info, strict=True):
        assert found.shape[:2] == (2, info["num_chs"])
        assert found.shape[2] == -(-x.shape[2] // info["reduction"])
    only = backbone.forward_intermediates(x, indices=1, norm=True, stop_early=True, intermediates_only=True)
    assert len(only) == 1
    if micro != "resnet":  # ends in an activation, not in a norm
        last = backbone.views_and_regions(x)[1].mT.unflatten(2, maps[-1].shape[2:])
        torch.testing.assert_close(only[0], last)


def test_classifier_can_be_added_and_removed(make_micro, micro):
    backbone = make_micro(micro, num_classes=7)
    x = images()
    assert backbone(x).shape == (2, 7)
    assert backbone.get_classifier().out_features == 7
    backbone.reset_classifier(3)
    assert backbone(x).shape == (2, 3) and backbone.num_classes == 3
    backbone.reset_classifier(0)
    assert backbone(x).shape == (2, backbone.num_features)
    assert backbone.forward_head(backbone.forward_features(x), pre_logits=True).shape == (2, backbone.num_features)


def test_feature_extraction_with_timm(make_micro, micro):
    network = make_micro(micro, features_only=True)
    maps = network(images())
    assert [m.shape[1] for m in maps] == network.feature_info.channels()
    assert all(m.ndim == 4 for m in maps)


@torch.no_grad()
@pytest.mark.parametrize("indices", [[0, 1], [1], [-1]])
def test_pruning_keeps_the_requested_maps(make_micro, micro, indices):
    backbone = make_micro(micro, num_classes=3).eval()
    x = images()
    whole = backbone.forward_intermediates(x, indices=indices, intermediates_only=True)
    parameters, last = sum(p.numel() for p in backbone.parameters()), len(backbone.feature_info) - 1
    kept = backbone.prune_intermediate_layers(indices)
    assert kept == [i % (last + 1) for i in indices]
    torch.testing.assert_close(backbone.forward_intermediates(x, indices=kept, intermediates_only=True), whole)
    assert sum(p.numel() for p in backbone.parameters()) < parameters
    assert backbone.num_classes == 0
    if max(kept) < last:
        features = backbone(x)  # neither pooled nor normed
        assert backbone.num_features == whole[-1].shape[1] and backbone.num_features in features.shape
        assert features.numel() == whole[-1].numel() + (2 * backbone.num_features if micro == "vit" else 0)


@torch.no_grad()
@pytest.mark.parametrize("pool", ["max", "avgmax", "catavgmax"])
def test_pooling_is_timms(make_micro, micro, pool):
    if micro == "vit":
        return  # all of it is timm's
    backbone = make_micro(micro, num_classes=3).eval()
    backbone.reset_classifier(2, global_pool=pool)
    x = images()
    regions = backbone.views_and_regions(x)[1]
    mean, largest = regions.mean(1), regions.amax(1)
    expected = {"max": largest, "avgmax": 0.5 * (mean + largest), "catavgmax": torch.cat((mean, largest), 1)}[pool]
    view = backbone.forward_head(backbone.forward_features(x), pre_logits=True)
    torch.testing.assert_close(view, expected)
    assert backbone(x).shape == (2, 2)
    with pytest.raises(AssertionError, match="pool"):
        make_micro(micro, global_pool="no such")


@torch.no_grad()
def test_a_swin_takes_the_windows_of_another_size(make_micro):
    small, large = make_micro("swin", img_size=16).eval(), make_micro("swin", img_size=48).eval()
    small.set_input_size(48)
    assert {k: v.shape for k, v in small.state_dict().items()} == {k: v.shape for k, v in large.state_dict().items()}
    large.load_state_dict(small.state_dict())
    assert torch.equal(small(images(48)), large(images(48)))
    small.set_input_size((32, 32), window_size=8)
    assert [stage.blocks[1].attn.window_size for stage in small.layers] == [8, 8, 4]
    with pytest.raises(ValueError, match="too small"):
        small.set_input_size(4)


def test_images_of_other_channels(make_micro, micro):
    assert make_micro(micro, in_chans=5)(torch.randn(2, 5, 32, 32)).shape[0] == 2


def test_gradient_checkpointing_changes_nothing(make_micro, micro):
    results = []
    for checkpointing in (False, True):
        backbone = make_micro(micro, drop_path_rate=0.5).train()
        backbone.set_grad_checkpointing(checkpointing)
        torch.manual_seed(1)
        backbone(images()).square().sum().backward()
        results.append([p.grad for p in backbone.parameters()])
    assert all(g is not None for g in results[0])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_stochastic_depth_rises_to_its_rate(make_micro, micro):
    rates = [m.drop_prob for m in make_micro(micro, drop_path_rate=0.3).modules() if isinstance(m, DropPath)]
    if micro == "resnet":
        assert not rates  # the published one has none
    else:
        assert rates == sorted(rates) and rates[-1] == pytest.approx(0.3)
    modules = make_micro(micro, drop_path_rate=0.0).modules()
    assert all(m.drop_prob == 0 for m in modules if isinstance(m, DropPath))


def test_caches_are_not_part_of_the_state(make_micro, micro):
    backbone = make_micro(micro).eval()
    names = set(backbone.state_dict())
    with torch.inference_mode():
        first = backbone(images()).clone()
    assert set(backbone.state_dict()) == names
    twin = copy.deepcopy(backbone)
    twin.train()(images()).sum().backward()  # what inference mode has cached does not stop a gradient
    other = make_micro(micro)
    with torch.no_grad():
        for p in other.parameters():
            p.add_(1)
    other.load_state_dict(backbone.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(other.eval()(images()), first)


def test_no_weight_decay_names_parameters(backbone):
    names = {name for name, _ in backbone.named_parameters()}
    spared = backbone.no_weight_decay() if hasattr(backbone, "no_weight_decay") else set()
    assert {name for name in spared if not name.startswith(("reg", "dist"))} <= names


def test_group_matcher_reaches_every_parameter(backbone):
    groups = {coarse: group_parameters(backbone, backbone.group_matcher(coarse=coarse)) for coarse in (True, False)}
    for found in groups.values():
        assert {n for names in found.values() for n in names} == {name for name, _ in backbone.named_parameters()}
    assert 3 <= len(groups[True]) <= len(groups[False])


def test_bfloat16_autocast_stays_close(backbone):
    x = images()
    with torch.no_grad():
        exact = backbone(x)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            rough = backbone(x)
    assert (rough.float() - exact).norm() / exact.norm() < 0.05


@pytest.mark.parametrize(
    ("name", "millions"),
    [
        ("esvit_swin_tiny_window7", 27.5),
        ("esvit_swin_small_window7", 48.8),
        ("esvit_swin_base_window7", 86.7),
        ("esvit_cvt_tiny", 29.3),
        ("esvit_vil_2262", 27.6),
        ("esvit_deit_tiny", 5.5),
        ("esvit_deit_small", 21.7),
        ("esvit_vit_base", 85.8),
        ("esvit_resnet50", 23.5),
    ],
)
def test_parameters_as_in_the_paper(name, millions):
    with torch.device("meta"):
        network = timm.create_model(name, pretrained=False)
    assert sum(p.numel() for p in network.parameters()) / 1e6 == pytest.approx(millions, abs=0.15)
    assert network.num_classes == 0
    assert network.pretrained_cfg["input_size"] == (3, 224, 224)


@torch.no_grad()
def test_windows_follow_the_resolution_built_for():
    made = create_backbone(ModelConfig(arch="swin", embed_dim=8, depths=(2, 2), num_heads=(1, 1), patch_size=4), 56)
    windows = [(b.attn.window_size, b.attn.shift_size) for stage in made.layers for b in stage.blocks]
    assert windows == [(7, 0), (7, 3), (7, 0), (7, 0)]  # 14 x 14 shifts; 7 x 7 is one window, which does not
