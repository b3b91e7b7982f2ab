"""Student and teacher over crops of several sizes."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from esvit_core.config import Config, ModelConfig
from esvit_core.errors import UserError
from esvit_core.losses import Objective
from esvit_core.models import MultiCropNetwork, ProjectionHead, build_student_teacher, create_backbone
from esvit_core.training.optim.optimizer import build_optimizer, set_hyperparameters_, update_teacher_
from esvit_core.weights.published_names import from_published, to_published

MICRO = {
    "augment": {
        "global_crops": {"size": 16, "number": 2, "scale": (0.4, 1.0)},
        "local_crops": {"size": 8, "number": 2, "scale": (0.05, 0.4)},
    },
    "model": {
        "arch": "swin",
        "patch_size": 2,
        "embed_dim": 8,
        "depths": (1, 2),
        "num_heads": (1, 2),
        "window_size": 4,
        "drop_path": 0.5,
    },
    "head": {"out_dim": 32, "hidden_dim": 16, "bottleneck_dim": 8},
}


def crops(*sizes: int, B: int = 2) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(B, 3, size, size, generator=generator) for size in sizes]


@torch.no_grad()
def test_rows_are_crop_by_crop_image_by_image():
    student, _ = build_student_teacher(Config.from_mapping(MICRO))
    student.eval()
    given = crops(16, 16, 8, 12, 8)
    out = student(given)
    assert out.regions_per_crop == [16, 16, 4, 9, 4]
    alone = [student([crop]) for crop in given]
    for field in ("view_logits", "region_logits", "region_features", "view_features"):
        torch.testing.assert_close(getattr(out, field), torch.cat([getattr(o, field) for o in alone]))


def test_view_only_has_no_region_head():
    student, _ = build_student_teacher(Config.from_mapping({**MICRO, "objective": {"region": False}}))
    out = student(crops(16, 8))
    assert student.head_dense is None
    assert out.region_logits is None and out.region_features is None
    assert not [name for name in student.state_dict() if "dense" in name]


def test_student_and_teacher_start_equal_from_the_seed():
    config = Config.from_mapping({**MICRO, "seed": 3})
    torch.manual_seed(11)
    state = torch.get_rng_state()
    student, teacher = build_student_teacher(config)
    assert torch.equal(torch.get_rng_state(), state)
    again, _ = build_student_teacher(config)
    other, _ = build_student_teacher(Config.from_mapping({**MICRO, "seed": 4}))
    for name, value in student.state_dict().items():
        assert torch.equal(value, teacher.state_dict()[name]) and torch.equal(value, again.state_dict()[name])
    assert any(not torch.equal(a, b) for a, b in zip(student.parameters(), other.parameters(), strict=True))
    assert all(p.requires_grad for p in student.parameters())
    assert not any(p.requires_grad for p in teacher.parameters())
    assert teacher.training


def test_only_the_student_has_stochastic_depth():
    student, teacher = build_student_teacher(Config.from_mapping(MICRO))
    given = crops(16, B=8)
    assert not torch.equal(student(given).view_logits, student(given).view_logits)
    assert torch.equal(teacher(given).view_logits, teacher(given).view_logits)


def test_head_is_torchs_weight_norm():
    torch.manual_seed(0)
    head = ProjectionHead(6, 10, hidden_dim=12, bottleneck_dim=4)
    with torch.no_grad():
        head.last_layer.weight_g.uniform_(0.5, 2)
    plain = torch.nn.utils.parametrizations.weight_norm(nn.Linear(4, 10, bias=False))
    plain.parametrizations.weight.original0.data.copy_(head.last_layer.weight_g)
    plain.parametrizations.weight.original1.data.copy_(head.last_layer.weight_v)
    x = torch.randn(5, 6)
    torch.testing.assert_close(head(x), plain(nn.functional.normalize(head.mlp(x), dim=-1)))
    assert ProjectionHead(6, 10, norm_last_layer=True).last_layer.weight_g.requires_grad is False


def test_head_with_batch_norm_has_the_published_names():
    names = set(ProjectionHead(6, 10, hidden_dim=12, bottleneck_dim=4, batch_norm=True).state_dict())
    assert {"mlp.1.running_mean", "mlp.4.running_mean", "mlp.6.weight", "last_layer.weight_v"} <= names


@pytest.mark.parametrize("arch", ["swin", "resnet50"])
@pytest.mark.parametrize("wrapped", ["", "module."])
def test_published_names_go_both_ways(arch, wrapped):
    with torch.device("meta"):
        backbone = create_backbone(ModelConfig(arch=arch))
        network = MultiCropNetwork(backbone, *(ProjectionHead(8, 16, 8, 4) for _ in range(2)))
    state = network.state_dict()
    published = to_published(state)
    assert ("backbone.backbone.conv1.weight" if arch == "resnet50" else "patch_embed.proj.weight") in published
    assert "head.mlp.0.weight" in published and "head_dense.last_layer.weight_g" in published
    assert from_published({wrapped + name: value for name, value in published.items()}) == state


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"arch": "swin_tiny_w8"}, "did you mean 'swin_tiny_w7'"),
        ({"arch": "timm:convnext_tinny"}, "timm has no network convnext_tinny"),
        ({"arch": "swin", "embed_dim": 7, "num_heads": (2, 2, 2, 2)}, "do not divide"),
        ({"arch": "swin", "img_size": 16}, "too small"),
        ({"arch": "swin", "depths": (2, 2)}, "one entry per stage"),
        ({"arch": "cvt_tiny", "embed_dim": 32}, "model.embed_dim: cvt_tiny has no such setting"),
        ({"arch": "deit_tiny", "window_size": 4}, "model.window_size: deit_tiny has no such setting"),
        ({"arch": "timm:resnet10t", "depths": (1, 1)}, "unexpected keyword argument 'depths'"),
        ({"arch": "vil_2262", "img_size": 16}, "too small"),
        ({"arch": "vil", "stages": "l1,h3,d96,n2,s1"}, "expected g0 in the last stage"),
        ({"arch": "vil", "stages": "tiny"}, "expected letters with numbers"),
        ({"arch": "swin", "stages": "l1"}, "model.stages: swin has no such setting"),
    ],
)
def test_mistakes_are_reported_in_one_line(model, message):
    with pytest.raises(UserError, match=r"^model") as error:
        create_backbone(ModelConfig.model_validate(model))
    assert message in str(error.value)


THIN = {"embed_dim": 24, "depths": (1, 1, 1, 1), "num_heads": (1, 2, 3, 4)}


@pytest.mark.parametrize(
    ("arch", "sizes", "layout"),
    [
        ("resnet10t", {}, "NCHW"),
        ("convnext_tiny", {"depths": (1, 1, 1, 1)}, "NCHW"),
        ("swin_tiny_patch4_window7_224", THIN, "NHWC"),
        ("swinv2_tiny_window8_256", THIN, "NHWC"),
        ("vit_tiny_patch16_224", {"embed_dim": 48}, "NLC"),
        ("vit_small_patch14_reg4_dinov2", {"embed_dim": 48}, "NLC"),  # a class token and four registers
        ("mobilenetv3_small_050", {}, "NCHW"),  # whose view is wider than its regions
    ],
)
def test_any_network_of_timm_trains_a_step(arch, sizes, layout):
    values = {
        **MICRO,
        "model": {"arch": f"timm:{arch}", "drop_path": 0.1, **sizes},
        "augment": {
            "global_crops": {"size": 64, "number": 2, "scale": (0.4, 1.0)},
            "local_crops": {"size": 32, "number": 1, "scale": (0.05, 0.4)},
        },
    }
    config = Config.from_mapping(values)
    student, teacher = build_student_teacher(config)
    backbone = student.backbone
    assert backbone.layout == layout
    given = crops(64, 64, 32)
    optimizer = build_optimizer(student, config)
    set_hyperparameters_(optimizer, 1e-3, 0.04)
    terms = Objective(config.objective, 32)(student(given), teacher(given[:2]), 0.04)
    terms.total.backward()
    before = [p.clone() for p in teacher.parameters()]
    optimizer.step()
    update_teacher_(student, teacher, 0.9)
    assert torch.isfinite(terms.total)
    assert any(not torch.equal(p, b) for p, b in zip(teacher.parameters(), before, strict=True))
    with torch.no_grad():
        student.eval()
        view, regions = backbone.views_and_regions(given[2])
        assert view.shape[1] == backbone.num_features and regions.shape[2] == backbone.num_region_features
        torch.testing.assert_close(backbone(given[2]), view)
        assert backbone.attention_map(given[2])[0, 0].numel() == regions.shape[1]
        assert backbone.last_blocks(given[2], 2).shape[0] == 2


@pytest.mark.parametrize(
    ("arch", "local", "message"),
    [
        ("convit_tiny", 96, "does not accept crops of 96 x 96 px .*Input height"),  # which asks
        ("csatv2", 50, "does not accept crops of 50 x 50 px .*invalid for input"),  # which fails at a shape
        ("coat_tiny", 96, "returns no feature map"),  # but a list
        ("pit_ti_224", 128, "returns no feature map"),  # but the class token
    ],
)
def test_crop_sizes_that_a_timm_network_does_not_accept_are_refused(arch, local, message):
    crop_sizes = {"global_crops": {"size": 128}, "local_crops": {"size": local}}
    config = Config.from_mapping({**MICRO, "model": {"arch": f"timm:{arch}"}, "augment": crop_sizes})
    with pytest.raises(UserError, match=message):
        build_student_teacher(config)


def test_a_compiler_that_fails_is_not_reported_as_a_crop_size():
    config = Config.from_mapping({**MICRO, "model": {"arch": "timm:resnet10t"}})
    backbone = build_student_teacher(config)[0].backbone

    def fail(graph, inputs):
        raise RuntimeError("no compiler")

    backbone.model.layer1[0].compile(backend=fail)
    with pytest.raises(Exception, match="no compiler") as caught:
        backbone.views_and_regions(torch.zeros(1, 3, backbone.img_size, backbone.img_size))
    assert not isinstance(caught.value, UserError)


def test_a_bug_in_a_timm_network_is_not_reported_as_a_crop_size(monkeypatch):
    config = Config.from_mapping({**MICRO, "model": {"arch": "timm:resnet10t"}})
    backbone = build_student_teacher(config)[0].backbone

    def fail(x):
        raise RuntimeError("a bug: shapes do not match")

    monkeypatch.setattr(backbone.model, "forward_features", fail)
    with pytest.raises(RuntimeError, match="a bug"):
        backbone.forward_features(torch.zeros(2, 3, 64, 64))
