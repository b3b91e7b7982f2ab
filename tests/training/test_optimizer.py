"""The update of student and teacher."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from esvit_core.config import Config
from esvit_core.models.heads import ProjectionHead
from esvit_core.models.multicrop import MultiCropNetwork, build_network
from esvit_core.training.optim.lars import LARS
from esvit_core.training.optim.optimizer import (
    build_optimizer,
    clip_gradients_,
    freeze_backbone_,
    freeze_last_layer_,
    parameter_groups,
    restore_after_step_where_,
    set_hyperparameters_,
    update_teacher_,
)


@pytest.fixture
def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), ProjectionHead(8, 10, hidden_dim=12, bottleneck_dim=4))


def backward(network: nn.Module, scale: float = 1.0) -> None:
    (network(torch.randn(3, 6, generator=torch.Generator().manual_seed(1))).square().sum() * scale).backward()


def test_biases_and_norms_do_not_decay(network):
    network[0].bias.requires_grad_(False)
    decayed, spared = (group["params"] for group in parameter_groups(network))
    assert all(p.ndim > 1 for p in decayed) and all(p.ndim == 1 for p in spared)
    assert any(p is network[2].last_layer.weight_g for p in decayed)
    assert len(decayed) + len(spared) == len(list(network.parameters())) - 1  # the frozen one is nowhere


def test_step_decays_the_first_group_only(network):
    optimizer = build_optimizer(network, Config())
    set_hyperparameters_(optimizer, lr=0.1, weight_decay=0.5)
    assert [group["lr"] for group in optimizer.param_groups] == [0.1, 0.1]
    before = {name: p.detach().clone() for name, p in network.named_parameters()}
    for p in network.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    for name, p in network.named_parameters():
        factor = 1.0 if p.ndim == 1 else 1 - 0.1 * 0.5
        torch.testing.assert_close(p.detach(), factor * before[name])


@pytest.mark.parametrize("name", ["sgd", "lars"])
def test_an_undone_step_leaves_no_trace(network, name):
    """Whether it is the first step, which creates the averages, or a later one."""
    config = Config.from_mapping({"optimizer": {"name": name}})
    reference = copy.deepcopy(network)
    optimizer, plain = build_optimizer(network, config), build_optimizer(reference, config)
    for by in (optimizer, plain):
        set_hyperparameters_(by, lr=0.1, weight_decay=0.1)
    for scale, skip in ((torch.inf, True), (1.0, False), (torch.nan, True), (2.0, False)):
        network.zero_grad()
        backward(network, scale)
        restore_after_step_where_(optimizer, torch.tensor(skip))
        optimizer.step()
        if not skip:
            reference.zero_grad()
            backward(reference, scale)
            plain.step()
        for found, expected in zip(network.parameters(), reference.parameters(), strict=True):
            assert torch.equal(found, expected)


def test_step_equals_plain_adamw(network):
    reference = copy.deepcopy(network)
    plain = torch.optim.AdamW(parameter_groups(reference), foreach=False, fused=False)
    optimizer = build_optimizer(network, Config())
    for step in range(3):
        for each, by in ((network, optimizer), (reference, plain)):
            set_hyperparameters_(by, lr=0.01, weight_decay=0.1 * step)
            by.zero_grad()
            backward(each)
            by.step()
    for ours, theirs in zip(network.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", ["sgd", "lars"])
def test_step_is_the_published_rule(network, name):
    optimizer = build_optimizer(network, Config.from_mapping({"optimizer": {"name": name}}))
    expected = [(p.detach().clone(), torch.zeros_like(p)) for p in network.parameters()]
    for step in range(3):
        lr, weight_decay = 0.1 + 0.05 * step, 0.1 * (step + 1)
        set_hyperparameters_(optimizer, lr, weight_decay)
        optimizer.zero_grad()
        backward(network)
        gradients = [p.grad.clone() for p in network.parameters()]
        optimizer.step()
        for (p, momentum), gradient in zip(expected, gradients, strict=True):
            update = gradient if p.ndim == 1 else gradient + weight_decay * p
            if name == "lars" and p.ndim > 1:
                update = update * (0.001 * p.norm() / update.norm())
            momentum.mul_(0.9).add_(update)
            p -= lr * momentum
        for ours, (theirs, _) in zip(network.parameters(), expected, strict=True):
            torch.testing.assert_close(ours.detach(), theirs, rtol=1e-5, atol=1e-6)


def test_lars_leaves_a_zero_weight_or_gradient_unscaled():
    weight = nn.Parameter(torch.zeros(2, 3))
    optimizer = LARS([weight], lr=1.0)
    weight.grad = torch.ones(2, 3)
    optimizer.step()
    torch.testing.assert_close(weight.detach(), -torch.ones(2, 3))
    weight.grad = torch.zeros(2, 3)
    optimizer.step()  # the momentum alone
    torch.testing.assert_close(weight.detach(), -1.9 * torch.ones(2, 3))


@pytest.mark.parametrize("name", ["adamw", "sgd", "lars"])
def test_a_restored_optimizer_continues_bitwise(network, name, tmp_path):
    config = Config.from_mapping({"optimizer": {"name": name}})

    def steps(network, optimizer, count):
        for _ in range(count):
            set_hyperparameters_(optimizer, lr=0.01, weight_decay=0.1)
            optimizer.zero_grad()
            backward(network)
            freeze_last_layer_(network) if count == 1 else None
            optimizer.step()

    optimizer = build_optimizer(network, config)
    steps(network, optimizer, 1)
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    other = copy.deepcopy(network)
    restored = build_optimizer(other, config)
    restored.load_state_dict(torch.load(tmp_path / "optimizer.pt", weights_only=True))
    steps(network, optimizer, 2)
    steps(other, restored, 2)
    assert all(torch.equal(a, b) for a, b in zip(network.parameters(), other.parameters(), strict=True))


def test_each_gradient_is_clipped_separately(network):
    backward(network, scale=0.05)
    before = {name: p.grad.clone() for name, p in network.named_parameters()}
    total = clip_gradients_(network.parameters(), 3.0)
    assert total.item() == pytest.approx(torch.cat([g.flatten() for g in before.values()]).norm().item(), rel=1e-5)
    clipped = 0
    for name, p in network.named_parameters():
        norm = before[name].norm()
        clipped += bool(norm > 3)
        torch.testing.assert_close(p.grad, before[name] * min(1.0, 3.0 / (norm.item() + 1e-6)), rtol=1e-5, atol=1e-8)
    assert 0 < clipped < len(before)


def test_clipping_at_zero_only_measures(network):
    backward(network)
    before = [p.grad.clone() for p in network.parameters()]
    assert clip_gradients_(network.parameters(), 0).item() > 0
    assert all(torch.equal(p.grad, g) for p, g in zip(network.parameters(), before, strict=True))


def test_frozen_prototypes_are_not_updated(network):
    optimizer = build_optimizer(network, Config())
    set_hyperparameters_(optimizer, lr=0.1, weight_decay=0.5)
    before = {name: p.detach().clone() for name, p in network.named_parameters()}
    backward(network)
    freeze_last_layer_(network)
    optimizer.step()
    for name, p in network.named_parameters():
        assert torch.equal(p, before[name]) == ("last_layer" in name), name
        assert (p in optimizer.state) == ("last_layer" not in name), name


def test_teacher_is_a_moving_average_of_the_student(network):
    teacher = copy.deepcopy(network).requires_grad_(False)
    before = [p.clone() for p in teacher.parameters()]
    with torch.no_grad():
        for p in network.parameters():
            p.add_(torch.randn_like(p))
    for momentum in (0.996, 0.3):
        expected = [momentum * t + (1 - momentum) * s for t, s in zip(before, network.parameters(), strict=True)]
        update_teacher_(network, teacher, momentum)
        before = [p.clone() for p in teacher.parameters()]
        for ours, theirs in zip(before, expected, strict=True):
            torch.testing.assert_close(ours, theirs.detach())
    update_teacher_(network, teacher, 1.0)
    assert all(torch.equal(p, b) for p, b in zip(teacher.parameters(), before, strict=True))


def with_backbone(**optimizer: object) -> tuple[MultiCropNetwork, Config]:
    model = {"arch": "swin", "patch_size": 2, "embed_dim": 8, "depths": (1, 2), "num_heads": (1, 1), "window_size": 4}
    crops = {"global_crops": {"size": 16}, "local_crops": {"size": 8}}
    head = {"out_dim": 8, "hidden_dim": 8, "bottleneck_dim": 4}
    config = Config.from_mapping({"model": model, "augment": crops, "head": head, "optimizer": optimizer})
    torch.manual_seed(0)
    return build_network(config), config


def test_with_layer_decay_early_blocks_learn_more_slowly():
    network, config = with_backbone(layer_decay=0.5)
    optimizer = build_optimizer(network, config)
    set_hyperparameters_(optimizer, lr=0.1, weight_decay=0.25)
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    named = {name: rates[id(p)] for name, p in network.named_parameters() if p.requires_grad}
    assert {rate for name, rate in named.items() if name.startswith("head")} == {0.1}
    blocks = [
        named[f"backbone.{name}.norm1.weight"]
        for name in ("layers.0.blocks.0", "layers.1.blocks.0", "layers.1.blocks.1")
    ]
    assert blocks == pytest.approx([0.025, 0.05, 0.1])
    assert named["backbone.patch_embed.proj.weight"] == pytest.approx(0.0125)
    decays = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    for name, p in network.named_parameters():
        if p.requires_grad:
            assert decays[id(p)] == (0.0 if name.endswith(".bias") or p.ndim == 1 else 0.25), name


@pytest.mark.parametrize("arch", ["deit_tiny", "cvt_tiny", "vil_2262", "resnet50", "timm:convnext_atto"])
def test_every_family_has_blocks_for_layer_decay(arch):
    config = Config.from_mapping({"model": {"arch": arch}, "optimizer": {"layer_decay": 0.9}, "head": {"out_dim": 8}})
    with torch.device("meta"):
        network = build_network(config)
    groups = parameter_groups(network, 0.9)
    factors = {group["lr_factor"] for group in groups}
    assert max(factors) == 1 and len(factors) > 4
    assert sum(len(group["params"]) for group in groups) == sum(p.requires_grad for p in network.parameters())


def test_without_layer_decay_the_groups_are_those_of_the_published_code():
    network, _ = with_backbone()
    assert [sorted(group) for group in parameter_groups(network)] == [["params"], ["params", "weight_decay"]]


def test_a_frozen_backbone_stays_and_the_heads_learn():
    network, config = with_backbone()
    optimizer = build_optimizer(network, config)
    set_hyperparameters_(optimizer, lr=0.1, weight_decay=0.5)
    before = {name: p.detach().clone() for name, p in network.named_parameters()}
    for p in network.parameters():
        p.grad = torch.ones_like(p)
    freeze_backbone_(network)
    optimizer.step()
    changed = {name for name, p in network.named_parameters() if not torch.equal(p, before[name])}
    assert changed and not any(name.startswith("backbone.") for name in changed)
